"""Exchanges: how the mean of all workers' vectors is obtained.

A public function for each: it builds the exchange and the aggregator around it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import base, wire
from gcjax.aggregate import aggregator, nearest_admitted
from gcjax.base import Aggregator, Compressor, Exchange, Layout, Rows
from gcjax.collectives import all_reduce, gather, no_words, pass_on, scatter, switch
from gcjax.compressors import low_rank, quantize
from gcjax.workers import as_local


def compressed_mean(
    compressor: Compressor,
    axis_name: str = "workers",
    *,
    error_feedback: bool | None = None,
    collective: str | None = None,
    spacing: float = 1.05,
    **options: Any,
) -> Aggregator:
    """Mean of compressed gradients: compress locally, gather messages, decode, average.

    With N workers and messages of S bits one worker sends (N - 1) S by all-gather and
    2 (N - 1) / N S by all-reduce or reduce-scatter.

    Args:
      compressor: From `gcjax.top_k`, `gcjax.qsgd` and so on.
      axis_name: Name of the workers' axis.
      error_feedback: None: on at the compressor's levels that are contractions, off at
        the others, through which an older error is sent along once. True: on, and only
        contractions may be chosen. False: off.
      collective: "all_reduce", for linear compressors; "all_gather", for all others; or
        "reduce_scatter", for quantisers whose scales belong to rows (qsgd, cast,
        natural, sign with a bucket size): each worker averages its share of the rows,
        compresses the mean again and sends it to all, whatever their number. What the
        second compression loses, its owner keeps in its error, times N, at levels
        whose relative error is below 1/4, and nobody elsewhere. "ring": the same with
        shares that are added up from worker to worker and compressed at every hop,
        N - 1 times, by whose sender the loss is kept; as many bytes, more noise, but
        each worker sends to one other only, which TCP serves better. For `cast`. None:
        the first.
      spacing: Largest factor between neighbouring lengths of the message buffer, where
        levels change; padding costs half of its excess over 1 on average.
      **options: See `aggregator`.

    Raises:
      ValueError: for options out of range; see also `aggregator`.
    References: Seide et al., 2014, 1-Bit Stochastic Gradient Descent (error feedback);
      Karimireddy et al., 2019, Error Feedback Fixes SignSGD, arXiv:1901.09847;
      Markov et al., 2022, CGX, arXiv:2111.08617 (reduce-scatter of compressed rows,
      there without feedback of the second error).
    """
    _check_spacing(spacing)
    contraction = np.array(compressor.contraction)
    feedback = contraction & (error_feedback is not False)
    admitted = contraction if error_feedback else np.ones_like(contraction)
    kinds = ["all_reduce"] if compressor.linear else ["all_gather"]
    kinds += ["reduce_scatter", "ring"] if compressor.rows else []
    collective = collective or kinds[0]
    if collective not in kinds:
        raise ValueError(
            f"{compressor.name} travels by {' or '.join(kinds)}, not by {collective!r}"
        )

    def capacities(layout: Layout, fixed, largest) -> list[list[int]]:
        words = compressor.words(layout)
        if fixed is not None:
            return [[int(base.pick(words, fixed).sum())]]
        low, high = int(words.min(1).sum()), int(base.pick(words, largest).sum())
        # Every uniform level's exact length is on the ladder, and so is the dense one.
        exact = np.append(words.sum(0), layout.sizes.sum())
        return [wire.capacity_ladder(low, high, exact, spacing)]

    def mean(layout, x, gradient, small, levels, state, keys, capacities):
        del gradient
        (ladder,), (shared_state, own) = capacities, state
        units, sent, own = compressor.encode(layout, x, levels, keys, own)
        message, shared = compressor.pack(layout, units, levels, ladder[-1])

        collect = mean_with if compressor.linear else gather_with

        def collected(room: int, capacity: int, message: jax.Array):
            messages, *more = collect(message[:capacity], small, axis_name)
            return jnp.pad(messages, ((0, 0), (0, room - capacity))), *more

        def decoded(room: int, message: jax.Array, shared: Any):
            of_room = functools.partial(collected, room)
            messages, *more = switch(needed, rooms[room], of_room, message)
            return compressor.decode(layout, messages, levels, shared), *more

        needed = _needed(compressor.words(layout), levels)
        rooms = _rooms(ladder)
        total, small, words = switch(needed, list(rooms), decoded, message, shared)
        return total, small, sent, (shared_state, own), words

    if collective in ("reduce_scatter", "ring"):
        capacities, mean = _dealt(compressor, axis_name, feedback, spacing, collective)
    exchange = Exchange(
        name=compressor.name,
        levels=compressor.levels,
        row=compressor.row,
        feedback=tuple(feedback.tolist()),
        admits=lambda layout: np.tile(admitted, (layout.num_layers, 1)),
        carrier="all-gather" if collective == "all_gather" else "all-reduce",
        accepts=lambda shape: True,
        words=compressor.words,
        capacities=capacities,
        errors=compressor.errors,
        init=lambda layout, key: (),
        init_worker=compressor.init,
        mean=mean,
    )
    return aggregator(exchange, axis_name, **options)


def _rooms(ladder: list[int]) -> dict[int, list[int]]:
    """Groups lengths within a factor of 1.5, by the largest of each group, ascending.

    A group shares one decoder, for its largest length: with one for every length,
    decoders would be most of what there is to compile.
    """
    rooms: dict[int, list[int]] = {}
    for capacity in reversed(ladder):
        room = min(rooms, default=0)
        if capacity * 1.5 > room > 0:
            rooms[room].append(capacity)
        else:
            rooms[capacity] = [capacity]
    return {room: sorted(rooms[room]) for room in sorted(rooms)}


def _needed(words: np.ndarray, levels: jax.Array) -> jax.Array:
    """Words of all layers that are sent, int32."""
    return jnp.sum(jnp.where(levels < 0, 0, base.pick(words, jnp.maximum(levels, 0))))


# --- Small tensors ride along. --------------------------------------------------------

# By all-gather the small tensors cost N / 2 times as much as by an all-reduce of their
# own, which is worth its latency if they are few: words, or a share of the message.
_RIDE_WORDS, _RIDE_SHARE = 64, 1 / 8


def mean_with(
    message: jax.Array, small: jax.Array, axis_name: str, name: str = "message"
):
    """The mean of all workers' linear messages, [1, any], and of the small tensors."""
    both = jnp.concatenate([small, wire.to_floats(message)])
    both, words = all_reduce(both, axis_name, name)
    return wire.to_words(both[small.size :])[None], both[: small.size], words


def gather_with(
    message: jax.Array, small: jax.Array, axis_name: str, name: str = "message"
):
    """All workers' messages, and the mean of the small tensors."""
    if small.size > max(_RIDE_WORDS, _RIDE_SHARE * message.size):
        messages, words = gather(message, axis_name, name)
        mean, more = all_reduce(small, axis_name, "small_tensors")
        return messages, mean, words + more
    both = jnp.concatenate([wire.to_words(small), message])
    messages, words = gather(both, axis_name, name)
    mean = jnp.mean(wire.to_floats(messages[:, : small.size]), axis=0)
    return messages[:, small.size :], mean, words


# --- Reduce-scatter and all-gather of quantised rows. ---------------------------------


def _shares(compressor: Compressor, layout: Layout, count: int) -> np.ndarray:
    """The rows that each of `count` workers adds up, int[count, R]; `num_rows` is none.

    Where widths differ every worker gets rows from everywhere, so that the messages,
    which must be of one length, need little padding.
    """
    each = -(-layout.num_rows // count)
    order = np.minimum(np.arange(each * count), layout.num_rows)
    dealt = compressor.rows.dealt
    return order.reshape(each, count).T if dealt else order.reshape(count, each)


def _rows_of(rows: Rows, order: Any) -> Rows:
    """Rows in the order [S, R], where padding has none; NumPy if both are."""
    static = all(isinstance(x, np.ndarray) for x in (rows.valid, rows.width, order))
    np_or_jnp = np if static else jnp
    last = lambda x: np_or_jnp.append(np_or_jnp.ravel(x).astype(np.int32), 0)[order]
    return Rows(last(rows.valid), last(rows.width), rows.unit)


def _dealt(compressor, axis_name, feedback, spacing, collective: str) -> tuple:
    """Capacities and mean of an exchange whose rows are dealt out to the workers."""
    ring = collective == "ring"
    return (
        functools.partial(_share_capacities, compressor, axis_name, spacing),
        functools.partial(_mean_by_shares, compressor, axis_name, feedback, ring),
    )


def _share_capacities(compressor, axis_name, spacing, layout: Layout, fixed, largest):
    """Lengths of a share's message; the same for both collectives."""
    count = lax.axis_size(axis_name)
    order = _shares(compressor, layout, count)

    def longest(levels: np.ndarray) -> int:
        rows = _rows_of(compressor.rows.rows(layout, levels), order)
        return int(np.max(compressor.rows.words(rows)))

    if fixed is not None:
        ladder = [longest(fixed)]
    else:
        uniform = [np.full_like(largest, v) for v in range(len(compressor.levels))]
        exact = np.array([longest(v) for v in uniform])
        # Shares of layers at different levels may differ by a few rows.
        high = max(longest(largest), exact[0])
        ladder = wire.capacity_ladder(int(exact[0]), high, exact, spacing)
    return [ladder, ladder]


def _mean_by_shares(
    compressor,
    axis_name,
    feedback,
    ring,
    layout,
    x,
    gradient,
    small,
    levels,
    state,
    keys,
    capacities,
):
    """The mean by a reduce-scatter and an all-gather of compressed rows.

    Worker j receives all workers' messages of its share of the rows, averages them,
    compresses the mean again and sends it to all. All use what was decoded, the owner
    too, so that replicas agree.
    """
    del gradient
    codec, (shared_state, own) = compressor.rows, state
    count, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    order = _shares(compressor, layout, count)
    rows = codec.rows(layout, levels)
    shares = _rows_of(rows, order)
    mine = jnp.asarray(order, jnp.int32)[me][None]
    my_rows = _rows_of(rows, mine)
    here = np.arange(order.shape[1])[None]
    natural = np.argsort(order.reshape(-1), kind="stable")[: layout.num_rows]
    natural = None if np.array_equal(natural, np.arange(order.size)) else natural
    again = jax.random.fold_in(keys.worker, 1)

    def value(message: jax.Array, rows: Rows) -> jax.Array:
        """What a message of one share says, zero in the padding."""
        x = codec.value(codec.unpack(message[None], rows), rows)
        inside = np.arange(layout.row, dtype=np.int32) < rows.valid.reshape(-1, 1)
        return jnp.where(inside, x, 0)

    def around(capacity: int, x: jax.Array):
        """The mean of my share, and what I lost of x on the way of the other shares."""
        lost, words, total = jnp.zeros_like(x), no_words(), None
        for hop in range(count):
            # What I add to, and send on unless it is my own share's sum.
            share = jnp.asarray(order, jnp.int32)[(me - 1 - hop) % count][None]
            of_share, part = _rows_of(rows, share), x[share[0]]
            total = part if total is None else total + part
            if hop == count - 1:
                return total / count, lost, words
            key = jax.random.fold_in(keys.worker, 2 + hop)
            new = codec.encode(total, of_share, key)
            (message,) = codec.pack(new, here, of_share, capacity)
            rest = total - codec.value(new, of_share)
            lost = lost.at[share[0]].set(rest, mode="drop")
            message, more = pass_on(message, axis_name, f"hop_{hop}")
            words += more
            share = jnp.asarray(order, jnp.int32)[(me - 2 - hop) % count][None]
            total = value(message, _rows_of(rows, share))

    def at_capacity(capacity: int, packed: jax.Array):
        lost = ()
        if ring:
            mean, lost, words = around(capacity, packed)
        else:
            parts, words = scatter(packed[:, :capacity], axis_name, "shares")
            mean = quantize.mean_of(parts, lambda message: value(message, my_rows))
        new = codec.encode(mean, my_rows, again)
        (message,) = codec.pack(new, here, my_rows, capacity)
        messages, small_mean, more = gather_with(message, small, axis_name, "means")
        total = codec.value(codec.unpack(messages, shares, natural), rows)
        rest = mean - codec.value(new, my_rows)
        return total.reshape(-1), small_mean, rest, lost, words + more

    x_rows = x.reshape(-1, layout.row)
    if ring:
        packed = jnp.concatenate([x_rows, jnp.zeros_like(x_rows[:1])])  # of padding
    else:
        units, sent, own = compressor.encode(layout, x, levels, keys, own)
        packed = codec.pack(units, order, shares, capacities[0][-1])
    needed = jnp.max(jnp.asarray(codec.words(shares), jnp.int32))
    total, small, rest, lost, words = switch(needed, capacities[0], at_capacity, packed)
    if ring:
        sent = x - lost[:-1].reshape(-1)
    # What the second compression lost, its owner keeps for all.
    keep = jnp.array(feedback & np.array(codec.again))[levels][layout.row_layer]
    keep = jnp.append(keep, False)[mine[0]]
    rest = jnp.where(keep[:, None], rest, 0) * count
    sent = sent.reshape(-1, layout.row).at[mine[0]].add(-rest, mode="drop")
    return total, small, sent.reshape(-1), (shared_state, own), words


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
    _check_spacing(spacing)
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

    def mean_factors(name: str, factors: list, small, rank, ladder: list[int]):
        """All-reduces the first columns of all layers' factors."""
        flat = jnp.concatenate([f.T.reshape(-1) for f in factors])
        sizes = np.array([f.size for f in factors])
        lengths = rank * jnp.array([f.shape[0] for f in factors], jnp.int32)
        buffer = wire.to_words(wire.compact(flat, sizes, lengths, ladder[-1]))

        def at_capacity(capacity: int, buffer: jax.Array):
            (total,), *more = mean_with(buffer[:capacity], small, axis_name, name)
            return wire.fit(wire.to_floats(total), ladder[-1]), *more

        total, small, words = switch(lengths.sum(), ladder, at_capacity, buffer)
        flat = wire.expand(total, sizes, lengths)
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        means = [
            p.reshape(f.shape[::-1]).T for p, f in zip(parts, factors, strict=True)
        ]
        return means, small, words

    def mean(layout, x, gradient, small, levels, state, keys, capacities):
        del gradient, keys
        factors, own_state = state
        rank = jnp.where(levels < 0, 0, jnp.array(ranks, jnp.int32)[levels])
        layers = low_rank.matrices(layout, x)
        each = low_rank.by_shape
        q = each(low_rank.unit_scale, each(low_rank.first_columns, factors, rank))
        p = each(low_rank.product, layers, q)
        p, small, words = mean_factors("left_factors", p, small, rank, capacities[0])
        p = each(low_rank.orthogonalize, p, rank)
        # (P^T M)^T: the same as M^T P without a transposed copy of M.
        own = each(lambda m, p: low_rank.product(p.T, m).T, layers, p)
        none = jnp.zeros((0,), jnp.float32)
        q, _, more = mean_factors("right_factors", own, none, rank, capacities[1])

        restore = lambda p, q: low_rank.product(p, q.T)
        total = layout.flatten(each(restore, p, q))
        if error == "local":
            sent = layout.flatten(each(restore, p, own))
        else:
            sent = as_local(total, axis_name)  # each worker's own from here on
        kept = lambda new, old, r: jnp.where(jnp.arange(old.shape[1]) < r, new, old)
        state = each(kept, q, factors, rank), own_state
        return total, small, sent, state, words + more

    exchange = Exchange(
        name="power_sgd",
        levels=ranks,
        row=1,
        feedback=(True,) * len(ranks),
        admits=admits,
        carrier="all-reduce",
        accepts=lambda shape: bool(low_rank.admits(shape, ranks).any()),
        words=lambda layout: low_rank.words(layout, ranks),
        capacities=capacities,
        errors=lambda layout, x: low_rank.tail_energy(layout, x, ranks),
        init=lambda layout, key: low_rank.init_factors(layout, widths(layout), key),
        init_worker=lambda layout: (),
        mean=mean,
    )
    return aggregator(exchange, axis_name, **options)


def _check_spacing(spacing: float) -> None:
    if not 1 < spacing <= 2:
        raise ValueError(f"spacing must be in (1, 2], got {spacing}")
