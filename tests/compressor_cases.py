"""One table of compressors, and the inputs that each of them meets."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

import gcjax
from gcjax.base import Keys, Layout

# Sizes 7, 1, 315 and 1320: below a word, one, and no multiples of 32 or of a bucket.
SHAPES = {"bias": (7,), "one": (1,), "conv": (3, 3, 5, 7), "matrix": (40, 33)}
SIZES = np.array([int(np.prod(s)) for s in SHAPES.values()])
DENSITIES = (0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 1)  # 0.29 * 100 is 28.999... in floats
THRESHOLD, ROOM = 0.8, 0.3  # of `threshold`: 42 % of Gaussian entries pass


def k_of(density: float) -> np.ndarray:
    """Entries that a sparsifier keeps of each layer."""
    return np.array([max(1, int(density * n + 1e-9)) for n in SIZES])


def code_words(bits: int, bucket: int | None, scales: int) -> np.ndarray:
    """Words of a quantiser: codes in units of up to 256 elements, and scales per bucket
    or (None) per layer.
    """
    groups = 1 if bucket is None else np.ceil(SIZES / bucket).astype(int)
    unit = np.gcd(bucket or 1024, 256)
    return bits * np.ceil(SIZES / unit).astype(int) * unit // 32 + scales * groups


def entry_words(k: np.ndarray) -> np.ndarray:
    """Words of k values and of the shortest code of their places in small layers."""
    return k + np.minimum((k + 1) // 2, np.ceil(SIZES / 32).astype(int))


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
    "top_k": Case(lambda: gcjax.top_k(DENSITIES), lambda d: entry_words(k_of(d))),
    "top_k nearly": Case(
        lambda: gcjax.top_k(DENSITIES, tolerance=0.1), lambda d: entry_words(k_of(d))
    ),
    "random_k": Case(lambda: gcjax.random_k(DENSITIES), k_of, random=True),
    "random_k unbiased": Case(
        lambda: gcjax.random_k((0.1, 0.4, 0.75, 1.0), unbiased=True),
        k_of,
        random=True,
        unbiased=True,
    ),
    "threshold": Case(
        lambda: gcjax.threshold(THRESHOLD, ROOM), lambda d: entry_words(k_of(d))
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
    return [np.asarray(x)[..., a : a + n] for a, n in zip(starts, SIZES, strict=True)]


def stack(layout: Layout, names=INPUTS) -> np.ndarray:
    return np.stack([flat(layout, INPUTS[name]) for name in names])


def keys_of(seed: int) -> Keys:
    return Keys(*jax.random.split(jax.random.key(seed)))
