"""Aggregators: local gradients in, their mean out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gcjax import base, wire
from gcjax.base import (
    Aggregator,
    AggregatorState,
    Exchange,
    Info,
    Keys,
    Layout,
    PerWorker,
    Problem,
    Selector,
    WorkerState,
)
from gcjax.collectives import all_reduce, no_words, switch
from gcjax.workers import checked

DENSE = -1  # the level of a layer that travels uncompressed


# --- The aggregator: an optax transformation around an exchange. ----------------------


def matrices_above(size: int = 1024) -> Callable[[str, tuple[int, ...]], bool]:
    """The default rule: compress tensors of 2 or more dimensions and `size` entries."""
    return lambda path, shape: len(shape) >= 2 and int(np.prod(shape)) >= size


class Options(NamedTuple):
    """What `aggregator` was called with."""

    exchange: Exchange
    axis_name: str
    level: Any
    compress: Callable[[str, tuple[int, ...]], bool]
    momentum: float | None
    momentum_masking: bool
    local_clip: float | None
    nonfinite: str
    seed: int
    shard_axis: str | None
    selector: Selector | None = None
    every: int = 100
    warmup_steps: int = 0

    @property
    def adaptive(self) -> bool:
        """Whether levels change during the run."""
        return self.selector is not None and self.selector.snapshot_steps > 0


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
    shard_axis: str | None = None,
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
        left out if the ladder has one value.
      compress: Rule (path, shape) -> whether a tensor is compressed, with paths such
        as "conv/kernel". Others travel uncompressed, in one buffer. Default:
        `matrices_above(1024)`.
      momentum: Momentum correction: momentum is accumulated locally, before the
        compressor (Lin et al., 2017, Deep Gradient Compression, arXiv:1712.01887,
        eq. 5-7); then use an optimizer without momentum. Tensors that travel
        uncompressed get none of it.
      momentum_masking: Clear the local momentum of entries that were sent (eq. 8).
        With a compressor that sends every entry this clears all of it.
      local_clip: Clip each worker's gradient to the global norm `local_clip` /
        sqrt(N) before the error is added (section 3.2).
      nonfinite: What a step becomes in which some worker's gradient is not finite.
        "skip": zero updates; "report": NaN updates, for a wrapper inside to see. Both
        leave all errors, factors and levels as they were.
      seed: Seed of the random numbers of rounding and of initial factors.
      shard_axis: Where parameters are sharded over a second axis of the mesh (HSDP) and
        `axis_name` is that of the replicas: the name of the second one. Gradients are
        then the mean within a group of shards already, each device has its shard, and
        compresses it along `axis_name` alone; layers are shards of tensors. Steps are
        skipped and levels chosen for all shards at once.

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
    compress = compress or matrices_above()
    options = (momentum, momentum_masking, local_clip, nonfinite, seed, shard_axis)
    return _build(Options(exchange, axis_name, level, compress, *options))


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
            f"{type(aggregator).__name__}; put optax transformations after it"
        )
    if every < 1 or warmup_steps < 0:
        raise ValueError(
            f"every must be >= 1 and warmup_steps >= 0, got {every}, {warmup_steps}"
        )
    return aggregator.rebuild(
        level=selector.default,
        selector=selector,
        every=every,
        warmup_steps=warmup_steps,
    )


def _build(options: Options) -> Aggregator:
    if options.level is not None:  # a value that is not on the ladder fails here
        base.level_index(options.exchange.levels, options.level)
    if options.exchange.weights is not None and (
        options.adaptive or options.warmup_steps or options.shard_axis
    ):
        raise ValueError(
            f"{options.exchange.name}: it allocates by itself and takes no selector of "
            "levels, no uncompressed warm-up and no shard_axis"
        )
    for value in (options.selector and options.selector.levels) or ():
        base.level_index(options.exchange.levels, value)
    return Aggregator.make(
        functools.partial(_init, options),
        functools.partial(update, options),
        exchange=options.exchange,
        layout=lambda params: split(options, params)[0],
        rebuild=lambda **changed: _build(options._replace(**changed)),
    )


def _init(options: Options, params: Any) -> AggregatorState:
    if not jax.tree.leaves(params):
        raise ValueError("the parameter tree is empty; there is nothing to train")
    exchange, selector = options.exchange, options.selector
    layout, *_ = split(options, params)
    if not layout.num_layers and _wanted(options, params):
        raise ValueError(
            f"{exchange.name}: none of the tensors to be compressed admits a level of "
            f"{list(exchange.levels)}; a rank must be below half of their sides or so"
        )
    zeros = lambda used: jnp.zeros(layout.size, jnp.float32) if used else ()
    worker = WorkerState(
        error=zeros(any(exchange.feedback)),
        velocity=zeros(options.momentum is not None),
        snapshot=zeros(options.adaptive),
        compressor=exchange.init_worker(layout),
    )
    levels = jnp.asarray(default_levels(options, layout), jnp.int32)
    words = no_words()
    if exchange.weights is not None:
        each = jnp.zeros((len(exchange.weights),), jnp.int32)
        words = words._replace(uploaded=each)
    return AggregatorState(
        worker=PerWorker(worker),
        step=jnp.int32(0),
        levels=levels,
        selector=selector.init(layout.num_layers) if selector else (),
        exchange=exchange.init(layout, jax.random.key(options.seed)),
        info=Info(levels, words, jnp.bool(False), jnp.int32(0), jnp.int32(0)),
    )


def _wanted(options: Options, params: Any) -> bool:
    """Whether the rule wants any tensor compressed."""
    everything = options.exchange._replace(accepts=lambda shape: True)
    return split(options._replace(exchange=everything), params)[0].num_layers > 0


# --- The step of every worker. --------------------------------------------------------


def update(
    options: Options,
    grads: Any,
    state: AggregatorState,
    params: Any = None,
    **extra: Any,
) -> tuple[Any, AggregatorState]:
    """Local gradients -> mean over workers, as an optax `update`."""
    del params, extra
    exchange, axis_name = options.exchange, options.axis_name
    _refuse_summed(grads, axis_name)
    layout, layers, dense, join = split(options, grads)
    error, velocity, snapshot, memory = state.worker.value
    if options.local_clip is not None:
        layers, dense = _clip((layers, dense), options.local_clip, axis_name)

    # 1. Small tensors, and whether this worker's gradient is finite.
    small, finite = join_small(dense, layers)

    # 2. What enters the compressor: gradient (with momentum) + error.
    x = jnp.where(finite, layout.flatten(layers), 0)
    if options.momentum is not None:
        x = new_velocity = options.momentum * velocity + x
    fresh = x
    if any(exchange.feedback):
        x = x + error

    # 3. Levels, from the snapshot of the steps before.
    levels, selector_state, selected = state.levels, state.selector, jnp.bool(False)
    words = no_words()
    if options.adaptive and layout.num_layers:
        levels, selector_state, words, selected = reselect(options, layout, state)

    # 4. The mean over workers, and this worker's part in it.
    mean, small, sent, new_states, more = exchanged(
        options, layout, x, fresh, small, levels, state
    )
    words += more
    dense_mean, ok = part_small(small, dense)
    if options.shard_axis is not None:
        bad, more = all_reduce(jnp.where(ok, 0.0, 1.0), options.shard_axis, "finite")
        ok, words = bad == 0, words + more

    # 5. What was not sent is this worker's new error.
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    if any(exchange.feedback):
        rest = layout.clear_padding(x - sent)
        error = keep(_residual(layout, rest, levels, exchange.feedback), error)
    if options.momentum is not None:
        if options.momentum_masking:
            new_velocity = jnp.where(sent == 0, new_velocity, 0)
        velocity = keep(new_velocity, velocity)
    if options.adaptive:
        sample = x if options.selector.corrected else fresh
        snapshot = _snapshot(options, state.step, snapshot, jnp.where(ok, sample, 0))
    shared, memory = keep(new_states, (state.exchange, memory))
    bad = 0.0 if options.nonfinite == "skip" else jnp.nan
    mean = [jnp.where(ok, m, bad) for m in layout.unflatten(mean)]
    dense_mean = [jnp.where(ok, m, bad) for m in dense_mean]
    info = Info(
        levels,
        words,
        state.step < options.warmup_steps,
        state.info.skipped + jnp.where(ok, 0, 1),
        state.info.selections + selected.astype(jnp.int32),
    )
    return join(mean, dense_mean), AggregatorState(
        worker=PerWorker(WorkerState(error, velocity, snapshot, memory)),
        step=state.step + 1,
        levels=levels,
        selector=selector_state,
        exchange=shared,
        info=info,
    )


def split(options: Options, tree: Any) -> tuple[Layout, list, list, Callable]:
    """Separates layers from dense tensors; `join` puts them together again."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat]
    leaves = [x for _, x in flat]
    is_layer = [
        bool(options.compress(name, x.shape)) and options.exchange.accepts(x.shape)
        for name, x in zip(names, leaves, strict=True)
    ]
    layers = [x for x, yes in zip(leaves, is_layer, strict=True) if yes]
    dense = [x for x, yes in zip(leaves, is_layer, strict=True) if not yes]
    paths = tuple(n for n, yes in zip(names, is_layer, strict=True) if yes)
    layout = Layout(paths, tuple(x.shape for x in layers), options.exchange.row)

    def join(layers: list, dense: list) -> Any:
        layers, dense = iter(layers), iter(dense)
        joined = [next(layers) if yes else next(dense) for yes in is_layer]
        pairs = zip(joined, leaves, strict=True)
        return treedef.unflatten([x.astype(old.dtype) for x, old in pairs])

    return layout, layers, dense, join


def join_small(
    dense: list[jax.Array], layers: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The uncompressed tensors in one vector, and whether all gradients are finite.

    The flag rides along as the last number, 1 where some are not.
    """
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in [*dense, *layers]]).all()
    flat = [x.reshape(-1).astype(jnp.float32) for x in dense]
    return jnp.concatenate([*flat, 1 - finite.astype(jnp.float32)[None]]), finite


def part_small(
    mean: jax.Array, dense: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """Undoes `join_small`: mean tensors, and whether all workers' are finite."""
    ends = np.cumsum([x.size for x in dense], dtype=int)
    *means, bad = jnp.split(mean, ends)
    means = [m.reshape(x.shape) for m, x in zip(means, dense, strict=True)]
    return means, bad[0] == 0


def reselect(options: Options, layout: Layout, state: AggregatorState):
    """Selects levels anew if it is time.

    Returns:
      Levels int32[L], the selector's state, the words sent for it, and whether it was.
    """
    exchange, selector = options.exchange, options.selector
    admitted = exchange.admits(layout)
    if selector.levels is not None:
        wanted = [base.level_index(exchange.levels, v) for v in selector.levels]
        within = admitted & np.isin(np.arange(admitted.shape[1]), wanted)
        admitted = np.where(within.any(1, keepdims=True), within, admitted)
    # A level that is not admitted stands for the nearest one that is.
    nearest = nearest_admitted(admitted)
    words = np.take_along_axis(exchange.words(layout), nearest, 1)
    default = jnp.asarray(default_levels(options, layout), jnp.int32)
    due = (state.step > 0) & (state.step % options.every == 0)
    due &= state.step >= options.warmup_steps

    count, kinds = words.shape[1], (exchange.carrier,) * words.shape[1]
    if selector.dense:  # one more candidate for every layer: not to be compressed
        words = np.append(words, layout.sizes[:, None], axis=1)
        kinds += ("dense",)

    def select(_: Any):
        errors = exchange.errors(layout, state.worker.value.snapshot)
        errors, sent = _mean_table(errors, selector.worker, options.axis_name)
        if options.shard_axis is not None:
            errors, more = all_reduce(errors, options.shard_axis, "error_table")
            sent += more
        errors = jnp.take_along_axis(errors, jnp.asarray(nearest), 1)
        errors = jnp.pad(errors, ((0, 0), (0, words.shape[1] - count)))
        problem = Problem(
            errors, words, default, lengths(options, layout), kinds, layout.sizes
        )
        chosen, selector_state = selector.update(problem, state.selector)
        new = base.pick(nearest, jnp.clip(chosen, 0, count - 1)).astype(jnp.int32)
        new = jnp.where(chosen == count, DENSE, new)
        usable = jnp.all(chosen >= 0)  # else a table was not finite
        return jnp.where(usable, new, state.levels), selector_state, sent

    def keep(_: Any):
        return state.levels, state.selector, no_words()

    return *lax.cond(due, select, keep, None), due


def exchanged(
    options: Options, layout: Layout, x, fresh, small, levels, state: AggregatorState
):
    """Mean over workers: uncompressed during the warm-up, then by the exchange."""
    states = state.exchange, state.worker.value.compressor
    if not layout.num_layers:
        small, words = all_reduce(small, options.axis_name, "small_tensors")
        return x, small, x, states, words
    key = jax.random.fold_in(jax.random.key(options.seed), state.step)
    if options.shard_axis is not None:
        key = jax.random.fold_in(key, lax.axis_index(options.shard_axis))
    worker = jax.random.fold_in(key, lax.axis_index(options.axis_name) + 1)
    keys = Keys(jax.random.fold_in(key, 0), worker)

    def compressed(x: jax.Array):
        mean = lambda x: options.exchange.mean(
            layout, x, fresh, small, levels, states, keys, lengths(options, layout)
        )
        return _with_uncompressed_layers(options, layout, x, levels, mean)

    def uncompressed(x: jax.Array):
        layers = [m.reshape(-1) for m in layout.unflatten(x)]
        both = jnp.concatenate([*layers, small])
        mean, words = all_reduce(both, options.axis_name, "uncompressed")
        *layers, small_mean = jnp.split(mean, np.cumsum(layout.sizes))
        return layout.flatten(layers), small_mean, x, states, words

    dense = state.step < options.warmup_steps
    if options.selector is not None and options.selector.dense:
        dense |= jnp.all(levels == DENSE)
    elif not options.warmup_steps:
        return compressed(x)
    return lax.cond(dense, uncompressed, compressed, x)


def _with_uncompressed_layers(
    options: Options, layout: Layout, x, levels, exchange: Callable
):
    """What an exchange makes of x, but for the layers that travel uncompressed."""
    if options.selector is None or not options.selector.dense:
        return exchange(x)
    dense, sizes = levels == DENSE, layout.sizes
    of_row = dense[layout.row_layer][:, None]
    passed = jnp.where(of_row, x.reshape(-1, layout.row), 0).reshape(-1)
    # A compressor of one level sends every layer; of zeros it makes zeros.
    mean, small, sent, states, sent_words = exchange(x - passed)
    lengths = jnp.where(dense, jnp.asarray(sizes, jnp.int32), 0)
    start = jnp.cumsum(lengths) - lengths
    # Each layer is written at its offset; those that are not sent are overwritten by
    # the next one, the last of them lies past the end.
    total = int(sizes.sum())
    buffer = jnp.zeros((total + int(sizes.max()),), jnp.float32)
    layers = [m.reshape(-1) for m in layout.unflatten(x)]
    for layer, at in zip(layers, start, strict=True):
        buffer = lax.dynamic_update_slice(buffer, layer, (at,))

    def at_capacity(capacity: int, buffer: jax.Array):
        if not capacity:
            return jnp.zeros(buffer.shape), no_words()
        mean, words = all_reduce(buffer[:capacity], options.axis_name, "dense_layers")
        return jnp.pad(mean, (0, buffer.size - capacity)), words

    ladder = wire.capacity_ladder(int(sizes.min()), total, np.array([]), 1.25)
    buffer, words = switch(lengths.sum(), [0, *ladder], at_capacity, buffer)
    parts = [
        jnp.where(yes, lax.dynamic_slice(buffer, (at,), (int(n),)), 0)
        for yes, at, n in zip(dense, start, sizes, strict=True)
    ]
    mean, sent = mean + layout.flatten(parts), sent + passed
    return mean, small, sent, states, sent_words + words


def default_levels(options: Options, layout: Layout) -> np.ndarray:
    """The level of every layer without, or before, a selection, int64[L]."""
    exchange, level = options.exchange, options.level
    if level is None and len(exchange.levels) > 1:
        raise ValueError(
            f"{exchange.name} has {len(exchange.levels)} levels and neither a "
            "selector nor a level; pass level=, or wrap it with gcjax.adapt"
        )
    index = 0 if level is None else base.level_index(exchange.levels, level)
    admitted = exchange.admits(layout)
    if layout.num_layers and not admitted[:, index].any():
        raise ValueError(
            f"{exchange.name}: level {exchange.levels[index]} is not admitted for any "
            "layer; with error_feedback=True only contractions are"
        )
    return nearest_admitted(admitted)[:, index]


def lengths(options: Options, layout: Layout) -> list[list[int]]:
    """The static lengths that each collective of the exchange may have."""
    default = default_levels(options, layout)
    if not options.adaptive:
        return options.exchange.capacities(layout, default, default)
    largest = np.full_like(default, len(options.exchange.levels) - 1)
    shrinks = options.selector.shrinks
    return options.exchange.capacities(layout, None, default if shrinks else largest)


def _clip(tree: Any, limit: float, axis_name: str) -> Any:
    norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
    limit = limit / np.sqrt(lax.axis_size(axis_name))
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, np.float32(1e-30)))
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), tree)


def _snapshot(options: Options, step, snapshot, x) -> jax.Array:
    """Sums the sample of the last steps before a selection."""
    phase = step % options.every
    start = max(0, options.every - options.selector.snapshot_steps)
    return lax.cond(
        phase >= start,
        lambda s, x: jnp.where(phase == start, 0, s) + x,
        lambda s, x: s,
        snapshot,
        x,
    )


def _mean_table(errors: jax.Array, worker: int | None, axis_name: str):
    if worker is None:
        return all_reduce(errors, axis_name, "error_table")
    chosen = jnp.where(lax.axis_index(axis_name) == worker, errors, 0)
    mean, words = all_reduce(chosen, axis_name, "error_table")
    return mean * lax.axis_size(axis_name), words


def _residual(layout: Layout, rest: jax.Array, levels, feedback) -> jax.Array:
    """The part of what was not sent that error feedback keeps."""
    if all(feedback) or not layout.num_layers:
        return rest
    on = jnp.array(feedback)[jnp.maximum(levels, 0)][layout.row_layer]
    return jnp.where(on[:, None], rest.reshape(-1, layout.row), 0).reshape(-1)


def nearest_admitted(admitted: np.ndarray) -> np.ndarray:
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
