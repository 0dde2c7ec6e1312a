"""Quantisers: send every entry, in few bits.

All share one message: the scales, a few numbers per bucket (row) or per layer, and then
codes of `width` bits. Where only one width exists, neighbours lie in one word
(`codes.fields`); where widths differ from layer to layer and change during the run,
codes are sent as bit planes, of which a level says how many (`codes.planes`).
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import base, wire
from gcjax.base import Compressor, Keys, Layout, RowCodec, Rows
from gcjax.compressors.codes import fields, planes

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

    def measure(x: jax.Array, rows: Rows) -> jax.Array:
        if norm == "l2":
            largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
            relative = x / jnp.where(largest > 0, largest, 1)  # squares stay finite
            return largest * jnp.sqrt(jnp.sum(relative**2, axis=1, keepdims=True))
        ends = lambda low, high: jnp.stack([low.min(axis=1), high.max(axis=1)], axis=1)
        scales, valid = ends(x, x), rows.valid.reshape(-1, 1)
        # Rows with padding once more, without it; they are few.
        if isinstance(valid, np.ndarray):
            at = np.flatnonzero(valid < bucket_size)
        else:
            at = np.arange(len(x))
        if not at.size:
            return scales
        inside = jnp.arange(bucket_size, dtype=jnp.int32) < valid[at]
        x = x[at]
        inner = ends(jnp.where(inside, x, jnp.inf), jnp.where(inside, x, -jnp.inf))
        return scales.at[at].set(jnp.where(valid[at] > 0, inner, 0))

    def last_code(width: jax.Array) -> jax.Array:
        return ((1 << width) - (2 if norm == "l2" else 1))[:, None]

    def grid(scales: jax.Array, width: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Value of code 0 and unit of every row, float32[R, 1] each."""
        low = -scales[:, :1] if norm == "l2" else scales[:, :1]
        high = scales[:, -1:]
        sent = width[:, None] > 0  # else every code means 0
        last = jnp.asarray(last_code(jnp.maximum(width, 1)), jnp.float32)
        return jnp.where(sent, low, 0), jnp.where(sent, (high - low) / last, 0)

    def encode(x, scales, width, key):
        low, unit = grid(scales, width)
        up = wire.noise(key, x.size).reshape(x.shape) if stochastic else 0.5
        codes = jnp.floor((x - low) / jnp.where(unit > 0, unit, 1) + up)
        last = jnp.asarray(last_code(width), jnp.float32)
        return jnp.clip(codes, 0, last).astype(jnp.int32)

    def decode(codes, scales, width):
        low, unit = grid(scales, width)
        return low + codes.astype(jnp.float32) * unit

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        """Expected squared error, exact for "nearest"; one pass for each width."""
        x = x.reshape(-1, bucket_size)
        every = Rows(layout.row_valid[None], None, bucket_size)
        scales, table = measure(x, every), []
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
        count=1 if norm == "l2" else 2,
        measure=measure,
        twice=tuple(
            _normal_error(b, bucket_size, norm, stochastic) < 0.25 for b in bits
        ),
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

    def measure(x: jax.Array, rows: Rows) -> jax.Array:
        total = jnp.sum(jnp.abs(x), axis=1)
        count = jnp.maximum(jnp.asarray(rows.valid).reshape(-1), 1)
        return (total / count.astype(np.float32))[:, None]

    def measure_layers(layout: Layout, x: jax.Array) -> jax.Array:
        total = layout.sum_rows(jnp.sum(jnp.abs(x), axis=1))
        return (total / layout.sizes.astype(np.float32))[:, None]

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, row)
        if per_layer:
            scales = measure_layers(layout, x)[layout.row_layer]
        else:
            scales = measure(x, Rows(layout.row_valid[None], None, row))
        rest = jnp.where(layout.valid(), jnp.abs(x) - scales, 0)
        return layout.sum_rows(jnp.sum(rest**2, axis=1))[:, None]

    return _quantiser(
        name="sign",
        levels=(1,),
        widths=(1,),
        row=row,
        contraction=(True,),
        count=1,
        measure=measure,
        measure_layers=measure_layers if per_layer else None,
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
        count=1,
        measure_layers=measure,
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
    Note: By all-gather, the default, one of N workers sends N - 1 times 16 bits per
      element, by reduce-scatter or a ring about 32: `collective=` of `compressed_mean`.
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
        init=lambda layout: (),
        encode=lambda layout, x, levels, keys, state: (x, x, state),
        pack=lambda layout, units, levels, capacity: (
            wire.fit(wire.to_words(units), capacity),
            (),
        ),
        decode=lambda layout, messages, levels, shared: wire.to_floats(
            messages[0, : layout.size]
        ),
    )


class Units(NamedTuple):
    """The units of a quantiser."""

    codes: Any  # as its body stores them
    scales: jax.Array  # float32[R or L, count]


def _quantiser(
    *,
    name: str,
    levels: tuple[int, ...],
    widths: tuple[int, ...],
    row: int,
    contraction: tuple[bool, ...],
    encode: Callable,  # (x [R, row], scales [R, k], width [R], key) -> codes [R, row]
    decode: Callable,  # (codes [R, row], scales [R, k], width [R]) -> float32[R, row]
    errors: Callable,
    count: int = 0,  # scales, float32 numbers, of each row or layer
    measure: Callable | None = None,  # (x [R, row], rows) -> scales float32[R, count]
    measure_layers: Callable | None = None,  # (layout, x [R, row]) -> float32[L, count]
    twice: tuple[bool, ...] | None = None,
) -> Compressor:
    """Builds a compressor from the meaning of its codes."""
    body = fields(widths[0], row) if len(widths) == 1 else planes(max(widths), row)
    per_layer = measure_layers is not None

    def words(layout: Layout) -> np.ndarray:
        unit = unit_of(layout, row)
        units = -(-layout.sizes // unit)
        codes = units[:, None] * np.array(widths) * (unit // wire.WORD)
        return codes + count * (1 if per_layer else layout.rows[:, None])

    def rows_of(layout: Layout, levels: Any) -> Rows:
        width = np.array(widths, np.int32)
        if not isinstance(levels, np.ndarray):
            width = jnp.where(levels < 0, 0, jnp.array(width)[levels])
        else:
            width = width[levels]
        width = width[layout.row_layer][None]
        return Rows(layout.row_valid[None], width, unit_of(layout, row))

    def value(units: Units, rows: Rows) -> jax.Array:
        return decode(body.load(units.codes), units.scales, rows.width.reshape(-1))

    def encode_rows(x: jax.Array, rows: Rows, key: jax.Array, scales=None) -> Units:
        if scales is None:
            scales = measure(x, rows) if count else jnp.zeros((len(x), 0))
        # The barrier keeps the pass that measures apart from the one that rounds.
        scales = lax.optimization_barrier(scales)
        codes = encode(x, scales, rows.width.reshape(-1), key)
        return Units(body.store(codes), scales)

    def pack_rows(units: Units, order: np.ndarray, rows: Rows, words: int):
        heads = wire.to_words(units.scales)
        if order.size != len(heads):  # some are padding
            heads = jnp.concatenate([heads, jnp.zeros_like(heads[:1])])
        heads = heads[order].reshape(len(order), -1)
        codes = body.pack(units.codes, order, rows, words - heads.shape[1])
        return jnp.concatenate([heads, codes], axis=1)

    def unpack_rows(messages: jax.Array, rows: Rows, natural=None) -> Units:
        head = rows.valid.shape[1] * count
        scales = wire.to_floats(messages[:, :head]).reshape(rows.valid.size, count)
        codes = body.unpack(messages[:, head:], rows, natural)
        return Units(codes, scales if natural is None else scales[natural])

    def spread(layout: Layout, scales: jax.Array) -> jax.Array:
        return scales[layout.row_layer]

    def encode_all(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys, state):
        rows, x = rows_of(layout, levels), x.reshape(-1, row)
        scales = measure_layers(layout, x) if per_layer else None
        of_rows = spread(layout, scales) if per_layer else None
        units = encode_rows(x, rows, keys.worker, of_rows)
        sent = value(units, rows).reshape(-1)
        return units._replace(scales=scales) if per_layer else units, sent, state

    def pack(layout: Layout, units: Units, levels: jax.Array, capacity: int):
        rows, order = rows_of(layout, levels), np.arange(layout.num_rows)[None]
        if not per_layer:
            return pack_rows(units, order, rows, capacity)[0], ()
        head = wire.to_words(units.scales).reshape(-1)
        codes = body.pack(units.codes, order, rows, capacity - head.size)
        return jnp.concatenate([head, codes[0]]), ()

    def decode_all(layout: Layout, messages: jax.Array, levels: jax.Array, shared):
        del shared
        rows, head = rows_of(layout, levels), layout.num_layers * count

        def part(message: jax.Array) -> jax.Array:
            if not per_layer:
                return value(unpack_rows(message[None], rows), rows)
            scales = wire.to_floats(message[:head]).reshape(-1, count)
            codes = body.unpack(message[None, head:], rows, None)
            return value(Units(codes, spread(layout, scales)), rows)

        return mean_of(messages, part).reshape(-1)

    codec = RowCodec(
        dealt=len(widths) > 1,
        again=twice or contraction,
        rows=rows_of,
        words=lambda rows: body.words(rows) + count * rows.valid.shape[1],
        encode=encode_rows,
        value=value,
        pack=pack_rows,
        unpack=unpack_rows,
    )
    return Compressor(
        name=name,
        levels=levels,
        row=row,
        contraction=contraction,
        linear=False,
        words=words,
        errors=errors,
        init=lambda layout: (),
        encode=encode_all,
        pack=pack,
        decode=decode_all,
        rows=None if per_layer else codec,
    )


def unit_of(layout: Layout, row: int) -> int:
    """Elements that are sent or left out together: a row, or a part of it where many
    layers do not fill their last one.
    """
    if layout.size <= 1.01 * layout.sizes.sum():
        return row
    return int(np.gcd(row, 256))


def mean_of(messages: jax.Array, part: Callable) -> jax.Array:
    """Mean of what messages say; of a few in one pass over the result."""
    count = len(messages)
    if count <= 8:
        total = part(messages[0])
        for i in range(1, count):
            total += part(messages[i])
    else:
        add = lambda i, total: total + part(messages[i])
        total = lax.fori_loop(1, count, add, part(messages[0]))
    return total if count == 1 else total * np.float32(1 / count)


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
