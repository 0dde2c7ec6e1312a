"""Quantisers: send every entry, in few bits.

All share one message: codes of `width` bits, laid out in bit planes of 32 elements to a
word, plane after plane within a layer, so that a layer's level is how many planes of it
are sent; before them the scales, a few numbers per bucket or per layer, sent in full.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import base, wire
from gcjax.base import Compressor, Keys, Layout

_ROW = 1024  # elements per row where a bucket size is not given


def qsgd(
    bits: int | Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    bucket_size: int = 1024,
    norm: str = "max_min",
    rounding: str = "stochastic",
) -> Compressor:
    """Quantises buckets of each layer uniformly to a few bits.

    With `norm="max_min"` (CGX) the codes 0 .. 2^b - 1 divide a bucket's range; with
    `norm="l2"` (QSGD) the codes 0 .. 2 s divide [-||x||, ||x||], s = 2^(b-1) - 1.

    Args:
      bits: Bits per element, 1..8 ("l2" has no 1, it needs a code for zero); one, or a
        ladder.
      bucket_size: Elements that share a scale, a positive multiple of 32. A layer's
        last bucket may be shorter.
      norm: "max_min" or "l2".
      rounding: "stochastic" (unbiased) or "nearest" (CGX's default).

    Payload: per bucket `low` and `high` (max_min) or the norm (l2), float32; per layer
      of n elements b * ceil(n / 32) words of codes.
    Properties: `stochastic` is unbiased. In the worst case (two large entries, all
      others half a unit off a code) omega = d / (2 (2^b - 1)^2) for max_min and
      d / (4 s^2) for l2, in buckets of d elements. On normally distributed buckets the
      relative error is far smaller, and error feedback is on at exactly the levels
      where it is below 1 there: at d = 1024 and stochastic rounding max_min from 2
      bits and l2 from 5 bits.
    Raises:
      ValueError: for bits, bucket size, norm or rounding out of range.
    References: Alistarh et al., 2017, QSGD: Communication-Efficient SGD via Gradient
      Quantization and Encoding, arXiv:1610.02132; Markov et al., 2022, CGX: Adaptive
      System Support for Communication-Efficient Deep Learning, arXiv:2111.08617.
    Note: Codes have a fixed width; QSGD's Elias coding is not applied. CGX sends the
      unit where we send `high`, which is the same size and independent of the level.
    """
    if norm not in ("max_min", "l2"):
        raise ValueError(f"qsgd: norm must be 'max_min' or 'l2', got {norm!r}")
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(
            f"qsgd: rounding must be 'stochastic' or 'nearest', got {rounding!r}"
        )
    _check_bucket("qsgd", bucket_size)
    bits = base.ladder(bits, f"bits with norm {norm}", 1 if norm == "max_min" else 2, 8)
    stochastic = rounding == "stochastic"

    def measure(layout: Layout, x: jax.Array) -> jax.Array:
        if norm == "l2":
            largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
            relative = x / jnp.where(largest > 0, largest, 1)  # squares stay finite
            return largest * jnp.sqrt(jnp.sum(relative**2, axis=1, keepdims=True))
        valid = layout.valid()
        low = jnp.min(jnp.where(valid, x, jnp.inf), axis=1)
        high = jnp.max(jnp.where(valid, x, -jnp.inf), axis=1)
        return jnp.stack([low, high], axis=1)

    def last_code(width: jax.Array) -> jax.Array:
        return ((1 << width) - (2 if norm == "l2" else 1))[:, None]

    def grid(scales: jax.Array, width: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Value of code 0 and unit of every row, float32[R, 1] each."""
        low = -scales[:, :1] if norm == "l2" else scales[:, :1]
        high = scales[:, -1:]
        return low, (high - low) / last_code(width).astype(jnp.float32)

    def encode(x, scales, width, key):
        low, unit = grid(scales, width)
        up = wire.noise(key, x.size).reshape(x.shape) if stochastic else 0.5
        codes = jnp.floor((x - low) / jnp.where(unit > 0, unit, 1) + up)
        return jnp.clip(codes.astype(jnp.int32), 0, last_code(width))

    def decode(codes, scales, width):
        low, unit = grid(scales, width)
        return low + codes.astype(jnp.float32) * unit

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        """Expected squared error, exact for "nearest"; one pass for each width."""
        x = x.reshape(-1, bucket_size)
        scales, table = measure(layout, x), []
        for b in bits:
            low, unit = grid(scales, jnp.full((layout.num_rows,), b, jnp.int32))
            at = (x - low) / jnp.where(unit > 0, unit, 1)
            loss = jnp.where(layout.valid(), _rounding_loss(at, stochastic), 0)
            table.append(layout.sum_rows(jnp.sum(loss, axis=1) * unit[:, 0] ** 2))
        return jnp.stack(table, axis=1)

    return _quantiser(
        name="qsgd",
        levels=bits,
        widths=bits,
        row=bucket_size,
        contraction=tuple(
            _normal_error(b, bucket_size, norm, stochastic) < 0.999 for b in bits
        ),
        scales=_Scales(1 if norm == "l2" else 2, per_layer=False, measure=measure),
        encode=encode,
        decode=decode,
        errors=errors,
    )


def sign(bucket_size: int | None = None) -> Compressor:
    """Sends signs, and the mean magnitude of each layer or bucket.

    Args:
      bucket_size: Elements that share a scale, a positive multiple of 32; None for one
        scale per layer.

    Payload: one float32 per layer or bucket; one bit per element.
    Properties: contraction, ||x - C(x)||^2 = (1 - ||x||_1^2 / (n ||x||_2^2)) ||x||^2
      over each n that share a scale; biased, so it wants error feedback.
    Raises:
      ValueError: for a bucket size that is not a positive multiple of 32.
    References: Karimireddy et al., 2019, Error Feedback Fixes SignSGD and other
      Gradient Compression Schemes, arXiv:1901.09847.
    Note: Zero counts as positive; one bit has no third value.
    """
    per_layer = bucket_size is None
    row = _ROW if per_layer else bucket_size
    _check_bucket("sign", row)

    def measure(layout: Layout, x: jax.Array) -> jax.Array:
        total, count = jnp.sum(jnp.abs(x), axis=1), layout.row_valid
        if per_layer:
            total, count = layout.sum_rows(total), layout.sizes
        return (total / count.astype(np.float32))[:, None]

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, row)
        scales = measure(layout, x)
        scales = scales[layout.row_layer] if per_layer else scales
        rest = jnp.where(layout.valid(), jnp.abs(x) - scales, 0)
        return layout.sum_rows(jnp.sum(rest**2, axis=1))[:, None]

    return _quantiser(
        name="sign",
        levels=(1,),
        widths=(1,),
        row=row,
        contraction=(True,),
        scales=_Scales(1, per_layer, measure),
        encode=lambda x, scales, width, key: (x >= 0).astype(jnp.int32),
        decode=lambda codes, scales, width: jnp.where(codes > 0, scales, -scales),
        errors=errors,
    )


def terngrad(clip: float | None = None) -> Compressor:
    """Sends -s, 0 or s, with s the largest magnitude of each layer.

    The magnitude of the code is drawn with probability |x| / s.

    Args:
      clip: First clip each layer at this many standard deviations around 0 (the paper
        uses 2.5), which makes it biased; None for no clipping.

    Payload: one float32 per layer; two bits per element.
    Properties: unbiased without clipping; omega = s ||x||_1 / ||x||_2^2 - 1, mostly
      above 1, so error feedback is off.
    Raises:
      ValueError: for a clip that is not positive.
    References: Wen et al., 2017, TernGrad: Ternary Gradients to Reduce Communication
      in Distributed Deep Learning, arXiv:1705.07878.
    Note: Each worker has its own s, where the paper shares the largest one. Two bits
      per element, where log2(3) would be enough.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"terngrad: clip must be positive or None, got {clip}")

    def measure(layout: Layout, x: jax.Array) -> jax.Array:
        largest = layout.max_rows(jnp.max(jnp.abs(x), axis=1))
        if clip is not None:
            energy = layout.sum_rows(jnp.sum(x**2, axis=1))
            deviation = jnp.sqrt(energy / layout.sizes.astype(np.float32))
            largest = jnp.minimum(largest, clip * deviation)
        return largest[:, None]

    def encode(x, scales, width, key):
        del width
        drawn = wire.noise(key, x.size).reshape(x.shape) * scales < jnp.abs(x)
        return 1 + jnp.where(drawn, jnp.sign(x), 0).astype(jnp.int32)

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, _ROW)
        scales = measure(layout, x)[layout.row_layer]
        kept = jnp.minimum(jnp.abs(x), scales)
        loss = kept * (scales - kept) + (jnp.abs(x) - kept) ** 2
        return layout.sum_rows(jnp.sum(loss, axis=1))[:, None]

    return _quantiser(
        name="terngrad",
        levels=(2,),
        widths=(2,),
        row=_ROW,
        contraction=(False,),
        scales=_Scales(1, True, measure),
        encode=encode,
        decode=lambda codes, scales, width: (codes - 1).astype(jnp.float32) * scales,
        errors=errors,
    )


def natural() -> Compressor:
    """Rounds each entry stochastically to a neighbouring power of two.

    Payload: nine bits per element: the sign and the exponent.
    Properties: unbiased, omega = 1/8, so error feedback is on.
    References: Horvath et al., 2019, Natural Compression for Distributed Deep
      Learning, arXiv:1905.10988.
    Note: Magnitudes below 2^-126 are rounded between 0 and 2^-126.
    """

    def encode(x, scales, width, key):
        del scales, width
        bits = wire.to_words(x).astype(jnp.uint32)
        mantissa = (bits & 0x7FFFFF).astype(jnp.float32) * np.float32(2**-23)
        up = wire.noise(key, x.size).reshape(x.shape) < mantissa
        exponent = ((bits >> 23) & 0xFF).astype(jnp.int32) + up.astype(jnp.int32)
        return jnp.minimum(exponent, 254) | ((bits >> 31).astype(jnp.int32) << 8)

    def decode(codes, scales, width):
        del scales, width
        words = ((codes & 0xFF) << 23) | ((codes >> 8) << 31)
        return wire.to_floats(words.astype(jnp.uint32))

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, _ROW)
        low = jnp.abs(wire.to_floats(wire.to_words(x) & jnp.uint32(0xFF800000)))
        rest = jnp.abs(x) - low
        return layout.sum_rows(jnp.sum(rest * (low - rest), axis=1))[:, None]

    return _quantiser(
        name="natural",
        levels=(9,),
        widths=(9,),
        row=_ROW,
        contraction=(True,),
        scales=_Scales(0, True, lambda layout, x: jnp.zeros((layout.num_layers, 0))),
        encode=encode,
        decode=decode,
        errors=errors,
    )


def cast() -> Compressor:
    """Rounds each entry to bfloat16.

    Payload: 16 bits per element, carried as integers, which no backend widens.
    Properties: contraction, ||x - C(x)|| <= 2^-8 ||x||.
    References: Kalamkar et al., 2019, A Study of BFLOAT16 for Deep Learning Training,
      arXiv:1905.12322.
    Note: It travels by all-gather like every message here, (N - 1) times 16 bits per
      element, where a reduce-scatter would need about 32.
    """

    def round_(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16)

    def encode(x, scales, width, key):
        del scales, width, key
        return lax.bitcast_convert_type(round_(x), jnp.uint16).astype(jnp.int32)

    def decode(codes, scales, width):
        del scales, width
        return wire.to_floats(codes.astype(jnp.uint32) << 16)

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        rest = (x - round_(x).astype(jnp.float32)).reshape(-1, _ROW)
        return layout.sum_rows(jnp.sum(rest**2, axis=1))[:, None]

    return _quantiser(
        name="cast",
        levels=(16,),
        widths=(16,),
        row=_ROW,
        contraction=(True,),
        scales=_Scales(0, True, lambda layout, x: jnp.zeros((layout.num_layers, 0))),
        encode=encode,
        decode=decode,
        errors=errors,
    )


def identity() -> Compressor:
    """Sends everything, by all-reduce.

    Payload: 32 bits per element.
    Properties: exact.
    References: none; the baseline of all others.
    """
    return Compressor(
        name="identity",
        levels=(32,),
        row=1,
        contraction=(True,),
        linear=True,
        words=lambda layout: layout.sizes[:, None],
        errors=lambda layout, x: jnp.zeros((layout.num_layers, 1)),
        encode=lambda layout, x, levels, keys: (x, x),
        pack=lambda layout, units, levels, capacity: (
            wire.fit(wire.to_words(units), capacity)[None],
            (),
        ),
        decode=lambda layout, messages, levels, shared: wire.to_floats(
            messages[0, 0, : layout.size]
        ),
    )


class _Scales(NamedTuple):
    """The scales of a message."""

    count: int  # float32 numbers for each bucket or layer
    per_layer: bool
    measure: Callable  # (layout, x [R, row]) -> float32[R or L, count]


class Codes(NamedTuple):
    """The units of a quantiser."""

    planes: jax.Array  # uint32[widest, size / 32]
    scales: jax.Array  # float32[R or L, count]


def _quantiser(
    *,
    name: str,
    levels: tuple[int, ...],
    widths: tuple[int, ...],
    row: int,
    contraction: tuple[bool, ...],
    scales: _Scales,
    encode: Callable,  # (x [R, row], scales [R, k], width [R], key) -> codes [R, row]
    decode: Callable,  # (codes [R, row], scales [R, k], width [R]) -> float32[R, row]
    errors: Callable,
) -> Compressor:
    """Builds a compressor from the meaning of its codes."""

    def scale_words(layout: Layout) -> np.ndarray:
        """Words of scales of each layer, int64[L]."""
        return scales.count * (1 if scales.per_layer else layout.rows)

    def code_words(layout: Layout) -> np.ndarray:
        """Words of one bit plane of each layer, int64[L]."""
        return -(-layout.sizes // wire.WORD)

    def words(layout: Layout) -> np.ndarray:
        planes = code_words(layout)[:, None] * np.array(widths)
        return (
            planes + np.broadcast_to(scale_words(layout), layout.sizes.shape)[:, None]
        )

    def spread(layout: Layout, values: jax.Array) -> jax.Array:
        return values[layout.row_layer] if scales.per_layer else values

    def value(layout: Layout, codes: jax.Array, s: jax.Array, width: jax.Array):
        x_hat = decode(codes, spread(layout, s), width[layout.row_layer])
        return jnp.where(layout.valid(), x_hat, 0).reshape(-1)

    def encode_all(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys):
        x = x.reshape(-1, row)
        width = jnp.array(widths, jnp.int32)[levels]
        s = scales.measure(layout, x)
        codes = encode(x, spread(layout, s), width[layout.row_layer], keys.worker)
        # Without the barrier every plane would compute the codes again.
        stored = lax.optimization_barrier(codes)
        bits = (stored.reshape(1, -1) >> np.arange(max(widths))[:, None]) & 1
        return Codes(wire.pack_bits(bits), s), value(layout, codes, s, width)

    def pack(layout: Layout, units: Codes, levels: jax.Array, capacity: int):
        width = jnp.array(widths, jnp.int32)[levels]
        plane_words = jnp.asarray(code_words(layout), jnp.int32)
        head = wire.to_words(units.scales.reshape(-1))
        layer, offset, used = wire.segments(
            width * plane_words, max(0, capacity - head.size)
        )
        first = jnp.asarray(layout.first_row * (row // wire.WORD), jnp.int32)
        plane, word = offset // plane_words[layer], offset % plane_words[layer]
        body = units.planes[plane, first[layer] + word]
        message = jnp.concatenate([head, jnp.where(used, body, 0)])
        return wire.fit(message, capacity)[None], ()

    def unpack(layout: Layout, message: jax.Array, width: jax.Array) -> jax.Array:
        """The codes of a message, int32[R, row]."""
        count = code_words(layout)
        word_layer = np.repeat(layout.row_layer, row // wire.WORD)
        first = layout.first_row * (row // wire.WORD)
        within = np.arange(word_layer.size) - first[word_layer]
        lengths = width * jnp.asarray(count, jnp.int32)
        start = (jnp.cumsum(lengths) - lengths)[word_layer] + within
        plane = np.arange(max(widths))[:, None]
        sent = (plane < width[word_layer]) & (within < count[word_layer])
        words = message.at[start + plane * count[word_layer]].get(mode="clip")
        # Likewise every element would fetch its word again.
        words = lax.optimization_barrier(jnp.where(sent, words, 0))
        bits = wire.unpack_bits(words).astype(jnp.int32)
        return jnp.sum(bits << plane, axis=0).reshape(-1, row)

    def decode_mean(layout: Layout, messages: jax.Array, levels: jax.Array, shared):
        del shared
        width = jnp.array(widths, jnp.int32)[levels]
        shape = (
            layout.num_layers if scales.per_layer else layout.num_rows,
            scales.count,
        )
        head = int(np.prod(shape))

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            s = wire.to_floats(messages[i, 0, :head]).reshape(shape)
            codes = unpack(layout, messages[i, 0, head:], width)
            return total + value(layout, codes, s, width)

        zero = jnp.zeros((layout.size,), jnp.float32)
        return lax.fori_loop(0, messages.shape[0], add, zero) / messages.shape[0]

    return Compressor(
        name=name,
        levels=levels,
        row=row,
        contraction=contraction,
        linear=False,
        words=words,
        errors=errors,
        encode=encode_all,
        pack=pack,
        decode=decode_mean,
    )


def _check_bucket(name: str, bucket_size: int) -> None:
    if bucket_size < 1 or bucket_size % wire.WORD:
        raise ValueError(
            f"{name}: bucket_size must be a positive multiple of 32, got {bucket_size}"
        )


def _rounding_loss(at: jax.Array, stochastic: bool) -> jax.Array:
    """Expected squared rounding error, in squared units, of positions on the grid."""
    part = at - jnp.floor(at)
    return part * (1 - part) if stochastic else jnp.minimum(part, 1 - part) ** 2


def _normal_error(bits: int, bucket_size: int, norm: str, stochastic: bool) -> float:
    """Expected squared error per squared entry of a normally distributed bucket."""
    if norm == "l2":
        reach, codes = np.sqrt(bucket_size), 2**bits - 2
    else:  # the expected largest of d normal numbers (Blom, 1958)
        quantile = (bucket_size - 0.375) / (bucket_size + 0.25)
        reach, codes = statistics.NormalDist().inv_cdf(quantile), 2**bits - 1
    unit = 2 * reach / codes
    x = np.linspace(-6, 6, 4001)
    weight = np.exp(-(x**2) / 2) * (np.abs(x) <= reach)
    part = ((x + reach) / unit) % 1
    loss = part * (1 - part) if stochastic else np.minimum(part, 1 - part) ** 2
    return float(unit**2 * np.sum(weight * loss) / np.sum(weight))
