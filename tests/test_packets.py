"""Fed-CVLC: widths against exhaustive search, bits on the wire, error feedback."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import N, info, trainer

import gcjax
from gcjax.base import Layout
from gcjax.compressors import packets as packets_module
from gcjax.compressors.packets import WIDTHS, fed_cvlc

LAYOUT = Layout(("a", "b"), ((40, 33), (500,)), 32)


def heavy(seed, power=2.0):
    rng = np.random.default_rng(seed)
    layers = [rng.standard_t(power, s).astype(np.float32) for s in LAYOUT.shapes]
    return LAYOUT.flatten([jnp.asarray(x) for x in layers])


def losses(x, packet_bytes, model):
    """What is minimised, in float64 and loops: a function of the widths."""
    x = np.sort(np.abs(np.asarray(x, np.float64)))[::-1]
    before = np.append(0, np.cumsum(x**2))
    place = int(np.ceil(np.log2(LAYOUT.size)))

    def loss(widths):
        at, lost = 0, 0.0
        for b in widths:
            k = (8 * packet_bytes - 64) // (b + place)
            end = min(at + k, len(x))
            if model == "grid":
                lost += (end - at) * (x[at] / (2 ** (b - 1) - 1)) ** 2 / 12
            else:
                q = np.sqrt(k) if model == "pq" else k
                lost += q / 4**b * (before[end] - before[at])
            at = end
        return (lost + before[-1] - before[at]) / before[-1]

    return loss


@functools.cache
def encoder(packets, packet_bytes, every=50, **options):
    compressor = fed_cvlc(packets, packet_bytes, every, **options)
    return compressor, jax.jit(functools.partial(compressor.encode, LAYOUT))


def encode(*arguments, x, state=None, levels=(0, 0), **options):
    compressor, run = encoder(*arguments, **options)
    state = compressor.init(LAYOUT) if state is None else state
    return run(x, jnp.asarray(levels, jnp.int32), None, state)


@pytest.mark.parametrize("model", packets_module.MODELS)
def test_widths_against_exhaustive_search(model):
    for packets, size, power in ((2, 200, 1.0), (3, 128, 2.0), (3, 128, 8.0)):
        x = heavy(packets, power)
        _, _, state = encode(packets, size, model=model, x=x)
        loss = losses(x, size, model)
        own = loss(np.asarray(state.widths))
        best = min(map(loss, itertools.product(WIDTHS, repeat=packets)))
        assert best <= own * (1 + 1e-12) and own <= best * (1 + 1e-5)


def test_heavy_tails_want_wider_codes_for_larger_values():
    _, _, state = encode(3, 128, x=heavy(0, 1.0))
    widths = np.asarray(state.widths)
    assert widths[0] > widths[-1] and len(set(widths)) > 1


def read_bits(message, start, width):
    return sum(
        int(message[(start + i) // 32] >> np.uint32((start + i) % 32) & 1) << i
        for i in range(width)
    )


@pytest.mark.parametrize("bits", [None, 2, 10, 32])
def test_a_message_is_what_its_documentation_says(bits):
    compressor, x = fed_cvlc(3, 128, bits=bits), heavy(3)
    units, x_hat, state = encode(3, 128, bits=bits, x=x)
    words = compressor.words(LAYOUT)
    assert words.shape == (2, 1) and words.sum() == 3 * 128 / 4
    message, shared = compressor.pack(LAYOUT, units, jnp.zeros(2, jnp.int32), 96)
    found, message = np.zeros(LAYOUT.size), np.asarray(message).reshape(3, 32)
    places = []
    for i, packet in enumerate(message):
        count, width = int(packet[0] & 0xFFFFFF), int(packet[0] >> 24)
        assert width == (bits or int(state.widths[i]))
        assert count == (1024 - 64) // (width + 11)
        scale = packet[1:2].view(np.float32)[0]
        for j in range(count):
            place = read_bits(packet, 64 + 11 * j, 11)
            code = read_bits(packet, 64 + 11 * count + width * j, width)
            half = 2 ** (width - 1)
            value = (code % half) / (half - 1) * scale * (-1 if code >= half else 1)
            if width == 32:
                value = np.uint32(code).view(np.float32)
            found[place] += value
            places.append(place)
    np.testing.assert_allclose(x_hat, found, rtol=1e-6)
    decode = jax.jit(lambda message: compressor.decode(LAYOUT, message, None, shared))
    np.testing.assert_array_equal(decode(units.packets.reshape(1, -1)), x_hat)
    largest = np.sort(np.abs(x))[::-1][: len(places)]
    np.testing.assert_array_equal(np.abs(x)[np.array(places)], largest)


@pytest.mark.parametrize("bits", [None, 2, 10, 32])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_contraction_and_conservation(bits, scale):
    x = heavy(4, 1.5) * jnp.float32(scale)
    compressor = fed_cvlc(3, 128, bits=bits)
    _, x_hat, _ = encode(3, 128, bits=bits, x=x)
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    # Every entry moves towards its value or stays unsent.
    assert (np.abs(x - x_hat) <= np.abs(x) * (1 + 1e-6)).all()
    assert scale == 0 or np.sum((x - x_hat) ** 2) < 0.9999 * np.sum(x**2)
    if scale == 1:
        errors = jax.jit(functools.partial(compressor.errors, LAYOUT))
        lost = errors(jnp.asarray(x, jnp.float32))
        parts = [(x - x_hat)[: 40 * 33 + 24], (x - x_hat)[40 * 33 + 24 :]]
        np.testing.assert_allclose(lost[:, 0], [np.sum(p**2) for p in parts], rtol=1e-4)


def test_beats_every_fixed_width_at_equal_packets():
    """On heavy tails the chosen widths lose less energy than any one width."""
    for seed in range(4):
        x = heavy(seed, 1.5)
        widths = (None, 6, 8, 10, 12, 32)
        made = [encode(3, 128, bits=bits, x=x)[1] for bits in widths]
        chosen, *fixed = [float(jnp.sum((x_hat - x) ** 2)) for x_hat in made]
        assert chosen < min(fixed)


def test_solves_again_every_r_rounds():
    flat, steep, state = jnp.sign(heavy(0)), heavy(1, 1.0) ** 3, None
    seen = []
    for x in (flat, steep, steep, steep, flat):
        _, _, state = encode(3, 128, 3, x=x, state=state)
        seen.append(tuple(np.asarray(state.widths)))
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


def test_a_layer_that_is_not_sent_stays():
    _, x_hat, _ = encode(3, 128, x=heavy(0), levels=[-1, 0])
    assert not np.any(x_hat[: 40 * 33]) and np.any(x_hat[40 * 33 + 24 :])


def test_mean_over_workers_with_error_feedback(mesh):
    """Through the aggregator: vmap = shard_map, bytes, and nothing is lost."""
    params = {"w": jnp.zeros((40, 33)), "b": jnp.zeros(500)}
    tx = gcjax.compressed_mean(
        fed_cvlc(2, 256), compress=lambda path, shape: True, axis_name="workers"
    )
    rng = np.random.default_rng(0)
    grads = [
        jax.tree.map(
            lambda p: jnp.asarray(rng.standard_t(2, (N, *p.shape)), jnp.float32), params
        )
        for _ in range(6)
    ]
    results = []
    for where in (None, mesh):
        train = trainer(tx, params, where)
        state, total = train.init(params), jax.tree.map(jnp.zeros_like, params)
        for g in grads:
            mean, state = train.update(state, g)
            total = jax.tree.map(jnp.add, total, mean)
        # One word more tells whether the gradient was finite.
        assert int(info(state).words.gathered) == 2 * 256 / 4 + 1
        results.append(total)
        layout = tx.layout(params)
        error = layout.unflatten(np.asarray(state.worker.value.error).mean(0))
        error = dict(zip(layout.paths, error, strict=True))
        for name in params:
            entered = sum(np.asarray(g[name]).mean(0) for g in grads)
            np.testing.assert_allclose(total[name] + error[name], entered, atol=2e-5)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((0, 64), "packets must be >= 1"),
        ((1, 65), "multiple of 4"),
        ((1, 64, 0), "every must be >= 1"),
        ((1, 64, 1, "best"), "model one of"),
        ((1, 64, 1, "pq", 20), "bits must be in 2..16 or 32"),
    ],
)
def test_bad_arguments(arguments, text):
    names = ("packets", "packet_bytes", "every", "model", "bits")
    with pytest.raises(ValueError, match=text):
        fed_cvlc(**dict(zip(names, arguments, strict=False)))


def test_a_packet_must_have_room():
    large = Layout(("a",), ((2**21, 32),), 32)  # 26 bits for a place
    for bits in (None, 32):
        with pytest.raises(ValueError, match="too small for one of 67108864 elements"):
            fed_cvlc(1, 12, bits=bits).words(large)
