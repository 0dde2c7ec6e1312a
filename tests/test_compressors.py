"""The contract that every compressor keeps, and each family beside its definition.

Every compressor runs compiled once, on a stack of inputs, levels and keys, from
`encode` to `decode` (`messages`).
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import (
    CASES,
    INPUTS,
    ROOM,
    SHAPES,
    SIZES,
    THRESHOLD,
    compressor,
    flat,
    keys_of,
    layout_of,
    split,
    stack,
)
from conftest import slow

import gcjax
from gcjax import base
from gcjax.base import Layout

cases = pytest.mark.parametrize("name", CASES)


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
