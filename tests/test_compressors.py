"""Laws of compressors: one table of them, and the contract that each must keep.

Every compressor runs compiled twice, on stacks of inputs, levels and keys: once from
`encode` to `decode` (`messages`) and once over many random draws (`sample`).
"""

import ast
import functools
import inspect
import operator
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
    return [np.asarray(x)[..., a : a + n] for a, n in zip(starts, SIZES, strict=True)]


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


MORE = 37  # words by which the larger capacity is larger


def messages_of(name: str) -> Callable:
    """x, keys -> for each level vector: x_hat, message, decoded vector; and more.

    Messages are packed at one large capacity, as for levels that change, and decoded
    from their exact prefix, the last one also from the whole. The last one is also
    packed at its exact capacity, as for fixed levels.
    """
    c, layout = compressor(name), layout_of(name)
    vectors = mixed_levels(len(c.levels))
    exact = c.words(layout)[np.arange(SIZES.size), vectors].sum(1).tolist()
    large = max(exact) + MORE

    def run(x, keys):
        def pack(levels):
            units, x_hat, _ = c.encode(layout, x, levels, keys, c.init(layout))
            x_hat = layout.clear_padding(x_hat)
            return units, x_hat, *c.pack(layout, units, levels, large)

        units, x_hat, message, shared = jax.vmap(pack)(jnp.asarray(vectors))
        last = jax.tree.map(lambda a: a[-1], (units, shared))
        fixed, _ = c.pack(layout, last[0], jnp.asarray(vectors[-1]), exact[-1])
        decoded = []
        for i, length in [*enumerate(exact), (len(exact) - 1, large)]:
            known = jax.tree.map(operator.itemgetter(i), shared)
            prefix = message[i, None, :length]
            found = c.decode(layout, prefix, jnp.asarray(vectors[i]), known)
            decoded.append(layout.clear_padding(found))
        return x_hat, message, fixed, jnp.stack(decoded)

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
    expected = np.concatenate([x_hat, x_hat[:, -1:]], axis=1)
    largest = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(decoded - expected) <= 1e-6 * largest).all()


@cases
def test_what_is_sent_is_finite(name):
    x_hat, *_ = outcome(name)
    assert np.isfinite(x_hat).all()


@pytest.mark.parametrize("row", [1, 32, 1024])
def test_padding_is_cleared_and_nothing_else(row):
    layout = Layout(tuple(SHAPES), tuple(SHAPES.values()), row)
    x = jnp.arange(1, layout.size + 1, dtype=jnp.float32)
    expected = np.where(np.asarray(layout.valid()).reshape(-1), x, 0)
    np.testing.assert_array_equal(layout.clear_padding(x), expected)


@cases
def test_zeros_stay_zeros(name):
    x_hat, *_ = outcome(name)
    assert (x_hat[list(INPUTS).index("zeros")] == 0).all()


@cases
def test_a_message_is_as_long_as_documented(name):
    """The table of words is the documented payload, and the message has that length;
    up to a larger capacity it is followed by zeros.
    """
    c, layout = compressor(name), layout_of(name)
    words = c.words(layout)
    assert words.shape == (SIZES.size, len(c.levels))
    for v, value in enumerate(c.levels):
        np.testing.assert_array_equal(words[:, v], CASES[name].words(value))
    vectors = mixed_levels(len(c.levels))
    exact = words[np.arange(SIZES.size), vectors].sum(1)
    _, message, fixed, _ = outcome(name)
    assert message.dtype == fixed.dtype == np.uint32
    assert message.shape[2:] == (exact.max() + MORE,)
    assert fixed.shape[1:] == (exact[-1],)
    np.testing.assert_array_equal(message[:, -1, : exact[-1]], fixed)
    for i, length in enumerate(exact):
        assert (message[:, i, length:] == 0).all()


@cases
def test_the_same_keys_give_the_same_message_and_others_another(name):
    """What workers share decides for `random_k`, their own keys for all others."""
    x = stack(layout_of(name))
    run = lambda keys: jax.tree.map(np.asarray, messages(name)(x, keys))
    again = run(keys_of(0))
    jax.tree.map(np.testing.assert_array_equal, again, outcome(name))
    shared = run(keys_of(0)._replace(worker=keys_of(1).worker))
    own = run(keys_of(0)._replace(shared=keys_of(1).shared))
    same = [np.array_equal(other[0], again[0]) for other in (shared, own)]
    by_shared = CASES[name].random and name.startswith("random_k")
    assert same == [by_shared or not CASES[name].random, not by_shared]


slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
EAGER = ["identity", "sign"]
EAGER += map(slow, ("top_k", "random_k", "threshold"))
EAGER += map(slow, ("cast", "qsgd", "terngrad", "natural"))


@pytest.mark.parametrize("name", EAGER)
def test_compiled_over_workers_equals_eager_for_one(name):
    """Every family once, most of them `slow`: each operation compiles by itself."""
    c, layout = compressor(name), layout_of(name)
    levels = jnp.asarray(mixed_levels(len(c.levels))[-1])
    x = jnp.asarray(flat(layout, INPUTS["normal"]))
    units, x_hat, _ = c.encode(layout, x, levels, keys_of(0), c.init(layout))
    batch, _, fixed, _ = outcome(name)
    message, shared = c.pack(layout, units, levels, fixed[0].size)
    decoded = c.decode(layout, message[None], levels, shared)
    # Fusion may round differently, by one unit in the last place of a scale.
    for eager in (x_hat, decoded):
        eager = layout.clear_padding(eager)
        np.testing.assert_allclose(eager, batch[0, -1], rtol=0, atol=1e-6)


# --- Against straight-line references. -----------------------------------------------


def sent(name: str):
    """For each input and level vector: the values of the ladder, the layers that
    entered, what was sent of them, and the message at its exact length.
    """
    c, layout = compressor(name), layout_of(name)
    x_hat, message, *_ = outcome(name)
    words = c.words(layout)
    for i, levels in enumerate(mixed_levels(len(c.levels))):
        values = [c.levels[v] for v in levels]
        length = words[np.arange(SIZES.size), levels].sum()
        for j, layers in enumerate(INPUTS.values()):
            x = [layer.reshape(-1).astype(np.float64) for layer in layers]
            yield values, x, split(layout, x_hat[j, i]), message[j, i, :length]


def test_top_k_keeps_the_largest_and_of_equal_ones_the_first():
    for densities, x, x_hat, message in sent("top_k"):
        values = []
        for density, layer, result in zip(densities, x, x_hat, strict=True):
            k = max(1, int(density * layer.size + 1e-9))
            kept = np.sort(np.argsort(-np.abs(layer), kind="stable")[:k])
            expected = np.zeros(layer.size)
            expected[kept] = layer[kept]
            np.testing.assert_array_equal(result, expected.astype(np.float32))
            values.append(layer[kept].astype(np.float32))
        values = np.concatenate(values)
        np.testing.assert_array_equal(message[: values.size].view(np.float32), values)


def read_places(layout: Layout, k: int, message: np.ndarray, code: str) -> np.ndarray:
    """Places of the k entries in a message of one layer, from its documentation."""
    words = message[k:]
    if code == "plain":
        return words[:k].astype(int)
    if code == "bitmap":
        bits = (words[:, None] >> np.arange(32, dtype=np.uint32)) & 1
        return np.flatnonzero(bits)
    count = -(-layout.sizes[0] // 65536)
    begun = words[:count] if count > 1 else np.zeros(1, np.uint32)
    halves = words[len(begun) if count > 1 else 0 :].view(np.uint16)[:k]
    block = np.searchsorted(begun, np.arange(k), side="right") - 1
    return 65536 * block + halves


@pytest.mark.parametrize(
    "size, density, code",
    [
        (4096, 0.01, "blocks"),
        (4096, 0.2, "bitmap"),
        (200_000, 0.003, "blocks"),
        (200_000, 0.5, "bitmap"),
        (200_000, 2.6e-5, "plain"),  # 5 entries, fewer than counts of 4 blocks take
    ],
)
def test_places_have_the_shortest_of_three_codes(size, density, code):
    c = gcjax.top_k(density)
    layout = Layout(("w",), ((size,),), c.row)
    x = np.random.default_rng(0).standard_t(3, layout.size).astype(np.float32)
    x[size:] = 0
    k = int(size * density)
    kept = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
    (words,) = c.words(layout)[0]
    lengths = {
        "plain": k,
        "bitmap": -(-size // 32),
        "blocks": (k + 1) // 2 + (-(-size // 65536) if size > 65536 else 0),
    }
    assert words == k + min(lengths.values()) == k + lengths[code]

    @jax.jit
    def travel(x, levels):
        units, *_ = c.encode(layout, x, levels, keys_of(0), c.init(layout))
        message, _ = c.pack(layout, units, levels, int(words))
        return message, c.decode(layout, message[None], levels, ())

    message, decoded = travel(x, jnp.zeros(1, jnp.int32))
    found = read_places(layout, k, np.asarray(message), code)
    np.testing.assert_array_equal(found, kept)
    expected = np.zeros_like(x)
    expected[kept] = x[kept]
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("scale", [1.0, 1.3, 0.5])
def test_a_carried_threshold_counts_within_the_tolerance(scale):
    """Over all layers, at the first step, and at the next one whatever its scale."""
    c = gcjax.top_k(0.01, tolerance=0.02)
    layout = Layout(("a", "b"), ((300, 100), (90, 500)), c.row)
    rng = np.random.default_rng(0)
    encode = jax.jit(functools.partial(c.encode, layout))
    levels, state = jnp.zeros(2, jnp.int32), c.init(layout)
    for step in range(3):
        x = rng.normal(size=layout.size).astype(np.float32) * scale**step
        x = np.where(layout.valid().reshape(-1), x, 0).astype(np.float32)
        _, x_hat, state = encode(x, levels, keys_of(0), state)
        is_sent = np.asarray(x_hat) != 0
        assert 0.98 * 750 <= is_sent.sum() <= 750
        assert np.abs(x[is_sent]).min() > 2.4 * scale**step


def test_threshold_sends_the_first_entries_that_reach_it():
    for _, x, x_hat, _ in sent("threshold"):
        for layer, result in zip(x, x_hat, strict=True):
            room = max(1, int(ROOM * layer.size + 1e-9))
            kept = np.flatnonzero(np.abs(layer) >= np.float32(THRESHOLD))[:room]
            expected = np.zeros(layer.size)
            expected[kept] = layer[kept]
            np.testing.assert_array_equal(result, expected.astype(np.float32))


def test_random_k_keeps_k_entries_of_each_layer_as_they_are():
    for densities, x, x_hat, _ in sent("random_k"):
        for density, layer, result in zip(densities, x, x_hat, strict=True):
            k = max(1, int(density * layer.size + 1e-9))
            kept = result != 0
            assert kept.sum() == (k if layer.any() and layer.all() else kept.sum())
            np.testing.assert_array_equal(result[kept], layer[kept].astype(np.float32))


def read_codes(message, sizes, bits, groups, scales, unit, planes):
    """The documented formats, in plain Python: scales first, then units of codes.

    With `planes` a unit of n elements is `bits` planes of n / 32 words w; in bit
    8 j + s of word w stands element 4 (s n / 32 + w) + j. Without, codes of one bit lie
    in order.
    """
    head = int(np.sum(groups)) * scales
    layers_scales = np.split(
        message[:head].view(np.float32).reshape(-1, scales), np.cumsum(groups)[:-1]
    )
    at, codes, words = head, [], unit // 32
    for n, b in zip(sizes, bits, strict=True):
        code = np.zeros(-(-n // unit) * unit, int)
        for first in range(0, n, unit):
            for plane in range(b):
                for w in range(words):
                    for bit in range(32):
                        j, s = divmod(bit, 8)
                        element = 4 * (s * words + w) + j if planes else 32 * w + bit
                        value = (int(message[at + w]) >> bit) & 1
                        code[first + element] += value << plane
                at += words
        codes.append(code[:n])
    assert at == message.size
    return codes, layers_scales


@pytest.mark.parametrize(("name", "bucket"), [("nearest 32", 32), ("nearest 512", 512)])
def test_qsgd_to_nearest_equals_its_definition(name, bucket):
    groups = np.ceil(SIZES / bucket).astype(int)
    together = np.gcd(bucket, 256)
    for bits, x, x_hat, message in sent(f"qsgd {name}"):
        found, scales = read_codes(message, SIZES, bits, groups, 2, together, True)
        for b, layer, result, codes, ends in zip(
            bits, x, x_hat, found, scales, strict=True
        ):
            for i, start in enumerate(range(0, layer.size, bucket)):
                at = slice(start, min(start + bucket, layer.size))
                low, high = layer[at].min(), layer[at].max()
                unit = (high - low) / (2**b - 1)
                place = (layer[at] - low) / unit if unit else np.zeros(layer[at].size)
                code = np.floor(place + 0.5)
                # Where float32 cannot tell on which side of a tie a value lies.
                tie = np.abs(place + 0.5 - np.round(place + 0.5)) < 1e-4
                np.testing.assert_array_equal(codes[at][~tie], code[~tie])
                assert (np.abs(codes[at] - code) <= tie).all()
                np.testing.assert_array_equal(ends[i], [low, high])
                tolerance = 1e-6 * max(abs(low), abs(high))
                assert (
                    np.abs(result[at] - (low + codes[at] * unit)) <= tolerance
                ).all()
                assert (
                    np.abs(result[at] - layer[at]) <= unit / 2 + 2 * tolerance
                ).all()


def test_qsgd_l2_to_nearest_equals_its_definition():
    for bits, x, x_hat, _ in sent("qsgd l2 nearest"):
        for b, layer, result in zip(bits, x, x_hat, strict=True):
            for start in range(0, layer.size, 1024):
                part = layer[start : start + 1024]
                norm = np.sqrt(np.sum(part**2))
                unit = norm / (2 ** (b - 1) - 1)
                got = result[start : start + 1024]
                # On the grid, as near as it gets, and not beyond the norm. Norms are
                # float32 sums of up to 1024 squares.
                tolerance = 2e-6 * norm
                code = np.round(got / unit) if unit else 0 * got
                assert (np.abs(got - code * unit) <= tolerance).all()
                assert (np.abs(got - part) <= unit / 2 + tolerance).all()
                assert (np.abs(got) <= norm + tolerance).all()


@pytest.mark.parametrize(("name", "bucket"), [("sign", None), ("sign 64", 64)])
def test_sign_sends_signs_and_mean_magnitudes(name, bucket):
    unit = np.gcd(bucket or 1024, 256)
    for _, x, x_hat, message in sent(name):
        groups = [1 if bucket is None else -(-n // bucket) for n in SIZES]
        bits = [1] * SIZES.size
        codes, _ = read_codes(message, SIZES, bits, groups, 1, unit, False)
        for layer, result, code in zip(x, x_hat, codes, strict=True):
            np.testing.assert_array_equal(code, layer >= 0)
            for start in range(0, layer.size, bucket or layer.size):
                part = layer[start : start + (bucket or layer.size)]
                scale = np.mean(np.abs(part))
                np.testing.assert_allclose(
                    result[start : start + part.size],
                    np.where(part >= 0, scale, -scale),
                    rtol=1e-6,  # a float32 sum
                )


@pytest.mark.parametrize(("name", "clip"), [("", 1e9), (" clipped", 2.5)])
def test_terngrad_sends_three_values(name, clip):
    for (_, x, x_hat, _), case in zip(sent("terngrad" + name), INPUTS, strict=True):
        if clip == 2.5 and case in ("tiny", "huge"):
            continue  # the square of the deviation is no float32
        for layer, result in zip(x, x_hat, strict=True):
            deviation = np.sqrt(np.mean(layer**2))
            s = min(np.abs(layer).max(), clip * deviation)
            ternary = np.round(result / s) if s else 0 * result
            assert set(ternary) <= {-1, 0, 1}
            assert (ternary * layer >= 0).all(), "a sign changed"
            np.testing.assert_allclose(result, ternary * s, rtol=1e-6)
            # The largest are sent for sure; float32 rounds s by less than 1e-7.
            assert (ternary != 0)[(np.abs(layer) >= s * (1 - 1e-7)) & (s > 0)].all()


def test_natural_rounds_to_a_neighbouring_power_of_two():
    rounded_up = 0
    for _, x, x_hat, _ in sent("natural"):
        for layer, result in zip(x, x_hat, strict=True):
            np.testing.assert_array_equal(np.sign(result), np.sign(layer))
            mantissa, exponent = np.frexp(np.abs(layer))
            low = np.where(layer == 0, 0, np.ldexp(1.0, exponent - 1))
            up = np.abs(result) == 2 * low
            assert (up | (np.abs(result) == low)).all()
            assert not up[mantissa == 0.5].any(), "a power of two is not a fixed point"
            rounded_up += up[layer != 0].sum()
    assert rounded_up > 0


def test_cast_rounds_to_the_nearest_bfloat16():
    for _, x, x_hat, _ in sent("cast"):
        for layer, result in zip(x, x_hat, strict=True):
            expected = jnp.asarray(layer, jnp.float32).astype(jnp.bfloat16)
            np.testing.assert_array_equal(result, np.asarray(expected, np.float32))
            assert (np.abs(result - layer) <= 2.0**-8 * np.abs(layer)).all()


# --- Over many draws: the tables of errors, and what the properties promise. ---------

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


# --- Bad input. ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        *[
            (
                functools.partial(make, value),
                rf"density: must be in \(0, 1\], got {text}",
            )
            for make in (gcjax.top_k, gcjax.random_k)
            for value, text in [(0, "0"), (1.5, "1.5"), (-0.1, "-0.1")]
        ],
        (lambda: gcjax.top_k(float("nan")), "density: .* got nan"),
        (lambda: gcjax.top_k((0.1, 2.0)), "density: .* got 2"),
        (lambda: gcjax.top_k(()), "density: the ladder is empty"),
        (lambda: gcjax.threshold(0.5, density=0), "density: .* got 0"),
        (lambda: gcjax.threshold(0), "threshold: value must be positive, got 0"),
        (lambda: gcjax.threshold(-1.0), "threshold: value must be positive"),
        (lambda: gcjax.threshold(float("nan")), "threshold: value .* got nan"),
        (lambda: gcjax.qsgd(0), r"bits .* integers in \[1, 8\], got 0"),
        (lambda: gcjax.qsgd(9), r"bits .* integers in \[1, 8\], got 9"),
        (lambda: gcjax.qsgd(1, norm="l2"), r"bits with norm l2.* \[2, 8\], got 1"),
        (lambda: gcjax.qsgd(2.5), "bits .* must be integers .* got 2.5"),
        (lambda: gcjax.qsgd(True), "bits .* must be integers .* got True"),
        (lambda: gcjax.qsgd([]), "bits .* the ladder is empty"),
        (lambda: gcjax.qsgd(4, 0), "bucket_size must be .* multiple of 32, got 0"),
        (lambda: gcjax.qsgd(4, 33), "bucket_size must be .* multiple of 32, got 33"),
        (lambda: gcjax.qsgd(4, norm="max"), "norm must be 'max_min' or 'l2', got 'max"),
        (lambda: gcjax.qsgd(4, rounding="up"), "rounding must be .* got 'up'"),
        (lambda: gcjax.sign(33), "bucket_size must be .* multiple of 32, got 33"),
        (lambda: gcjax.sign(0), "bucket_size must be .* multiple of 32, got 0"),
        (lambda: gcjax.terngrad(0), "clip must be positive or None, got 0"),
        (lambda: gcjax.terngrad(-1.0), "clip must be positive or None, got -1"),
        (lambda: gcjax.power_sgd(0), r"rank: must be integers in \[1, .*\], got 0"),
        (lambda: gcjax.power_sgd(()), "rank: the ladder is empty"),
        (
            lambda: base.level_index((0.01, 0.1), 0.05),
            "level 0.05 is not on .* 0.01, 0",
        ),
        (lambda: base.level_index((2, 4, 8), 3), "level 3 is not on .* 2, 4, 8"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_the_cause(make, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_ladders_are_sorted_sets_and_levels_are_found_on_them():
    assert gcjax.top_k([0.1, 0.01, 0.1]).levels == (0.01, 0.1)
    assert gcjax.qsgd(np.array([8, 2])).levels == (2, 8)
    assert base.level_index((0.01, 0.1), 0.1 * (1 + 1e-9)) == 1
    assert base.level_index((2, 4, 8), 8) == 2


# --- The structure of the package. ---------------------------------------------------

PACKAGE = pathlib.Path(gcjax.__file__).parent


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
del MODULES["gcjax"]  # the root
PUBLIC = {name: getattr(gcjax, name) for name in gcjax.__all__}
FACTORIES = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isfunction(thing) and thing.__module__.startswith("gcjax.compressors")
]


@pytest.mark.parametrize("name", [*FACTORIES, "power_sgd"])
def test_every_factory_documents_payload_properties_and_references(name):
    text = inspect.getdoc(PUBLIC[name])
    for part in ("Payload:", "Properties:", "References:"):
        assert part in text


def test_every_public_compressor_is_in_the_table():
    assert len(FACTORIES) >= 9
    # Its message has one length, whatever the levels are; see test_packets.py.
    others = {"fed_cvlc"}
    assert set(FACTORIES) - others == {compressor(name).name for name in CASES}


@pytest.mark.parametrize("module", [m for m in MODULES if ".compressors." in m])
def test_compressors_do_not_communicate(module):
    text = MODULES[module].read_text()
    for word in ("psum", "all_gather", "axis_name", "ppermute", "all_to_all"):
        assert word not in text


COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "psum_scatter"),
    *("ppermute", "pshuffle", "pswapaxes", "all_gather_invariant"),
}


@pytest.mark.parametrize("module", MODULES)
def test_collectives_stand_in_one_file(module):
    tree = ast.parse(MODULES[module].read_text())
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    # The second one's are over problems that are solved side by side, not over workers.
    wanted = module in ("gcjax.collectives", "gcjax.pact.cells")
    assert bool(names & COLLECTIVES) == wanted


def imports_of(module: str) -> set[str]:
    """Modules of gcjax that a module imports at its top; "gcjax" is the root."""
    found = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "gcjax"}


def test_imports_have_no_cycle():
    """Repeatedly take away what imports nothing that is left."""
    left = {module: imports_of(module) & set(MODULES) for module in MODULES}
    while left:
        free = [module for module, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle of imports among {sorted(left)}"
        for module in free:
            del left[module]


def test_no_module_below_imports_the_root():
    """Which imports them: that is how cycles start."""
    loaded = imports_of_root()
    for module in loaded:
        assert "gcjax" not in imports_of(module), module


def imports_of_root() -> set[str]:
    """Modules that `import gcjax` runs."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    queue = [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
    found = set()
    while queue:
        module = queue.pop()
        if module in MODULES and module not in found:
            found.add(module)
            queue += imports_of(module)
    return found
