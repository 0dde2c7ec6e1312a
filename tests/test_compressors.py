"""Laws of compressors: one table of them, and the contract that each must keep.

Every compressor runs compiled twice, on stacks of inputs, levels and keys: once from
`encode` to `decode` (`messages`) and once over many random draws (`sample`).
"""

import ast
import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gcjax
from gcjax import base
from gcjax.base import Keys, Layout

# Sizes 7, 1, 315 and 1320: below a word, one, and no multiples of 32 or of a bucket.
SHAPES = {"bias": (7,), "one": (1,), "conv": (3, 3, 5, 7), "matrix": (40, 33)}
SIZES = np.array([int(np.prod(s)) for s in SHAPES.values()])
THRESHOLD, ROOM = 0.8, 0.3  # of `threshold`: 42 % of Gaussian entries pass


def k_of(density: float) -> np.ndarray:
    """Entries that a sparsifier keeps of each layer."""
    return np.array([max(1, int(density * n + 1e-9)) for n in SIZES])


def code_words(bits: int, bucket: int | None, scales: int) -> np.ndarray:
    """Words of a quantiser: bit planes, and scales per bucket or (None) per layer."""
    groups = 1 if bucket is None else np.ceil(SIZES / bucket).astype(int)
    return bits * np.ceil(SIZES / 32).astype(int) + scales * groups


class Case(NamedTuple):
    make: Callable
    words: Callable  # value of the ladder -> words of each layer, as documented
    random: bool = False  # whether it draws random numbers
    unbiased: bool = False


def qsgd(bucket: int, norm: str, rounding: str, bits=None) -> Case:
    scales = {"max_min": 2, "l2": 1}[norm]
    bits = bits or tuple(range(1 if norm == "max_min" else 2, 9))
    random = rounding == "stochastic"
    return Case(
        lambda: gcjax.qsgd(bits, bucket, norm, rounding),
        lambda b: code_words(b, bucket, scales),
        random,
        unbiased=random,
    )


CASES = {
    "identity": Case(gcjax.identity, lambda v: SIZES),
    "cast": Case(gcjax.cast, lambda v: code_words(16, None, 0)),
    "top_k": Case(gcjax.top_k, lambda d: 2 * k_of(d)),
    "top_k dense": Case(
        lambda: gcjax.top_k((0.29, 0.5, 0.75, 1.0)), lambda d: 2 * k_of(d)
    ),
    "random_k": Case(gcjax.random_k, k_of, random=True),
    "random_k unbiased": Case(
        lambda: gcjax.random_k((0.1, 0.4, 0.75, 1.0), unbiased=True),
        k_of,
        random=True,
        unbiased=True,
    ),
    "threshold": Case(
        lambda: gcjax.threshold(THRESHOLD, ROOM), lambda d: 2 * k_of(d)
    ),
    "qsgd": qsgd(1024, "max_min", "stochastic"),
    "qsgd nearest 32": qsgd(32, "max_min", "nearest"),
    "qsgd nearest 512": qsgd(512, "max_min", "nearest"),
    "qsgd l2 64": qsgd(64, "l2", "stochastic", (2, 3, 5, 8)),
    "qsgd l2 nearest": qsgd(1024, "l2", "nearest"),
    "sign": Case(gcjax.sign, lambda v: code_words(1, None, 1)),
    "sign 64": Case(lambda: gcjax.sign(64), lambda v: code_words(1, 64, 1)),
    "terngrad": Case(
        gcjax.terngrad, lambda v: code_words(2, None, 1), random=True, unbiased=True
    ),
    "terngrad clipped": Case(
        lambda: gcjax.terngrad(2.5), lambda v: code_words(2, None, 1), random=True
    ),
    "natural": Case(
        gcjax.natural, lambda v: code_words(9, None, 0), random=True, unbiased=True
    ),
}
cases = pytest.mark.parametrize("name", CASES)


@functools.cache
def compressor(name: str):
    return CASES[name].make()


def layout_of(name: str) -> Layout:
    return Layout(tuple(SHAPES), tuple(SHAPES.values()), compressor(name).row)


# --- Inputs. -------------------------------------------------------------------------


def normal(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in SHAPES.values()]


def heavy() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_t(2, s).astype(np.float32) for s in SHAPES.values()]


scaled = lambda factor: [(x * np.float32(factor)) for x in normal()]
INPUTS = {
    "normal": normal(),
    "zeros": scaled(0),
    "equal": [np.full(s, -0.7, np.float32) for s in SHAPES.values()],
    "tiny": scaled(1e-30),
    "huge": scaled(1e30),
    "heavy-tailed": heavy(),
    "ties": [np.round(2 * x) / 2 for x in normal()],
}


def flat(layout: Layout, layers: list) -> np.ndarray:
    out = np.zeros(layout.size, np.float32)
    for layer, first in zip(layers, layout.first_row * layout.row, strict=True):
        out[first : first + layer.size] = layer.reshape(-1)
    return out


def split(layout: Layout, x) -> list[np.ndarray]:
    """The layers, each flat, of a vector [..., size]."""
    starts = layout.first_row * layout.row
    return [
        np.asarray(x)[..., a : a + n] for a, n in zip(starts, SIZES, strict=True)
    ]


def stack(layout: Layout, names=INPUTS) -> np.ndarray:
    return np.stack([flat(layout, INPUTS[name]) for name in names])


def keys_of(seed: int) -> Keys:
    return Keys(*jax.random.split(jax.random.key(seed)))


# --- From encode to decode. ----------------------------------------------------------


def mixed_levels(count: int) -> np.ndarray:
    """Level vectors: all least, all most, and each layer at a level of its own."""
    at = np.arange(SIZES.size)
    rows = [0 * at, 0 * at + count - 1, at * 3 % count, (at * 5 + 1) % count]
    return np.unique(rows, axis=0).astype(np.int32)


MORE = 37  # words per lane by which the larger capacity is larger


def messages_of(name: str) -> Callable:
    """x, keys -> x_hat, message and decoded vectors for each level vector.

    Messages are packed at one large capacity, as for levels that change, and decoded
    from that and from the exact prefix; the last one is also packed at its exact
    capacity, as for fixed levels.
    """
    c, layout = compressor(name), layout_of(name)
    vectors = mixed_levels(len(c.levels))
    exact = c.words(layout)[np.arange(SIZES.size), vectors].sum(1).tolist()
    large = max(exact) + MORE * c.lanes

    def run(x, keys):
        def pack(levels):
            units, x_hat = c.encode(layout, x, levels, keys)
            return units, x_hat, *c.pack(layout, units, levels, large)

        units, x_hat, message, shared = jax.vmap(pack)(jnp.asarray(vectors))
        last = jax.tree.map(lambda a: a[-1], (units, shared))
        fixed, _ = c.pack(layout, last[0], jnp.asarray(vectors[-1]), exact[-1])
        decoded = [
            [
                c.decode(
                    layout, message[i, None, :, : length // c.lanes], levels, share
                )
                for length in (exact[i], large)
            ]
            for i, levels in enumerate(jnp.asarray(vectors))
            for share in [jax.tree.map(lambda a: a[i], shared)]
        ]
        return x_hat, message, fixed, decoded

    return run


@functools.cache
def messages(name: str) -> Callable:
    """`messages_of`, compiled for a stack of inputs: a `vmap` as over workers."""
    return jax.jit(jax.vmap(messages_of(name), in_axes=(0, None)))


@functools.cache
def outcome(name: str):
    return jax.tree.map(np.asarray, messages(name)(stack(layout_of(name)), keys_of(0)))


@cases
def test_decode_gives_what_the_worker_believes_it_sent(name):
    """Error feedback relies on it: x_hat is the decoded message, at any capacity."""
    x_hat, _, _, decoded = outcome(name)
    for i, results in enumerate(decoded):
        for result in results:
            difference = np.abs(result - x_hat[:, i])
            assert (difference <= 1e-6 * np.abs(x_hat[:, i]).max(1)[:, None]).all()


@cases
def test_what_is_sent_is_finite_and_zero_in_the_padding(name):
    padding = ~np.asarray(layout_of(name).valid()).reshape(-1)
    x_hat, *_ = outcome(name)
    assert np.isfinite(x_hat).all()
    assert (x_hat[..., padding] == 0).all()


@cases
def test_zeros_stay_zeros(name):
    x_hat, *_ = outcome(name)
    assert (x_hat[list(INPUTS).index("zeros")] == 0).all()


@cases
def test_a_message_is_as_long_as_documented(name):
    """The table of words is the documented payload, and the message has that length;
    up to a larger capacity it is followed by zeros, or by indices out of range.
    """
    c, layout = compressor(name), layout_of(name)
    words = c.words(layout)
    assert words.shape == (SIZES.size, len(c.levels))
    for v, value in enumerate(c.levels):
        np.testing.assert_array_equal(words[:, v], CASES[name].words(value))
    vectors = mixed_levels(len(c.levels))
    exact = words[np.arange(SIZES.size), vectors].sum(1) // c.lanes
    _, message, fixed, _ = outcome(name)
    assert message.dtype == fixed.dtype == np.uint32
    assert message.shape[2:] == (c.lanes, exact.max() + MORE)
    assert fixed.shape[1:] == (c.lanes, exact[-1])
    np.testing.assert_array_equal(message[:, -1, :, : exact[-1]], fixed)
    for i, length in enumerate(exact):
        assert (message[:, i, 0, length:] == 0).all()
        assert (message[:, i, 1:, length:] >= layout.size).all()


@cases
def test_the_same_keys_give_the_same_message_and_others_another(name):
    x = stack(layout_of(name))
    again = jax.tree.map(np.asarray, messages(name)(x, keys_of(0)))
    jax.tree.map(np.testing.assert_array_equal, again, outcome(name))
    other, *_ = messages(name)(x, keys_of(1))
    assert np.array_equal(other, again[0]) == (not CASES[name].random)


EAGER = ("identity", "cast", "top_k", "random_k", "threshold", "qsgd nearest 512")


@pytest.mark.parametrize("name", (*EAGER, "sign", "terngrad", "natural"))
def test_compiled_over_workers_equals_eager_for_one(name):
    """Every family once: here each operation compiles by itself."""
    c, layout = compressor(name), layout_of(name)
    levels = jnp.asarray(mixed_levels(len(c.levels))[-1])
    x = jnp.asarray(flat(layout, INPUTS["normal"]))
    units, x_hat = c.encode(layout, x, levels, keys_of(0))
    batch, _, fixed, _ = outcome(name)
    message, shared = c.pack(layout, units, levels, fixed[0].size)
    decoded = c.decode(layout, message[None], levels, shared)
    # Fusion may round differently, by one unit in the last place of a scale.
    for eager in (x_hat, decoded):
        np.testing.assert_allclose(eager, batch[0, -1], rtol=0, atol=1e-6)
