"""The parameter server: a weighted mean to which each worker sends what it is granted.

How much that is an `Allocation` says (`gcjax.allocation`); here it travels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import wire
from gcjax.aggregate import aggregator
from gcjax.allocation import Allocation, view
from gcjax.base import Aggregator, Compressor, Exchange, Keys, Layout
from gcjax.collectives import every_workers, gather, no_words, send, size, switch
from gcjax.compressors import sparsify
from gcjax.workers import checked


def parameter_server(
    allocation: Allocation,
    weights: Sequence[float],
    axis_name: str = "workers",
    *,
    to: str = "server",
    download: Compressor | None = None,
    coefficients: Sequence[float] | None = None,
    opwa: tuple[float, int] | None = None,
    participants: int | Sequence[Sequence[bool]] | None = None,
    **options: Any,
) -> Aggregator:
    """Weighted mean of sparse gradients whose sizes differ from worker to worker.

    Worker i sends the entries that the allocation grants it, and keeps the rest in its
    error; the server adds up weights[i] times what it received, and sends the sum back.

    Over devices or processes every upload is a message of its own from its worker to
    the server, of its own length, and so is every download. The server is the last
    position on the axis, after the n workers; its own gradient is ignored. Map with
    `check_vma=False`: JAX cannot know that what all receive is the same. Simulated
    workers (`jax.vmap`) need no such position; the sum is made from what each of them
    sent, and the same lengths are counted.

    Args:
      allocation: How much each of n workers sends; see `gcjax.allocation`.
      weights: p, one number per worker, not negative: its part in the objective, e.g.
        how many samples it has. Divided by their sum.
      axis_name: Name of the workers' axis.
      to: "server"; or "all", without one: each worker sends its message to each other.
      download: Compressor, with one level, of what the server sends, with an error of
        the server's own where it is a contraction; None: float32.
      coefficients: Weights in the server's sum, where they differ from `weights`.
      opwa: (gamma, overlap): entries of the sum that at most `overlap` workers sent are
        multiplied by gamma.
      participants: How many workers take part in a round, drawn at random; or who does,
        bool[rounds, n], over again after the last row; None: all. Their weights are
        normalised anew. The others send nothing and keep all in their errors.
      **options: See `aggregator`. By default all tensors are compressed.

    Returns:
      An aggregator; its `Info.words.uploaded` int32[n] says what each worker sent.
    Raises:
      ValueError: for options out of range; at `update`, where the axis has not as many
        positions, or JAX tracks what varies over it.
    References: Lu et al., 2023, Data-Aware Gradient Compression for DML in
      Communication-Constrained Mobile Computing, arXiv:2311.07324, Algorithm 1; Tang et
      al., 2024, Bandwidth-Aware and Overlap-Weighted Compression for
      Communication-Efficient Federated Learning, arXiv:2408.14736 (OPWA, of which only
      the abstract was available: the form and its two parameters are our reading).
    """
    weights = _shares(weights, "weights")
    count = len(weights)
    used = weights if coefficients is None else _shares(coefficients, "coefficients")
    if not len(used) == count == allocation.num_workers:
        raise ValueError(
            f"parameter_server: {count} weights, {len(used)} coefficients and an "
            f"allocation to {allocation.num_workers} workers do not go together"
        )
    if to not in ("server", "all"):
        raise ValueError(f"parameter_server: to must be 'server' or 'all', got {to!r}")
    draw = _participation(participants, used)
    absences = participants is not None
    if download is not None and (to == "all" or len(download.levels) > 1):
        raise ValueError(
            "parameter_server: a download needs a server and a compressor of one level"
        )
    if opwa is not None and not (opwa[0] > 0 and 0 <= opwa[1] <= count):
        raise ValueError(
            f"parameter_server: opwa must be (gamma > 0, overlap in 0..{count}), got "
            f"{opwa}"
        )

    def mean(layout, x, gradient, small, levels, state, keys, capacities):
        del capacities
        (round_, allocated, *server), own = state
        on_devices = _on_devices(axis_name, count, to)
        present, part = draw(round_, keys)

        # 1. What this worker sends, and how many entries all others do.
        mask, mine, counts, words = _select(
            allocation, layout, x, allocated, present, axis_name
        )
        units, sent = sparsify.keep(x, mask)

        # 2. The weighted sum.
        seen = view(allocation.per_layer, layout)
        ladders = _ladders(allocation, layout, absences)
        needed = jax.vmap(lambda k: jnp.sum(sparsify.indexed_words(seen, k)[0]))(counts)
        if on_devices:
            receive = _receive(
                seen, units, mine, small, counts, needed, ladders, to, axis_name
            )
            total = _add_up(layout, small, part, receive, unrolled=True)
        else:
            hats, smalls = (
                every_workers(sent, axis_name),
                every_workers(small, axis_name),
            )
            receive = lambda i, add, sums: add(sums, hats[i], smalls[i])
            total = _add_up(layout, small, part, receive, unrolled=False)
        total, overlap, small = total
        if opwa is not None:
            gamma, most = opwa
            total = jnp.where((overlap > 0) & (overlap <= most), gamma * total, total)

        # 3. And back. The server's own state is a worker's where there is a server.
        words += no_words()._replace(
            uploaded=_lengths(ladders, needed, small)
            * (count - 1 if to == "all" else 1)
        )
        if to == "server":
            memory = own if on_devices else server
            total, small, memory, more = _send_back(
                download, layout, total, small, levels, memory, keys,
                axis_name, count if on_devices else None,
            )  # fmt: skip
            own, server = (memory, server) if on_devices else (own, memory)
            words += more

        # 4. What the allocation learns.
        due = round_ % allocation.every == 0
        reports, more = _reports(allocation, layout, gradient, due, count, axis_name)
        allocated = allocation.update(layout, allocated, counts, reports, due)
        return total, small, sent, ((round_ + 1, allocated, *server), own), words + more

    def memory(layout: Layout) -> tuple:
        error = jnp.zeros((layout.size,), jnp.float32)
        return (download.init(layout), error) if download else ()

    exchange = Exchange(
        name=f"parameter_server {allocation.name}",
        levels=(allocation.name,),
        row=sparsify.ROW,
        feedback=(True,),
        admits=lambda layout: np.ones((layout.num_layers, 1), bool),
        carrier="uploads",
        accepts=lambda shape: True,
        words=lambda layout: layout.sizes[:, None],
        capacities=lambda layout, fixed, largest: [],
        errors=None,
        init=lambda layout, key: (
            jnp.int32(0),
            allocation.init(layout),
            *memory(layout),
        ),
        init_worker=memory,
        mean=mean,
        weights=tuple(weights.tolist()),
        server=to == "server",
    )
    options = {"compress": lambda path, shape: True} | options
    return aggregator(exchange, axis_name, **options)


def _shares(values: Sequence[float], name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    valid = values.ndim == 1 and np.all(np.isfinite(values) & (values >= 0))
    if not valid or not values.sum() > 0:
        raise ValueError(
            f"parameter_server: {name} must be one number per worker, not negative and "
            f"not all zero, got {np.array2string(values, threshold=8)}"
        )
    return values / values.sum()


def _on_devices(axis_name: str, count: int, to: str) -> bool:
    """Whether workers are devices, and not simulated."""
    devices = axis_name in jax.sharding.get_abstract_mesh().manual_axes
    wanted = count + (devices and to == "server")
    if lax.axis_size(axis_name) != wanted:
        raise ValueError(
            f"parameter_server: {count} workers{' and the server' * (wanted > count)} "
            f"take {wanted} positions, axis {axis_name!r} has "
            f"{lax.axis_size(axis_name)}"
        )
    if checked(axis_name):
        raise ValueError(
            "parameter_server: JAX cannot know that all receive the same; map with "
            "jax.shard_map(..., check_vma=False)"
        )
    return devices


def _participation(participants: Any, weights: np.ndarray) -> Callable:
    """Makes (round, keys) -> who takes part, bool[n], and their weights float32[n]."""
    count, part = len(weights), np.asarray(weights, np.float32)
    if participants is None:
        return lambda round_, keys: (jnp.ones(count, bool), jnp.asarray(part))
    table = np.asarray(participants)
    number = table.ndim == 0 and table.dtype != bool and 1 <= table <= count
    rows = table.ndim == 2 and table.dtype == bool and table.shape[1] == count
    if not (number or (rows and len(table))):
        raise ValueError(
            f"parameter_server: participants must be a number in 1..{count} or "
            f"bool[rounds, {count}], got {np.array2string(table, threshold=8)}"
        )

    def draw(round_: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
        if number:
            present = jax.random.permutation(keys.shared, count) < table
        else:
            present = jnp.asarray(table)[round_ % len(table)]
        kept = jnp.where(present, part, 0)
        return present, kept / jnp.maximum(jnp.sum(kept), np.float32(1e-30))

    return draw


def _select(allocation, layout, x, state, present, axis_name):
    """Mask of what this worker sends, entries in it, all workers' entries, words."""
    seen, count = view(allocation.per_layer, layout), allocation.num_workers
    me = lax.axis_index(axis_name)  # the server, if there is one, comes last
    wanted = allocation.decide(layout, state)
    if allocation.relative:
        counts = jnp.where(present[:, None], wanted, 0)
        mine = jnp.pad(counts, ((0, 1), (0, 0)))[me]
        mask = sparsify.largest(seen, sparsify.magnitudes(seen, x), mine)
        return mask, mine, counts, no_words()
    least = jnp.where(present, wanted, jnp.inf)
    least = jnp.append(least, jnp.inf)[me]
    mask = wire.pack_bits(jnp.abs(x) >= least)
    room = jnp.asarray(allocation.room(layout), jnp.int32)
    mask = sparsify.first_of_each_layer(seen, mask, room)
    bits = lax.population_count(mask).astype(jnp.int32)
    mine = seen.sum_rows(jnp.sum(bits.reshape(seen.num_rows, -1), axis=1))
    counts, words = gather(mine, axis_name, "counts")
    return mask, mine, counts[:count], words


def _ladders(allocation, layout, absences) -> np.ndarray:
    """Lengths that each worker's upload may have, int[n, any], the last repeated."""
    ladders = [
        sorted({0, *lengths} if absences else {*lengths})
        for lengths in allocation.lengths(layout)
    ]
    most = max(len(ladder) for ladder in ladders)
    return np.array([x + x[-1:] * (most - len(x)) for x in ladders])


def _lengths(ladders: np.ndarray, needed: jax.Array, small: jax.Array) -> jax.Array:
    """Words of each worker's upload, int32[n]."""
    table = jnp.asarray(ladders, jnp.int32)
    index = jnp.sum(table < needed[:, None], axis=1)
    return jnp.take_along_axis(table, index[:, None], 1)[:, 0] + small.size


def _receive(seen, units, mine, small, counts, needed, ladders, to, axis_name):
    """Makes (i, add, sums) -> sums, to which what worker i sends is added."""
    count, me = len(ladders), lax.axis_index(axis_name)
    message = sparsify.pack_indexed(seen, units, mine, int(ladders.max()))
    message = jnp.concatenate([wire.to_words(small), message])

    def receive(i: int, add, sums):
        lengths = sorted({*ladders[i].tolist()})
        targets = [count] if to == "server" else [j for j in range(count) if j != i]

        def at_length(length: int, message: jax.Array) -> jax.Array:
            part = message[: small.size + length]
            got = sum(send(part, i, j, axis_name, f"from_{i}_to_{j}") for j in targets)
            return jnp.pad(got, (0, lengths[-1] - length))

        got = switch(needed[i], lengths, at_length, message)
        if to == "all":
            got = jnp.where(me == i, message[: got.size], got)

        def decode(sums):
            hat = jnp.zeros((seen.size,), jnp.float32)
            if lengths[-1]:
                add_to = sparsify.adder(seen, counts[i], lengths[-1], bitmaps=True)
                hat = add_to(got[small.size :], hat, 1.0)
            return add(sums, hat, wire.to_floats(got[: small.size]))

        if to == "all":
            return decode(sums)
        return lax.cond(me == count, decode, lambda sums: sums, sums)

    return receive


def _add_up(layout, small, part, receive, unrolled: bool) -> tuple:
    """Sums over workers, in their order: of x_hat, of who sent what, of small tensors.

    Over devices and simulated it is the same arithmetic.
    """

    def of_worker(i: int, sums: tuple) -> tuple:
        def add(sums: tuple, hat: jax.Array, small: jax.Array) -> tuple:
            total, overlap, small_total = sums
            weight = part[i]
            # An absent worker's part may be anything.
            small = jnp.where(weight > 0, weight * small, 0)
            overlap = overlap + (hat != 0).astype(jnp.int32)
            return total + weight * hat, overlap, small_total + small

        return receive(i, add, sums)

    nothing = jnp.zeros((layout.size,), jnp.float32)
    sums = nothing, nothing.astype(jnp.int32), jnp.zeros_like(small)
    if not unrolled:
        return lax.fori_loop(0, part.size, of_worker, sums)
    for i in range(part.size):
        sums = of_worker(i, sums)
    return sums


def _send_back(
    download, layout, total, small, levels, memory, keys, axis_name, server: int | None
):
    """What all use of the server's sum: (mean, small tensors, memory, words)."""
    if download is None:
        flat = [m.reshape(-1) for m in layout.unflatten(total)]
        body = wire.to_words(jnp.concatenate(flat))
    else:
        state, error = memory
        total = total + error
        both = Keys(keys.shared, keys.shared)  # as simulated workers all draw the same
        units, hat, state = download.encode(layout, total, levels, both, state)
        length = int(download.words(layout).sum())
        body, shared = download.pack(layout, units, levels, length)
        error = layout.clear_padding(total - hat) if download.contraction[0] else error
        memory = (state, error)
    message = jnp.concatenate([wire.to_words(small), body])
    if server is not None:
        names = [f"back_to_{i}" for i in range(server)]
        sent = [send(message, server, i, axis_name, n) for i, n in enumerate(names)]
        # Of these sums at most one term is not zero, and at the server none.
        here = lax.axis_index(axis_name) == server
        message = jnp.where(here, message, sum(sent))
    body, small = message[small.size :], wire.to_floats(message[: small.size])
    if download is None:
        parts = jnp.split(wire.to_floats(body), np.cumsum(layout.sizes)[:-1])
        total = layout.flatten(parts)
    else:
        total = download.decode(layout, body[None], levels, shared)
    return total, small, memory, no_words()._replace(downloaded=size(message))


def _reports(allocation, layout, gradient, due, count, axis_name):
    """What workers tell each other, float32[n, M], and words for it."""
    if allocation.report is None:
        return jnp.zeros((count, 0), jnp.float32), no_words()
    report = lambda g: gather(allocation.report(layout, g), axis_name, "reports")
    if allocation.every > 1:
        shape = jax.eval_shape(report, gradient)
        zeros = lambda g: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        reports, words = lax.cond(due, report, zeros, gradient)
    else:
        reports, words = report(gradient)
    return reports[:count], words
