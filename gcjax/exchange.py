"""Exchanges: how the mean of all workers' vectors is obtained.

A public function for each: it builds the exchange and the aggregator around it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import base, wire
from gcjax.aggregate import aggregator, all_reduce, gather, nearest_admitted
from gcjax.base import Aggregator, Compressor, Exchange, Layout
from gcjax.compressors import low_rank


def compressed_mean(
    compressor: Compressor,
    axis_name: str = "workers",
    *,
    error_feedback: bool | None = None,
    spacing: float = 1.05,
    **options: Any,
) -> Aggregator:
    """Mean of compressed gradients: compress locally, gather messages, decode, average.

    Messages of linear compressors travel by all-reduce, all others by all-gather.

    Args:
      compressor: From `gcjax.top_k`, `gcjax.qsgd` and so on.
      axis_name: Name of the workers' axis.
      error_feedback: None: on at the compressor's levels that are contractions, off at
        the others, through which an older error is sent along once. True: on, and only
        contractions may be chosen. False: off.
      spacing: Largest factor between neighbouring lengths of the message buffer, where
        levels change; padding costs half of its excess over 1 on average.
      **options: See `aggregator`.

    Raises:
      ValueError: for options out of range; see also `aggregator`.
    References: Seide et al., 2014, 1-Bit Stochastic Gradient Descent (error feedback);
      Karimireddy et al., 2019, Error Feedback Fixes SignSGD, arXiv:1901.09847.
    """
    if not 1 < spacing <= 2:
        raise ValueError(f"spacing must be in (1, 2], got {spacing}")
    lanes = compressor.lanes
    contraction = np.array(compressor.contraction)
    feedback = contraction & (error_feedback is not False)
    admitted = contraction if error_feedback else np.ones_like(contraction)

    def capacities(layout: Layout, fixed, largest) -> list[list[int]]:
        words = compressor.words(layout)
        if fixed is not None:
            return [[int(base.pick(words, fixed).sum())]]
        low, high = int(words.min(1).sum()), int(base.pick(words, largest).sum())
        # Every uniform level's exact length is on the ladder, and so is the dense one.
        exact = np.append(words.sum(0), layout.sizes.sum() // lanes * lanes)
        return [wire.capacity_ladder(low, high, exact, spacing, lanes)]

    def mean(layout, x, levels, state, keys, capacities):
        (ladder,) = capacities
        units, sent = compressor.encode(layout, x, levels, keys)
        message, shared = compressor.pack(layout, units, levels, ladder[-1])

        def at_capacity(capacity: int, message: jax.Array, shared: Any):
            message = message[:, : capacity // lanes]
            if compressor.linear:
                total, words = all_reduce(wire.to_floats(message), axis_name, "message")
                messages = wire.to_words(total)[None]
            else:
                messages, words = gather(message, axis_name, "message")
            return compressor.decode(layout, messages, levels, shared), words

        needed = base.pick(compressor.words(layout), levels).sum()
        total, words = switch(needed, ladder, at_capacity, message, shared)
        return total, sent, state, words

    exchange = Exchange(
        name=compressor.name,
        levels=compressor.levels,
        row=compressor.row,
        feedback=tuple(feedback.tolist()),
        admits=lambda layout: np.broadcast_to(
            admitted, (layout.num_layers, len(admitted))
        ),
        accepts=lambda shape: True,
        words=compressor.words,
        capacities=capacities,
        errors=compressor.errors,
        init=lambda layout, key: (),
        mean=mean,
    )
    return aggregator(exchange, axis_name, **options)


def power_sgd(
    ranks: int | Sequence[int] = 4,
    axis_name: str = "workers",
    *,
    error: str = "local",
    spacing: float = 1.05,
    **options: Any,
) -> Aggregator:
    """PowerSGD: one power iteration a step towards the gradients' leading subspace.

    For each layer's matrix M [n, m], with Q [m, r] of the last step:
    P = mean(M Q); P = orthogonalise(P); Q = mean(M^T P); the result is P Q^T. Both
    means are all-reduces of the factors of all layers together.

    Args:
      ranks: Rank r, at least 1; one, or a ladder. For a layer only ranks that exist
        and make it smaller are admitted; tensors without any travel uncompressed.
      axis_name: Name of the workers' axis.
      error: What a worker keeps. "local": M - P (M^T P)^T, its own gradient less its
        own contribution, as the paper's Algorithm 2 memorises it. "aggregate": M -
        P Q^T, as the paper's code, L-GreCo and PyTorch do; the mean over workers is
        the same, but each worker's error then also collects all that it differs by
        from the mean, without bound; "local" collects only what lies outside the
        subspace that all workers share, which grows where workers differ constantly.
      spacing: See `compressed_mean`.
      **options: See `aggregator`.

    Payload: P, r n, and Q, r m words float32.
    Properties: linear; biased, a contraction once Q is warm; always with error
      feedback.
    Raises:
      ValueError: for a rank below 1, an unknown error; see also `aggregator`.
    References: Vogels et al., 2019, PowerSGD: Practical Low-Rank Gradient Compression
      for Distributed Optimization, arXiv:1905.13727, Algorithms 1 and 2.
    Note: Factors have as many columns as the largest admitted rank. Columns beyond the
      rank in force keep their last value and warm-start a later increase.
    """
    if error not in ("local", "aggregate"):
        raise ValueError(
            f"power_sgd: error must be 'local' or 'aggregate', got {error!r}"
        )
    if not 1 < spacing <= 2:
        raise ValueError(f"spacing must be in (1, 2], got {spacing}")
    ranks = base.ladder(ranks, "rank", 1, 2**16)

    def admits(layout: Layout) -> np.ndarray:
        rows = [low_rank.admits(shape, ranks) for shape in layout.shapes]
        return np.array(rows, bool).reshape(-1, len(ranks))

    def widths(layout: Layout) -> np.ndarray:
        return (admits(layout) * np.array(ranks)).max(1, initial=1)

    def sides(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        shapes = [low_rank.matrix_shape(s) for s in layout.shapes]
        n, m = np.array(shapes, np.int64).reshape(-1, 2).T
        return n, m

    def capacities(layout: Layout, fixed, largest) -> list[list[int]]:
        allowed = np.array(ranks)[nearest_admitted(admits(layout))]  # [L, V]
        ladders = []
        for side in sides(layout):
            words = side[:, None] * allowed
            if fixed is not None:
                ladders.append([int(base.pick(words, fixed).sum())])
                continue
            # A side alone may grow although both together shrink.
            low, high = int(words.min(1).sum()), int(words.max(1).sum())
            ladders.append(wire.capacity_ladder(low, high, words.sum(0), spacing))
        return ladders

    def mean_factors(name: str, factors: list, rank: jax.Array, ladder: list[int]):
        """All-reduces the first columns of all layers' factors."""
        flat = jnp.concatenate([f.T.reshape(-1) for f in factors])
        sizes = np.array([f.size for f in factors])
        lengths = rank * jnp.array([f.shape[0] for f in factors], jnp.int32)
        buffer = wire.compact(flat, sizes, lengths, ladder[-1])

        def at_capacity(capacity: int, buffer: jax.Array):
            total, words = all_reduce(buffer[:capacity], axis_name, name)
            return wire.fit(total, ladder[-1]), words

        total, words = switch(lengths.sum(), ladder, at_capacity, buffer)
        flat = wire.expand(total, sizes, lengths)
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        means = [
            p.reshape(f.shape[::-1]).T for p, f in zip(parts, factors, strict=True)
        ]
        return means, words

    def mean(layout, x, levels, state, keys, capacities):
        del keys
        rank = jnp.array(ranks, jnp.int32)[levels]
        layers = low_rank.matrices(layout, x)
        each = lambda fn, *lists: [fn(*args) for args in zip(*lists, strict=True)]
        q = each(low_rank.unit_scale, each(low_rank.first_columns, state, rank))
        p, words = mean_factors(
            "left_factors", each(low_rank.product, layers, q), rank, capacities[0]
        )
        p = each(low_rank.orthogonalize, p, rank)
        own = each(lambda m, p: low_rank.product(m.T, p), layers, p)
        q, more = mean_factors("right_factors", own, rank, capacities[1])

        restore = lambda p, q: low_rank.product(p, q.T)
        total = layout.flatten(each(restore, p, q))
        local = layout.flatten(each(restore, p, own))
        sent = local if error == "local" else local - local + total
        kept = lambda new, old, r: jnp.where(jnp.arange(old.shape[1]) < r, new, old)
        return total, sent, each(kept, q, state, rank), words + more

    exchange = Exchange(
        name="power_sgd",
        levels=ranks,
        row=1,
        feedback=(True,) * len(ranks),
        admits=admits,
        accepts=lambda shape: bool(low_rank.admits(shape, ranks).any()),
        words=lambda layout: low_rank.words(layout, ranks),
        capacities=capacities,
        errors=lambda layout, x: low_rank.tail_energy(layout, x, ranks),
        init=lambda layout, key: low_rank.init_factors(layout, widths(layout), key),
        mean=mean,
    )
    return aggregator(exchange, axis_name, **options)


def switch(needed: jax.Array, ladder: list[int], at_capacity: Callable, *args: Any):
    """Calls `at_capacity` with the least capacity of a ladder that suffices.

    The index must be the same on all workers: a collective stands in the branch.
    """
    if len(ladder) == 1:
        return at_capacity(ladder[0], *args)
    branches = [lambda *a, c=c: at_capacity(c, *a) for c in ladder]
    index = jnp.searchsorted(jnp.array(ladder, jnp.int32), needed)
    return lax.switch(index, branches, *args)
