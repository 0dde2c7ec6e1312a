"""Aggregators: local gradients in, their mean out. All collectives stand here."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gcjax import base, wire
from gcjax.base import (
    Aggregator,
    AggregatorState,
    Compressor,
    Exchange,
    Info,
    Keys,
    Layout,
    PerWorker,
    Selector,
    Words,
    WorkerState,
)
from gcjax.compressors import low_rank

# --- Collectives: one place that knows how the mappings differ. ---------------------


def checked(axis_name: str) -> bool:
    """Whether JAX tracks here what varies over workers (`shard_map`'s default).

    It does not under `vmap`, `pmap` and `check_vma=False`.
    """
    return axis_name in jax.typeof(lax.axis_index(axis_name)).manual_axis_type.varying


def gather(x: jax.Array, axis_name: str) -> tuple[jax.Array, Words]:
    """All workers' arrays, stacked, and the words that one worker contributed."""
    to = {"to": "invarying"} if checked(axis_name) else {}
    sent = Words(jnp.int32(_words(x)), jnp.int32(0))
    return lax.all_gather(x, axis_name, **to), sent


def all_reduce(x: jax.Array, axis_name: str) -> tuple[jax.Array, Words]:
    """Mean over workers, and the words that one worker contributed."""
    total = lax.psum(x, axis_name) / lax.axis_size(axis_name)
    return total, Words(jnp.int32(0), jnp.int32(_words(x)))


def _words(x: jax.Array) -> int:
    return -(-x.size * x.dtype.itemsize * 8 // wire.WORD)


def as_local(tree: Any, axis_name: str = "workers") -> Any:
    """Marks replicated parameters so that their gradients stay local.

    Under `shard_map`, `jax.grad` with respect to replicated parameters sums over the
    workers by itself, which leaves nothing to compress; differentiate with respect to
    the result of this function instead. Elsewhere it changes nothing.
    """

    def mark(x: jax.Array) -> jax.Array:
        if axis_name in jax.typeof(x).manual_axis_type.varying:
            return x
        return lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(mark, tree) if checked(axis_name) else tree


def state_specs(opt_state: Any, axis_name: str = "workers") -> Any:
    """Partition specs of an optimizer state: what belongs to each worker, what to all.

    Args:
      opt_state: Any tree that contains aggregator states, through any optax wrapper;
        arrays or `jax.ShapeDtypeStruct`s.
      axis_name: Name of the workers' axis.

    Returns:
      The same tree with `PartitionSpec(axis_name)` at per-worker leaves and
      `PartitionSpec()` at all others.
    """
    return jax.tree.map(
        lambda x: (
            jax.tree.map(lambda _: P(axis_name), x) if isinstance(x, PerWorker) else P()
        ),
        opt_state,
        is_leaf=lambda x: isinstance(x, PerWorker),
    )


def over_workers(
    fn: Callable,
    in_specs: tuple,
    out_specs: Any,
    *,
    axis_name: str = "workers",
    num_workers: int | None = None,
    mesh: Mesh | None = None,
) -> Callable:
    """Maps one worker's function over all workers, simulated or on devices.

    Args:
      fn: Function of one worker, which may use collectives over `axis_name`.
      in_specs: For each argument a spec or a tree of them: `P(axis_name)` for arrays
        `[N, ...]` with one slice for each worker, `P()` for what all share.
      out_specs: The same for the result.
      axis_name: Name of the workers' axis.
      num_workers: N simulated workers, by `jax.vmap`; with `mesh` None.
      mesh: Device mesh with the axis, one worker on each device, by `jax.shard_map`.

    Returns:
      A function of global arrays, the same ones under both mappings.
    """

    def is_spec(s: Any) -> bool:
        return isinstance(s, P)

    if mesh is None:
        axes = lambda specs: jax.tree.map(
            lambda s: 0 if axis_name in s else None, specs, is_leaf=is_spec
        )
        return jax.vmap(
            fn,
            in_axes=axes(in_specs),
            out_axes=axes(out_specs),
            axis_name=axis_name,
            axis_size=num_workers,
        )

    def each(specs: Any, tree: Any, edit: Callable) -> Any:
        full = jax.tree.broadcast(specs, tree, is_leaf=is_spec)
        return jax.tree.map(
            lambda s, x: edit(x) if axis_name in s else x, full, tree, is_leaf=is_spec
        )

    def local(*args: Any) -> Any:
        args = each(in_specs, args, lambda x: x[0])
        return each(out_specs, fn(*args), lambda x: x[None])

    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


# --- The aggregator: the step of every worker, around an exchange. ------------------


def matrices_above(size: int = 1024) -> Callable[[str, tuple[int, ...]], bool]:
    """The default rule: compress tensors of 2 or more dimensions and `size` entries."""
    return lambda path, shape: len(shape) >= 2 and int(np.prod(shape)) >= size


def aggregator(
    exchange: Exchange,
    axis_name: str = "workers",
    *,
    level: Any = None,
    compress: Callable[[str, tuple[int, ...]], bool] | None = None,
    momentum: float | None = None,
    momentum_masking: bool = True,
    local_clip: float | None = None,
    nonfinite: str = "skip",
    seed: int = 0,
    selector: Selector | None = None,
    every: int = 100,
    warmup_steps: int = 0,
) -> Aggregator:
    """The optax transformation around an exchange; every aggregator's options.

    Put it first in a chain: local clipping is its own option, global clipping, weight
    decay and the optimizer come after it. Wrappers that skip steps
    (`optax.apply_if_finite`) or accumulate (`optax.MultiSteps`) belong inside, around
    the optimizer alone: around an aggregator the former cannot be traced under
    `shard_map`, and the latter makes it communicate at every micro-step.

    Args:
      exchange: How the mean is obtained; see `compressed_mean` and `power_sgd`.
      axis_name: Name of the workers' axis.
      level: Value of the ladder for all layers, where no selector is given; may be
        left out if the ladder has one.
      compress: Rule (path, shape) -> whether a tensor is compressed, with paths such
        as "conv/kernel". Others travel uncompressed, in one buffer. Default:
        `matrices_above(1024)`.
      momentum: Momentum correction: momentum is accumulated locally, before the
        compressor (Lin et al., 2017, Deep Gradient Compression, arXiv:1712.01887,
        eq. 5-7); then use an optimizer without momentum.
      momentum_masking: Clear the local momentum of entries that were sent (eq. 8).
        With a compressor that sends every entry this clears all of it.
      local_clip: Clip each worker's gradient to the global norm `local_clip` /
        sqrt(N) before the error is added (section 3.2).
      nonfinite: What a step becomes in which some worker's gradient is not finite.
        "skip": zero updates; "report": NaN updates, for a wrapper inside to see. Both
        leave all errors, factors and levels as they were.
      seed: Seed of the random numbers of rounding and of initial factors.
      selector: Re-selects levels during training; see `adapt`.
      every: Steps between selections.
      warmup_steps: First steps, sent uncompressed.

    Returns:
      An aggregator. Its `update` takes the worker's local gradients, floats of any
      precision, and returns the mean over workers in their dtype. Errors are float32.
      `optax.tree.get(state, "info")` finds its `Info`.

    Raises:
      ValueError: for options out of range; at `init`, for a tree without parameters;
        at `update`, for gradients that JAX knows to be summed already.
    """
    if nonfinite not in ("skip", "report"):
        raise ValueError(f"nonfinite must be 'skip' or 'report', got {nonfinite!r}")
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if local_clip is not None and not local_clip > 0:
        raise ValueError(f"local_clip must be positive, got {local_clip}")
    if every < 1 or warmup_steps < 0:
        raise ValueError(
            f"every must be >= 1 and warmup_steps >= 0, got {every}, {warmup_steps}"
        )
    chosen = selector.default if selector else level
    if chosen is None and len(exchange.levels) > 1:
        chosen_index = None  # allowed until init, for `adapt` may follow
    else:
        chosen_index = (
            0 if chosen is None else base.level_index(exchange.levels, chosen)
        )
    compress = compress or matrices_above()
    any_feedback = any(exchange.feedback)
    tables = selector is not None and selector.snapshot_steps > 0
    fixed = not tables

    def split(tree: Any) -> tuple[Layout, list, list, Callable]:
        """Separates layers from dense tensors; `join` puts them together again."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat]
        is_layer = [
            bool(compress(name, x.shape)) and exchange.accepts(x.shape)
            for name, (_, x) in zip(names, flat, strict=True)
        ]
        layers = [x for (_, x), yes in zip(flat, is_layer, strict=True) if yes]
        dense = [x for (_, x), yes in zip(flat, is_layer, strict=True) if not yes]
        paths = tuple(n for n, yes in zip(names, is_layer, strict=True) if yes)
        layout = Layout(paths, tuple(x.shape for x in layers), exchange.row)

        def join(layers: list, dense: list) -> Any:
            layers, dense = iter(layers), iter(dense)
            leaves = [next(layers) if yes else next(dense) for yes in is_layer]
            return treedef.unflatten(
                [x.astype(old.dtype) for x, (_, old) in zip(leaves, flat, strict=True)]
            )

        return layout, layers, dense, join

    def default_levels(layout: Layout) -> np.ndarray:
        if chosen_index is None:
            raise ValueError(
                f"{exchange.name} has {len(exchange.levels)} levels and neither a "
                "selector nor a level; pass level=, or wrap it with gcjax.adapt"
            )
        admitted = exchange.admits(layout)
        if layout.num_layers and not admitted[:, chosen_index].any():
            raise ValueError(
                f"{exchange.name}: level {exchange.levels[chosen_index]} is not "
                "admitted for any layer; with error_feedback=True only contractions are"
            )
        return _nearest(admitted)[:, chosen_index]

    def lengths(layout: Layout) -> list[list[int]]:
        default = default_levels(layout)
        if fixed:
            return exchange.capacities(layout, default, default)
        largest = np.full_like(default, len(exchange.levels) - 1)
        return exchange.capacities(
            layout, None, default if selector.shrinks else largest
        )

    def init(params: Any) -> AggregatorState:
        if not jax.tree.leaves(params):
            raise ValueError("the parameter tree is empty; there is nothing to train")
        layout, *_ = split(params)
        zeros = lambda used: jnp.zeros(layout.size, jnp.float32) if used else ()
        levels = jnp.asarray(default_levels(layout), jnp.int32)
        no_words = Words(jnp.int32(0), jnp.int32(0))
        return AggregatorState(
            worker=PerWorker(
                WorkerState(zeros(any_feedback), zeros(momentum), zeros(tables))
            ),
            step=jnp.int32(0),
            levels=levels,
            selector=selector.init(layout.num_layers) if selector else (),
            exchange=exchange.init(layout, jax.random.key(seed)),
            info=Info(levels, no_words, jnp.bool(False), jnp.int32(0), jnp.int32(0)),
        )

    def update(
        grads: Any, state: AggregatorState, params: Any = None, **extra: Any
    ) -> tuple[Any, AggregatorState]:
        del params, extra
        _refuse_summed(grads, axis_name)
        layout, layers, dense, join = split(grads)
        error, velocity, snapshot = state.worker.value
        if local_clip is not None:
            layers, dense = _clip((layers, dense), local_clip, axis_name)

        # 1. Small tensors, and whether any worker's gradient is not finite.
        dense_mean, ok, sent_words = mean_dense(dense, layers, axis_name)

        # 2. What enters the compressor: gradient (with momentum) + error.
        x = jnp.where(ok, layout.flatten(layers), 0)
        if momentum is not None:
            x = new_velocity = momentum * velocity + x
        if any_feedback:
            x = x + error

        # 3. Levels, from the snapshot of the steps before.
        levels, selector_state, selections = state.levels, state.selector, 0
        if tables and layout.num_layers:
            levels, selector_state, words, due = reselect(layout, state, snapshot)
            sent_words, selections = sent_words + words, due.astype(jnp.int32)
            snapshot = _snapshot(state.step, snapshot, x, every, selector)

        # 4. The mean over workers, and this worker's part in it.
        mean, sent, exchange_state, words = exchanged(layout, x, levels, state)
        sent_words += words

        # 5. What was not sent is this worker's new error.
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        if any_feedback:
            error = keep(_residual(layout, x - sent, levels, exchange.feedback), error)
        if momentum is not None:
            if momentum_masking:
                new_velocity = jnp.where(sent == 0, new_velocity, 0)
            velocity = keep(new_velocity, velocity)
        bad = 0.0 if nonfinite == "skip" else jnp.nan
        mean = [jnp.where(ok, m, bad) for m in layout.unflatten(mean)]
        dense_mean = [jnp.where(ok, m, bad) for m in dense_mean]
        info = Info(
            levels,
            sent_words,
            state.step < warmup_steps,
            state.info.skipped + jnp.where(ok, 0, 1),
            state.info.selections + selections,
        )
        return join(mean, dense_mean), AggregatorState(
            worker=PerWorker(WorkerState(error, velocity, snapshot)),
            step=state.step + 1,
            levels=levels,
            selector=selector_state,
            exchange=keep(exchange_state, state.exchange),
            info=info,
        )

    def reselect(layout: Layout, state: AggregatorState, snapshot: jax.Array):
        """Selects levels anew if it is time."""
        admitted = exchange.admits(layout)
        if selector.levels is not None:
            wanted = [base.level_index(exchange.levels, v) for v in selector.levels]
            admitted = admitted & np.isin(np.arange(admitted.shape[1]), wanted)
            admitted = admitted | (~admitted.any(1, keepdims=True))
        nearest = _nearest(admitted)
        words = np.take_along_axis(exchange.words(layout), nearest, 1)
        capacities = lengths(layout)
        due = (state.step > 0) & (state.step % every == 0)
        due &= state.step >= warmup_steps

        def select(_: Any):
            errors = exchange.errors(layout, snapshot)
            errors, words_sent = _mean_table(errors, selector.worker, axis_name)
            errors = jnp.take_along_axis(errors, jnp.asarray(nearest), 1)
            default = jnp.asarray(default_levels(layout), jnp.int32)
            new, selector_state = selector.update(
                errors, words, default, capacities, state.selector
            )
            usable = jnp.all(new >= 0)
            new = _at(nearest, jnp.maximum(new, 0))
            levels = jnp.where(usable, new, state.levels)
            return levels, selector_state, words_sent

        def keep(_: Any):
            return state.levels, state.selector, Words(jnp.int32(0), jnp.int32(0))

        return *lax.cond(due, select, keep, None), due

    def exchanged(layout: Layout, x: jax.Array, levels: Any, state: AggregatorState):
        """Mean over workers: uncompressed during the warm-up, then by the exchange."""
        if not layout.num_layers:
            return x, x, state.exchange, Words(jnp.int32(0), jnp.int32(0))
        shared = jax.random.fold_in(jax.random.key(seed), state.step)
        own = jax.random.fold_in(shared, lax.axis_index(axis_name) + 1)
        fixed_levels = default_levels(layout) if fixed else None

        def compressed(x: jax.Array):
            return exchange.mean(
                layout,
                x,
                jnp.asarray(fixed_levels, jnp.int32) if fixed else levels,
                state.exchange,
                Keys(jax.random.fold_in(shared, 0), own),
                lengths(layout),
            )

        def uncompressed(x: jax.Array):
            layers = [m.reshape(-1) for m in layout.unflatten(x)]
            mean, words = all_reduce(jnp.concatenate(layers), axis_name)
            ends = np.cumsum(layout.sizes)[:-1]
            return layout.flatten(jnp.split(mean, ends)), x, state.exchange, words

        if not warmup_steps:
            return compressed(x)
        return lax.cond(state.step < warmup_steps, uncompressed, compressed, x)

    def rebuild(**selection: Any) -> Aggregator:
        return aggregator(
            exchange,
            axis_name,
            compress=compress,
            momentum=momentum,
            momentum_masking=momentum_masking,
            local_clip=local_clip,
            nonfinite=nonfinite,
            seed=seed,
            **selection,
        )

    return Aggregator.make(
        init,
        update,
        exchange=exchange,
        layout=lambda params: split(params)[0],
        rebuild=rebuild,
    )


def adapt(
    aggregator: Aggregator,
    selector: Selector,
    every: int = 100,
    warmup_steps: int = 0,
) -> Aggregator:
    """Lets a selector choose the level of every layer, again and again.

    Args:
      aggregator: From `compressed_mean`, `power_sgd` or `aggregator`.
      selector: From `lgreco` or `uniform`.
      every: Steps between selections. They take place at steps that are multiples of
        it, after the warm-up; until the first one all layers are at the default.
      warmup_steps: First steps, sent uncompressed. The papers warm up for at least as
        long as the learning rate does.

    Returns:
      An aggregator. Its levels are data: one compilation serves the whole run.

    Raises:
      ValueError: if the selector names a value that is not on the ladder, or `every`
        or `warmup_steps` is out of range.
    """
    if not isinstance(aggregator, Aggregator):
        raise ValueError(
            "adapt needs an aggregator such as gcjax.compressed_mean(...), got "
            f"{type(aggregator).__name__}; optax transformations come after it in a chain"
        )
    return aggregator.rebuild(selector=selector, every=every, warmup_steps=warmup_steps)


def mean_dense(
    dense: list[jax.Array], layers: list[jax.Array], axis_name: str
) -> tuple[list[jax.Array], jax.Array, Words]:
    """Mean of the uncompressed tensors, and whether all gradients are finite.

    One all-reduce: the flag rides along as one more number.
    """
    finite = [jnp.all(jnp.isfinite(x)) for x in [*dense, *layers]]
    bad = 1 - jnp.stack(finite).all().astype(jnp.float32)
    flat = [x.reshape(-1).astype(jnp.float32) for x in dense]
    total, words = all_reduce(jnp.concatenate([*flat, bad[None]]), axis_name)
    ends = np.cumsum([x.size for x in dense], dtype=int)
    *means, bad = jnp.split(total, ends)
    means = [m.reshape(x.shape) for m, x in zip(means, dense, strict=True)]
    return means, bad[0] == 0, words


def _clip(tree: Any, limit: float, axis_name: str) -> Any:
    norm = optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
    limit = limit / np.sqrt(lax.axis_size(axis_name))
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, np.float32(1e-30)))
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), tree)


def _snapshot(step, snapshot, x, every: int, selector: Selector) -> jax.Array:
    """Sums what enters the compressor over the last steps before a selection."""
    phase, start = step % every, max(0, every - selector.snapshot_steps)
    return lax.cond(
        phase >= start,
        lambda s, x: jnp.where(phase == start, 0, s) + x,
        lambda s, x: s,
        snapshot,
        x,
    )


def _mean_table(errors: jax.Array, worker: int | None, axis_name: str):
    if worker is None:
        return all_reduce(errors, axis_name)
    chosen = jnp.where(lax.axis_index(axis_name) == worker, errors, 0)
    mean, words = all_reduce(chosen, axis_name)
    return mean * lax.axis_size(axis_name), words


def _residual(layout: Layout, rest: jax.Array, levels, feedback) -> jax.Array:
    """The part of what was not sent that error feedback keeps."""
    if all(feedback) or not layout.num_layers:
        return rest
    on = jnp.array(feedback)[levels][layout.row_layer]
    return jnp.where(on[:, None], rest.reshape(-1, layout.row), 0).reshape(-1)


def _nearest(admitted: np.ndarray) -> np.ndarray:
    """For each level the nearest admitted one of its layer, int[L, V]."""
    count = admitted.shape[1]
    distance = np.abs(np.arange(count)[:, None] - np.arange(count)[None, :])
    far = np.where(admitted[:, None, :], distance[None], 10 * count)
    return np.argmin(far, axis=2)


def _refuse_summed(grads: Any, axis_name: str) -> None:
    if not checked(axis_name):
        return
    for path, x in jax.tree_util.tree_flatten_with_path(grads)[0]:
        if axis_name not in jax.typeof(x).manual_axis_type.varying:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"gradient {name} is the same on all workers of {axis_name!r}: it was "
                "summed already and there is nothing to compress. Differentiate with "
                "respect to gcjax.as_local(params) instead of params"
            )


# --- The exchanges. ------------------------------------------------------------------


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
            return [[int(_at(words, fixed).sum())]]
        low, high = int(words.min(1).sum()), int(_at(words, largest).sum())
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
                total, words = all_reduce(wire.to_floats(message), axis_name)
                messages = wire.to_words(total)[None]
            else:
                messages, words = gather(message, axis_name)
            return compressor.decode(layout, messages, levels, shared), words

        needed = _at(compressor.words(layout), levels).sum()
        total, words = _switch(needed, ladder, at_capacity, message, shared)
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
        the same, but each worker's error then also collects what it differs by from
        the mean, without bound.
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
        allowed = np.array(ranks)[_nearest(admits(layout))]  # [L, V]
        ladders = []
        for side in sides(layout):
            words = side[:, None] * allowed
            if fixed is not None:
                ladders.append([int(_at(words, fixed).sum())])
                continue
            # A side alone may grow although both together shrink.
            low, high = int(words.min(1).sum()), int(words.max(1).sum())
            ladders.append(wire.capacity_ladder(low, high, words.sum(0), spacing))
        return ladders

    def mean_factors(factors: list, rank: jax.Array, ladder: list[int]):
        """All-reduces the first columns of all layers' factors."""
        flat = jnp.concatenate([f.T.reshape(-1) for f in factors])
        sizes = np.array([f.size for f in factors])
        lengths = rank * jnp.array([f.shape[0] for f in factors], jnp.int32)
        buffer = wire.compact(flat, sizes, lengths, ladder[-1])

        def at_capacity(capacity: int, buffer: jax.Array):
            total, words = all_reduce(buffer[:capacity], axis_name)
            return wire.fit(total, ladder[-1]), words

        total, words = _switch(lengths.sum(), ladder, at_capacity, buffer)
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
        q = each(low_rank.first_columns, state, rank)
        p, words = mean_factors(each(low_rank.product, layers, q), rank, capacities[0])
        p = each(low_rank.orthogonalize, p, rank)
        own = each(lambda m, p: low_rank.product(m.T, p), layers, p)
        q, more = mean_factors(own, rank, capacities[1])

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


def _at(table: np.ndarray, levels: Any) -> Any:
    """Each layer's entry of a static table [L, V]."""
    if isinstance(levels, np.ndarray):
        return np.take_along_axis(table, levels[:, None], 1)[:, 0]
    table = jnp.asarray(table, jnp.int32)
    return jnp.take_along_axis(table, levels[:, None], 1)[:, 0]


def _switch(needed: jax.Array, ladder: list[int], at_capacity: Callable, *args: Any):
    """Calls `at_capacity` with the least capacity of a ladder that suffices.

    The index must be the same on all workers: a collective stands in the branch.
    """
    if len(ladder) == 1:
        return at_capacity(ladder[0], *args)
    branches = [lambda *a, c=c: at_capacity(c, *a) for c in ladder]
    index = jnp.searchsorted(jnp.array(ladder, jnp.int32), needed)
    return lax.switch(index, branches, *args)
