"""Laws of error feedback: what is not sent is kept, stays bounded, and matters."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import N, trainer
from jax import lax

import gcjax
from gcjax.base import Keys, Selector

everything = lambda path, shape: True


def scheduled(default, next_levels: Callable) -> Selector:
    """Gives the levels `next_levels(selection, L)`: levels are data, so that one
    compilation serves all of them.
    """

    def update(errors, words, default, capacities, selection):
        return next_levels(selection, default.size), selection + 1

    return Selector(
        default=default,
        levels=None,
        snapshot_steps=1,
        worker=None,
        shrinks=False,
        init=lambda num_layers: jnp.int32(0),
        update=update,
    )


def each_layer_its_own(exchange_levels: int) -> Callable:
    return lambda selection, count: jnp.arange(count, dtype=jnp.int32) % exchange_levels


def changing(exchange_levels: int) -> Callable:
    def levels(selection, count):
        at = jnp.arange(count, dtype=jnp.int32)
        return (5 * selection + 3 * at + selection * at) % exchange_levels

    return levels


# --- Bounded: 500 steps with every family and every level that has feedback. ---------

STEPS, SHAPE = 500, (31, 32)  # 992 entries: one bucket of QSGD
SIZE = SHAPE[0] * SHAPE[1]


def contraction(omega: float) -> float:
    """Bound of ||error|| over the largest ||gradient||, for ||x - C(x)|| <= c ||x||,
    c^2 = omega: the geometric series c + c^2 + ...
    """
    c = np.sqrt(omega)
    return c / (1 - c)


class Bounded(NamedTuple):
    make: Callable
    normal: list  # bound of ||error|| / ||gradient|| for each level, normal gradients
    heavy: list  # the same for heavy-tailed ones


BOUNDED = {}


@functools.cache
def norms(name: str) -> tuple[np.ndarray, np.ndarray]:
    """||error|| and ||gradient||, [2 (normal, heavy-tailed), STEPS, N, L]."""
    aggregator = MAKE[name]()
    count = len(aggregator.exchange.levels)
    if count > 1:
        aggregator = gcjax.adapt(
            aggregator,
            scheduled(aggregator.exchange.levels[-1], each_layer_its_own(count)),
            every=1,
        )
    params = {str(i): jnp.zeros(SHAPE) for i in range(count)}
    run = trainer(aggregator, params)
    row = aggregator.exchange.row

    def step(draw, state, key):
        g = draw(key, (count, N, *SHAPE))
        _, state = run.update(state, {str(i): g[i] for i in range(count)})
        error = state.worker.value.error.reshape(N, count, -1)
        assert error.shape[-1] == -(-SIZE // row) * row
        norm = lambda x, axes: jnp.sqrt(jnp.sum(x**2, axis=axes))
        return state, (norm(error, 2), norm(g, (2, 3)).T)

    def steps(draw):
        keys = jax.random.split(jax.random.key(7), STEPS)
        return lax.scan(functools.partial(step, draw), run.init(params), keys)[1]

    normal = jax.random.normal
    heavy = lambda key, shape: jax.random.t(key, np.float32(3), shape)
    both = jax.jit(lambda: (steps(normal), steps(heavy)))()
    return tuple(np.stack(pair) for pair in zip(*both, strict=True))


MAKE = {
    "qsgd": lambda: gcjax.compressed_mean(
        gcjax.qsgd(), spacing=2, compress=everything
    ),
    "qsgd l2": lambda: gcjax.compressed_mean(
        gcjax.qsgd((5, 6, 7, 8), norm="l2"), spacing=2, compress=everything
    ),
    "top_k": lambda: gcjax.compressed_mean(
        gcjax.top_k((0.001, 0.01)), spacing=2, compress=everything
    ),
    "random_k": lambda: gcjax.compressed_mean(gcjax.random_k(0.01), compress=everything),
    "sign": lambda: gcjax.compressed_mean(gcjax.sign(), compress=everything),
    "natural": lambda: gcjax.compressed_mean(gcjax.natural(), compress=everything),
    "cast": lambda: gcjax.compressed_mean(gcjax.cast(), compress=everything),
    "power_sgd": lambda: gcjax.power_sgd((1, 4), spacing=2, compress=everything),
}
