"""Sparsifiers: send some entries of every layer.

One mask over the flat vector, with a threshold per layer, makes one compaction for all
layers, so neither the work nor the compile time depends on the number of layers.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import base, wire
from gcjax.base import Compressor, Keys, Layout

# Ten times sparser and ten times denser than the customary 1 %.
DENSITIES = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.007,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
)

_ROW = 256  # elements per row: few rows to sum over, little padding
_BINS_PER_OCTAVE = 64  # of the histogram of magnitudes
_OCTAVES = 32  # below the largest magnitude; what is smaller has no weight in float32


class Selected(NamedTuple):
    """The units of a sparsifier."""

    x: jax.Array  # float32[size], what entered
    mask: jax.Array  # uint32[size / 32], which entries are sent


def top_k(densities: float | Sequence[float] = DENSITIES) -> Compressor:
    """Keeps the entries of largest magnitude of every layer, exactly.

    A layer of n elements keeps k = max(1, floor(density * n)); of equal magnitudes the
    first ones. The threshold is found by 31 counting passes over the bits of the
    magnitudes: no sort, and no work that grows with k or with the number of layers.

    Args:
      densities: Fractions of entries kept, in (0, 1]; one, or a ladder.

    Payload: `values` float32[k], `indices` uint32[k]: 64 k bits.
    Properties: contraction, ||x - C(x)||^2 <= (1 - k/n) ||x||^2; biased, so it wants
      error feedback.
    Raises:
      ValueError: for a density outside (0, 1].
    References: Stich et al., 2018, Sparsified SGD with Memory, arXiv:1809.07599.
    """
    densities = base.ladder(densities, "density", 0.0, 1.0)

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys):
        del keys
        k = base.pick(_counts(layout, densities), levels)
        return _keep(x, _largest(layout, _magnitudes(layout, x), k))

    return Compressor(
        name="top_k",
        levels=densities,
        row=_ROW,
        contraction=(True,) * len(densities),
        linear=False,
        words=lambda layout: 2 * _counts(layout, densities),
        errors=functools.partial(_tail_energy, densities=densities),
        encode=encode,
        pack=_pack_indexed,
        decode=_decode_indexed,
        lanes=2,
    )


def random_k(
    densities: float | Sequence[float] = DENSITIES, unbiased: bool = False
) -> Compressor:
    """Keeps random entries, the same on all workers, so that no index is sent.

    Of every layer k = max(1, floor(density * n)) entries are drawn without replacement
    from the randomness that all workers share. Messages are linear, their mean decodes
    to the mean, so they travel by all-reduce.

    Args:
      densities: Fractions of entries kept, in (0, 1]; one, or a ladder.
      unbiased: Scale what is sent by n / k.

    Payload: `values` float32[k]: 32 k bits.
    Properties: unscaled a contraction in expectation, E||x - C(x)||^2 =
      (1 - k/n) ||x||^2. `unbiased` has omega = n/k - 1; error feedback is off where
      omega >= 1, because there it diverges.
    Raises:
      ValueError: for a density outside (0, 1].
    References: Stich et al., 2018, Sparsified SGD with Memory, arXiv:1809.07599.
    Note: Drawn without replacement; some implementations draw with.
    """
    densities = base.ladder(densities, "density", 0.0, 1.0)

    def kept(layout: Layout) -> np.ndarray:
        return _counts(layout, densities) / layout.sizes[:, None]

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys):
        scores = wire.random_words(keys.shared, layout.size).reshape(-1, _ROW) >> 1
        scores = jnp.where(layout.valid(), scores | 1, 0)
        k = base.pick(_counts(layout, densities), levels)
        if unbiased:
            scale = base.pick(1 / kept(layout), levels)[layout.row_layer]
            x = (x.reshape(-1, _ROW) * scale[:, None]).reshape(-1)
        return _keep(x, _largest(layout, scores, k))

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        energy = layout.sum_rows(jnp.sum(x.reshape(-1, _ROW) ** 2, axis=1))
        share = 1 / kept(layout) - 1 if unbiased else 1 - kept(layout)
        return energy[:, None] * jnp.asarray(share, jnp.float32)

    return Compressor(
        name="random_k",
        levels=densities,
        row=_ROW,
        contraction=tuple(not unbiased or d > 0.5 for d in densities),
        linear=True,
        words=lambda layout: _counts(layout, densities),
        errors=errors,
        encode=encode,
        pack=_pack_values,
        decode=_decode_values,
    )


def threshold(value: float, density: float = 0.01) -> Compressor:
    """Keeps the entries of at least a given magnitude, up to a fixed number.

    How many entries pass is known at run time only, so a layer of n elements has room
    for max(1, floor(density * n)) of them. What overflows, the last ones in the order
    of the layer, stays in the error.

    Args:
      value: Least magnitude that is sent, positive, in units of the gradient.
      density: Expected fraction of entries at or above it, in (0, 1].

    Payload: `values` float32[k], `indices` uint32[k], unused ones included: 64 k bits.
    Properties: ||x - C(x)|| <= ||x||, without a constant below 1 (nothing is sent if
      nothing passes); the error stays bounded with error feedback because an entry is
      sent once it has grown to `value`, as long as the room suffices.
    Raises:
      ValueError: for a value that is not positive or a density outside (0, 1].
    References: Sahu et al., 2021, Rethinking gradient sparsification as total error
      minimization, arXiv:2108.00951.
    """
    if not value > 0:
        raise ValueError(f"threshold: value must be positive, got {value}")
    densities = base.ladder(density, "density", 0.0, 1.0)

    def passing(layout: Layout, x: jax.Array) -> jax.Array:
        mask = wire.pack_bits(jnp.abs(x) >= value)
        room = jnp.asarray(_counts(layout, densities)[:, 0], jnp.int32)
        return _first_of_each_layer(layout, mask, room)

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        kept = wire.unpack_bits(passing(layout, x)).astype(bool)
        rest = jnp.where(kept, 0, x).reshape(-1, _ROW)
        return layout.sum_rows(jnp.sum(rest**2, axis=1))[:, None]

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys):
        del levels, keys
        return _keep(x, passing(layout, x))

    return Compressor(
        name="threshold",
        levels=densities,
        row=_ROW,
        contraction=(True,),
        linear=False,
        words=lambda layout: 2 * _counts(layout, densities),
        errors=errors,
        encode=encode,
        pack=_pack_indexed,
        decode=_decode_indexed,
        lanes=2,
    )


def _counts(layout: Layout, densities: tuple[float, ...]) -> np.ndarray:
    """Entries kept of each layer at each density, int64[L, V]."""
    # The least float error must not cost an entry: 0.29 * 100 is 28.999...
    exact = np.floor(layout.sizes[:, None] * np.array(densities) * (1 + 1e-12))
    return np.maximum(1, exact).astype(np.int64)


def _magnitudes(layout: Layout, x: jax.Array) -> jax.Array:
    """Ranks magnitudes by positive integers, uint32[R, row]; padding is 0."""
    bits = wire.to_words(jnp.abs(x)).reshape(-1, _ROW)  # ordered as the floats are
    return jnp.where(layout.valid(), bits + 1, 0)


def _largest(layout: Layout, scores: jax.Array, k: jax.Array) -> jax.Array:
    """Packed mask of exactly the k[l] largest positive scores of each layer.

    Args:
      layout: L layers in R rows.
      scores: uint32[R, row], below 2^31, 0 in the padding.
      k: int32[L], at least 1 and at most the layer's size.
    """
    scores = scores.astype(jnp.int32)  # signed comparisons vectorise on CPUs

    def count(bound: jax.Array) -> jax.Array:
        hits = scores >= bound[layout.row_layer][:, None]
        return layout.sum_rows(jnp.sum(hits, axis=1, dtype=jnp.int32))

    def descend(i: jax.Array, least: jax.Array) -> jax.Array:
        bound = least | (jnp.int32(1) << (30 - i))
        return jnp.where(count(bound) >= k, bound, least)

    # The largest bound that at least k reach. It starts at zero, made from the scores
    # so that it varies over workers as the loop's result does.
    start = layout.max_rows(jnp.min(scores, axis=1)) * 0
    bound = lax.fori_loop(0, 31, descend, start)
    above = wire.pack_bits(
        scores.reshape(-1)
        > jnp.repeat(bound[layout.row_layer], _ROW, total_repeat_length=layout.size)
    )
    equal = wire.pack_bits((scores == bound[layout.row_layer][:, None]).reshape(-1))
    room = k - count(bound + 1)
    return above | _first_of_each_layer(layout, equal, room)


def _first_of_each_layer(layout: Layout, mask: jax.Array, room: jax.Array) -> jax.Array:
    """Keeps the first room[l] set bits of each layer of a packed mask."""
    words_per_row = _ROW // wire.WORD
    word_layer = np.repeat(layout.row_layer, words_per_row)
    counts = lax.population_count(mask).astype(jnp.int32)
    before = jnp.cumsum(counts) - counts
    start = before[layout.first_row * words_per_row]
    return wire.keep_lowest(mask, jnp.maximum((room + start)[word_layer] - before, 0))


def _keep(x: jax.Array, mask: jax.Array) -> tuple[Selected, jax.Array]:
    kept = wire.unpack_bits(mask).astype(bool)
    return Selected(x, mask), jnp.where(kept, x, 0)


def _pack_indexed(layout, units: Selected, levels, capacity: int):
    del layout, levels
    indices = wire.positions(units.mask, capacity // 2)
    values = units.x.at[indices].get(mode="fill", fill_value=0)
    return jnp.stack([wire.to_words(values), indices.astype(jnp.uint32)]), ()


def _decode_indexed(layout, messages, levels, shared) -> jax.Array:
    del levels, shared

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        values, indices = messages[i]
        # Within a message indices are unique, so sums have one order on every device.
        return total.at[indices.astype(jnp.int32)].add(
            wire.to_floats(values),
            mode="drop",
            unique_indices=True,
            indices_are_sorted=True,
        )

    count = messages.shape[0]
    total = lax.fori_loop(0, count, add, jnp.zeros((layout.size,), jnp.float32))
    return total / count


def _pack_values(layout, units: Selected, levels, capacity: int):
    del layout, levels
    indices = wire.positions(units.mask, capacity)
    values = units.x.at[indices].get(mode="fill", fill_value=0)
    return wire.to_words(values)[None], indices


def _decode_values(layout, messages, levels, shared: jax.Array) -> jax.Array:
    del levels
    ((values,),) = messages  # one: the mean of all workers' messages
    return (
        jnp.zeros((layout.size,), jnp.float32)
        .at[shared[: values.size]]
        .add(
            wire.to_floats(values),
            mode="drop",
            unique_indices=True,
            indices_are_sorted=True,
        )
    )


def _tail_energy(
    layout: Layout, x: jax.Array, *, densities: tuple[float, ...]
) -> jax.Array:
    """Squared error of `top_k` at every density, float32[L, V].

    From a histogram of magnitudes per layer, counts and energies, one pass for all
    densities. Its bins are 1.1 % wide, and only the energy of the bin in which the
    threshold lies is interpolated: the result is within 1e-3 of the exact one.
    """
    bins = _BINS_PER_OCTAVE * _OCTAVES
    magnitude = jnp.abs(x).reshape(-1, _ROW)
    largest = layout.max_rows(jnp.max(magnitude, axis=1))
    scale = jnp.where(largest > 0, largest, 1)[layout.row_layer][:, None]
    magnitude = magnitude / scale
    shift = 23 - int(np.log2(_BINS_PER_OCTAVE))
    top = int(np.float32(1).view(np.int32)) >> shift
    bin_ = top - (wire.to_words(magnitude).astype(jnp.int32) >> shift)
    bin_ = jnp.clip(bin_, 0, bins - 1) + layout.row_layer[:, None] * bins
    table = jnp.zeros((layout.num_layers * bins,), jnp.float32)
    energy = table.at[bin_].add(magnitude**2).reshape(-1, bins)
    count = table.at[bin_].add(layout.valid().astype(jnp.float32)).reshape(-1, bins)

    def tail(count: jax.Array, energy: jax.Array, k: jax.Array) -> jax.Array:
        ends = jnp.cumsum(count)
        at = jnp.searchsorted(ends, k, side="left", method="compare_all")
        at = jnp.minimum(at, bins - 1)
        below = jnp.cumsum(energy[::-1])[::-1] - energy
        rest = 1 - (k - (ends - count)[at]) / jnp.maximum(count[at], 1)
        return below[at] + energy[at] * jnp.clip(rest, 0, 1)

    k = jnp.asarray(_counts(layout, densities), jnp.float32)
    return jax.vmap(tail)(count, energy, k) * (largest**2)[:, None]
