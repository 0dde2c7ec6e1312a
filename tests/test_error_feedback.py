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


@functools.cache
def gradients() -> jax.Array:
    """Normal and heavy-tailed gradients, [STEPS, 2, N, *SHAPE]."""
    rng, shape = np.random.default_rng(0), (STEPS, N, *SHAPE)
    both = rng.normal(size=shape), rng.standard_t(3, shape)
    return jnp.asarray(np.stack(both, axis=1), jnp.float32)


@functools.cache
def norms(name: str) -> tuple[np.ndarray, np.ndarray]:
    """||error|| [STEPS, N, 2, V] and ||gradient|| [STEPS, N, 2, 1].

    One layer for each level and kind of gradient, all in one run.
    """
    aggregator = MAKE[name]()
    values = aggregator.exchange.levels
    if len(values) > 1:
        # Levels from the state, which no selection changes.
        never = scheduled(values[-1], lambda selection, count: jnp.zeros(count, jnp.int32))
        aggregator = gcjax.adapt(aggregator, never, every=10**6)
    params = [jnp.zeros(SHAPE)] * (2 * len(values))
    run = trainer(aggregator, params)
    levels = jnp.tile(jnp.arange(len(values), dtype=jnp.int32), 2)

    def step(state, g):
        _, state = run.update(state, [g[i // len(values)] for i in range(len(params))])
        error = state.worker.value.error.reshape(N, 2, len(values), -1)
        return state, jnp.sqrt(jnp.sum(error**2, axis=-1))

    scan = jax.jit(lambda state, g: lax.scan(step, state, g)[1])
    errors = scan(run.init(params)._replace(levels=levels), gradients())
    sizes = jnp.sqrt(jnp.sum(gradients() ** 2, axis=(-1, -2)))
    return np.asarray(errors), np.swapaxes(sizes, 1, 2)[..., None]


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
