"""What compression costs: tables of errors, bias, and who contracts.

Every compressor runs compiled once, over many random draws (`sample`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import (
    CASES,
    INPUTS,
    SIZES,
    compressor,
    k_of,
    keys_of,
    layout_of,
    split,
    stack,
)
from jax import lax

import gcjax
from gcjax.base import Keys, Layout

DRAWS = 400
SAMPLED = ("normal", "heavy-tailed", "equal", "ties", "zeros")


class Sample(NamedTuple):
    """Of each sampled input (B), at each level (V) used for all layers (L)."""

    table: np.ndarray  # [B, V, L], Compressor.errors
    error: np.ndarray  # [B, V, L], mean of ||x_hat - x||^2
    spread: np.ndarray  # [B, V, L], its standard error
    bias: list  # float64[B, V, n] for each layer, mean of x_hat - x


@functools.cache
def sample(name: str) -> Sample:
    c, layout = compressor(name), layout_of(name)
    levels = jnp.arange(len(c.levels), dtype=jnp.int32)
    levels = jnp.broadcast_to(levels[:, None], (levels.size, SIZES.size))

    def one(x, keys):
        def at(levels, keys):
            _, x_hat, _ = c.encode(layout, x, levels, keys, c.init(layout))
            rest = layout.clear_padding(x_hat) - x
            error = layout.sum_rows(jnp.sum(rest.reshape(-1, c.row) ** 2, axis=1))
            return rest, error, error**2

        def add(total, key):
            new = jax.vmap(at, (0, None))(levels, Keys(*jax.random.split(key)))
            return jax.tree.map(jnp.add, total, new), None

        shapes = jax.eval_shape(jax.vmap(at, (0, None)), levels, keys_of(0))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return c.errors(layout, x), *lax.scan(add, zeros, keys)[0]

    draws = DRAWS if CASES[name].random else 1
    x = stack(layout, SAMPLED[:2] if CASES[name].random else SAMPLED)
    run = jax.jit(jax.vmap(one, in_axes=(0, None)))
    table, rest, error, square = run(x, jax.random.split(jax.random.key(5), draws))
    bias = [b.astype(np.float64) / draws for b in split(layout, rest)]
    if draws == 1:
        error = np.stack([np.sum(b**2, axis=-1) for b in bias], axis=-1)
    mean = np.asarray(error, np.float64) / draws
    variance = np.maximum(np.asarray(square, np.float64) / draws - mean**2, 0)
    table = np.swapaxes(np.asarray(table, np.float64), 1, 2)  # [B, V, L]
    return Sample(table, mean, np.sqrt(variance / draws), bias)


def energies(names) -> np.ndarray:
    """||x||^2 of each layer, [B, 1, L]."""
    rows = [[np.sum(x.astype(np.float64) ** 2) for x in INPUTS[n]] for n in names]
    return np.array(rows)[:, None]


EXACT = [n for n in CASES if not CASES[n].random and n != "top_k nearly"]


@pytest.mark.parametrize("name", EXACT)
def test_the_table_of_errors_is_what_is_measured(name):
    s, energy = sample(name), energies(SAMPLED)
    floor = 1e-12 * energy  # float32 rounding of x_hat, squared
    if name.startswith("top_k"):
        # It interpolates within a bin of the histogram, from above: bins of magnitudes
        # are at most 1/64 wide, of energies 3.2 %; see below for layers of some size.
        assert (s.table >= s.error * (1 - 1e-5) - floor).all()
        assert (s.table <= s.error * 1.032 + 1e-6 * energy).all()
    else:
        if "l2" in name:  # entries are rounded to 2^-23 of the norm
            floor = floor + 2 * np.sqrt(s.error * SIZES * energy) * 2**-23
        assert (np.abs(s.table - s.error) <= 1e-4 * s.error + floor).all()


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].random])
def test_the_table_of_errors_is_the_expected_error(name):
    """Of normal layers; with one draw of a heavy tail in 1000 no mean converges."""
    s = sample(name)
    floor = 1e-6 * energies(SAMPLED[:1])[0]  # an entry at a grid point, in float32
    difference = np.abs(s.table - s.error)[0]
    assert (difference <= 5 * s.spread[0] + 1e-4 * s.error[0] + floor).all()


@pytest.mark.parametrize("name", ["top_k", "random_k"])
def test_more_words_never_mean_more_error(name):
    s = sample(name)
    energy = energies(SAMPLED[: s.table.shape[0]])
    assert (np.diff(s.table, axis=1) <= 1e-6 * energy).all()
    assert (np.diff(compressor(name).words(layout_of(name)), axis=1) >= 0).all()


def test_the_table_of_top_k_is_exact_to_a_thousandth():
    """On layers of some thousand entries, whatever their distribution."""
    c, n = gcjax.top_k(), 5000
    layout = Layout(tuple("abcd"), ((n,),) * 4, c.row)
    rng = np.random.default_rng(0)
    layers = [
        rng.normal(size=n),
        rng.standard_t(2, n),
        rng.uniform(1, 2, n),
        np.geomspace(1, 1e-6, n) * rng.choice([-1, 1], n),
    ]
    x = layout.flatten([jnp.asarray(a, jnp.float32) for a in layers])
    table = np.asarray(jax.jit(lambda x: c.errors(layout, x))(x), np.float64)
    for row, layer in zip(table, layers, strict=True):
        energy = np.sort(layer.astype(np.float32).astype(np.float64) ** 2)[::-1]
        exact = [energy[int(d * n + 1e-9) :].sum() for d in c.levels]
        np.testing.assert_allclose(row, exact, rtol=1e-3)


def draw_variance(name: str, x: np.ndarray, value) -> tuple[np.ndarray, np.ndarray]:
    """Variance of one draw of each entry, and the largest jump it can make."""
    size = np.abs(x)
    if name.startswith("qsgd"):
        bucket = 64 if name == "qsgd l2 64" else 1024
        unit = np.zeros_like(x)
        for start in range(0, x.size, bucket):
            part = x[start : start + bucket]
            span = part.max() - part.min(), 2 * np.sqrt(np.sum(part**2))
            codes = 2**value - 1, 2**value - 2
            unit[start : start + bucket] = span["l2" in name] / codes["l2" in name]
        # The place between two codes, taken at its worst.
        return unit**2 / 4, unit
    if name == "natural":
        low = np.ldexp(1.0, np.frexp(size)[1] - 1)
        return (size - low) * (2 * low - size), low
    if name == "terngrad":
        return size * (size.max() - size), np.full_like(x, size.max())
    scale = x.size / max(1, int(value * x.size + 1e-9))
    return x**2 * (scale - 1), size * scale


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].unbiased])
def test_the_mean_of_many_draws_is_the_gradient(name):
    """Every entry, the sum of a layer, and its sum of magnitudes, whose standard
    error is 0.07 % of a rounding unit: no systematic rounding up, down or outwards.

    Five standard errors, and, because rare large jumps are not normally distributed,
    Bernstein's second term.
    """
    s = sample(name)
    for i, case in enumerate(SAMPLED[:2]):
        for layer, bias in zip(INPUTS[case], s.bias, strict=True):
            x = layer.reshape(-1).astype(np.float64)
            rounding = 1e-6 * np.abs(x).max()
            for v, value in enumerate(compressor(name).levels):
                variance, jump = draw_variance(name, x, value)
                b = bias[i, v]
                bound = 5 * np.sqrt(variance / DRAWS) + 25 / 3 * jump / DRAWS
                assert (np.abs(b) <= bound + rounding).all()
                bound = 5 * np.sqrt(variance.sum() / DRAWS)
                bound += 25 / 3 * jump.max() / DRAWS + x.size * 0.1 * rounding
                assert abs(b.sum()) <= bound
                assert abs((b * np.sign(x)).sum()) <= bound


@pytest.mark.parametrize("name", ["top_k", "random_k"])
def test_sparsifiers_contract_by_the_share_they_keep(name):
    """||x - C(x)||^2 <= (1 - k/n) ||x||^2; an equality in the mean of `random_k`."""
    s = sample(name)
    kept = np.array([k_of(d) for d in compressor(name).levels]) / SIZES
    energy = energies(SAMPLED[: s.error.shape[0]])
    limit = (1 - kept) * energy
    if CASES[name].random:
        assert (np.abs(s.error - limit)[0] <= 5 * s.spread[0] + 1e-6 * energy[0]).all()
    else:
        assert (s.error <= limit * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["sign", "sign 64"])
def test_sign_contracts_by_its_density(name):
    s = sample(name)
    for i, case in enumerate(SAMPLED):
        for l, layer in enumerate(INPUTS[case]):
            expected, n = 0.0, 64 if "64" in name else layer.size
            for start in range(0, layer.size, n):
                x = layer.reshape(-1)[start : start + n].astype(np.float64)
                expected += np.sum(x**2) - np.sum(np.abs(x)) ** 2 / x.size
            floor = 1e-6 * np.sum(layer.astype(np.float64) ** 2)
            assert abs(s.error[i, 0, l] - expected) <= floor


def test_natural_has_relative_variance_one_eighth_at_most():
    s = sample("natural")
    assert (s.table <= energies(SAMPLED[:2]) / 8 * (1 + 1e-6)).all()
    # (m - 1)(2 - m) / m^2 of a mantissa m is largest, 1/8, at m = 4/3.
    c = compressor("natural")
    layout = Layout(("x",), ((32,),), c.row)
    x = layout.flatten([jnp.full(32, 4 / 3)])
    np.testing.assert_allclose(c.errors(layout, x)[0, 0], 32 * 16 / 9 / 8, rtol=1e-5)


# --- Error feedback is on where it must be. ------------------------------------------


@pytest.mark.parametrize(
    ("c", "feedback"),
    [
        (gcjax.qsgd((1, 2, 3, 4, 5, 6, 7, 8)), [False] + [True] * 7),
        (gcjax.qsgd((2, 3, 4, 5, 6, 7, 8), norm="l2"), [False] * 3 + [True] * 4),
        (gcjax.random_k((0.1, 0.5, 0.6), unbiased=True), [False, False, True]),
        (gcjax.random_k(), [True] * 12),
        (gcjax.top_k(), [True] * 12),
        (gcjax.terngrad(), [False]),
        (gcjax.natural(), [True]),
        (gcjax.sign(), [True]),
        (gcjax.cast(), [True]),
    ],
)
def test_contractions_are_declared_as_documented(c, feedback):
    assert list(c.contraction) == feedback
