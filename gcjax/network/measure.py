"""Times what a worker does in a step apart from the wire, on this machine."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from gcjax.base import Aggregator
from gcjax.network import Codec

# What a collective returns where all workers have the same array x; n workers.
_STAND_INS = {
    "psum": lambda x, n, p: x * n,
    "pmax": lambda x, n, p: x,
    "pmin": lambda x, n, p: x,
    "ppermute": lambda x, n, p: x,
    "all_gather": lambda x, n, p: _gathered(x, n, **p),
    "reduce_scatter": lambda x, n, p: _scattered(x, n, **p),
    "all_to_all": lambda x, n, p: _exchanged(x, n, **p),
}
_CARRIES = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
}
KINDS = sorted(set(_CARRIES.values()))


def measure_codec(
    aggregator: Aggregator,
    params: Any,
    num_workers: int,
    *,
    axis_name: str = "workers",
    repeats: int = 21,
) -> Codec:
    """Times an aggregator's step on one worker, its collectives replaced by copies.

    The step compresses a random normal gradient, decodes what N workers would have
    sent, keeps the new error and subtracts the mean from the parameters; the time of
    the subtraction alone is taken off. Buffers are donated, as in training. Without
    warm-up; selections of levels are rare steps, which the median leaves out.

    Args:
      aggregator: Any.
      params: Parameters, arrays or `jax.ShapeDtypeStruct`s.
      num_workers: N, whose messages are decoded.
      axis_name: The aggregator's axis.
      repeats: Timed steps, at least 1; the median counts.

    Raises:
      ValueError: if repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"measure_codec: repeats must be >= 1, got {repeats}")
    aggregator = aggregator.rebuild(warmup_steps=0)
    leaves, treedef = jax.tree.flatten(params)
    draw = lambda seed: treedef.unflatten(
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(
            jax.random.split(jax.random.key(seed), len(leaves)), leaves, strict=True
        )
    )
    grads = draw(0)
    state = jax.jit(aggregator.init)(grads)
    update = alone(aggregator.update, axis_name, num_workers, grads, state)
    apply = lambda params, mean: jax.tree.map(lambda p, m: p - m, params, mean)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, grads):
        (mean, state), traffic = update(grads, state)
        return apply(params, mean), state, traffic

    apply = jax.jit(apply, donate_argnums=0)
    copy = jax.jit(lambda out, x: jax.tree.map(jnp.negative, x), donate_argnums=0)
    own, plain, out, traffic = draw(1), draw(2), draw(3), None
    times = []
    for _ in range(repeats + 2):  # two to warm up
        at = [time.perf_counter()]
        own, state, traffic = jax.block_until_ready(step(own, state, grads))
        at.append(time.perf_counter())
        plain = jax.block_until_ready(apply(plain, grads))
        at.append(time.perf_counter())
        out = jax.block_until_ready(copy(out, grads))
        at.append(time.perf_counter())
        times.append(np.diff(at))
    whole, applying, copying = np.median(times[2:], axis=0).tolist()
    collectives = []
    for kind, (count, words) in zip(KINDS, traffic.tolist(), strict=True):
        collectives += [(kind, 4 * words / max(count, 1))] * count
    return Codec(max(0.0, whole - applying), copying, tuple(collectives))


def alone(
    fn: Callable, axis_name: str, num_workers: int, *args: Any
) -> Callable[..., tuple[Any, jax.Array]]:
    """One worker's function without the others, who are taken to have the same data.

    Collectives become copies of the right shapes; all else is computed as it would be.

    Args:
      fn: Function of one worker, with collectives over `axis_name`.
      axis_name: Name of the workers' axis.
      num_workers: N.
      *args: Arguments that `fn` is traced with.

    Returns:
      A function of such arguments that returns fn's result, and for each kind of
      collective, in alphabetical order, how many took place and the 32-bit words that
      went into them, int32[5, 2].
    """
    closed, shape = jax.make_jaxpr(
        fn, axis_env=[(axis_name, num_workers)], return_shape=True
    )(*args)

    def without(*args: Any):
        flat = jax.tree.leaves(args)
        out, traffic = _evaluate(closed.jaxpr, closed.consts, flat, num_workers)
        return jax.tree.unflatten(jax.tree.structure(shape), out), traffic

    return without


def _evaluate(jaxpr: core.Jaxpr, consts: list, args: list, n: int) -> tuple[list, Any]:
    """Evaluates a jaxpr, collectives replaced; also counts them."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    traffic = jnp.zeros((len(KINDS), 2), jnp.int32)
    read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
    for eqn in jaxpr.eqns:
        inputs = [read(x) for x in eqn.invars]
        name, more = eqn.primitive.name, 0
        if name in _STAND_INS:
            # The barrier: what arrives is in memory, and not what has just been made.
            fn = _STAND_INS[name]
            out = [lax.optimization_barrier(fn(x, n, eqn.params)) for x in inputs]
            words = sum(-(-x.size * x.dtype.itemsize // 4) for x in inputs)
            more = jnp.zeros_like(traffic)
            more = more.at[KINDS.index(_CARRIES[name])].set(jnp.array([1, words]))
        elif name == "axis_index":
            out = [jnp.int32(0)]
        elif name == "cond":
            branches = [
                lambda *a, b=b: _evaluate(b.jaxpr, b.consts, a, n)
                for b in eqn.params["branches"]
            ]
            out, more = lax.switch(inputs[0], branches, *inputs[1:])
        elif name == "jit":
            inner = eqn.params["jaxpr"]
            out, more = _evaluate(inner.jaxpr, inner.consts, inputs, n)
        else:
            out = _bind(eqn, inputs)
        traffic += more
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars], traffic


def _bind(eqn: core.JaxprEqn, inputs: list) -> list:
    """Applies an equation's own primitive."""
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _gathered(x, n, all_gather_dimension, tiled, **_):
    if tiled:
        return jnp.concatenate([x] * n, all_gather_dimension)
    return jnp.stack([x] * n, all_gather_dimension)


def _scattered(x, n, scatter_dimension, tiled, **_):
    part = jnp.split(x, n, scatter_dimension)[0] * n
    return part if tiled else part.squeeze(scatter_dimension)


def _exchanged(x, n, split_axis, concat_axis, tiled, **_):
    if tiled:
        return jnp.concatenate(jnp.split(x, n, split_axis), concat_axis)
    return jnp.moveaxis(x, split_axis, concat_axis)
