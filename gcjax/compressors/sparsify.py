"""Sparsifiers: send some entries of every layer.

One mask over the flat vector, with a threshold per layer, makes one compaction for all
layers, so neither the work nor the compile time depends on the number of layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

ROW = 1024  # elements per row
_BINS_PER_OCTAVE = 64  # of the histogram of magnitudes
_OCTAVES = 32  # below the largest magnitude; what is smaller has no weight in float32


class Selected(NamedTuple):
    """The units of a sparsifier."""

    x: jax.Array  # float32[size], what entered
    mask: jax.Array  # uint32[size / 32], which entries are sent


def top_k(
    densities: float | Sequence[float] = DENSITIES, tolerance: float = 0.0
) -> Compressor:
    """Keeps the entries of largest magnitude of every layer.

    A layer of n elements keeps k = max(1, floor(density * n)). With `tolerance=0` these
    are exactly the k largest, of equal magnitudes the first ones: the threshold is
    found by 31 counting passes over the bits of the magnitudes. With a tolerance the
    search starts from the threshold of the step before and ends, mostly after one to
    three passes, once the layers' counts, added up, are off by at most half of it; it
    aims half of it below k, and entries beyond k wait in the error.

    Args:
      densities: Fractions of entries kept, in (0, 1]; one, or a ladder.
      tolerance: Largest share of all entries to be sent by which counts may be off,
        in [0, 1).

    Payload: per layer `values` float32[k], and the shortest of three codes of their
      places: 16 k bits relative to blocks of 65,536 elements, with a 32-bit count per
      block if there is more than one; a bitmap of n bits; or 32 k bits.
      Unused room of a tolerance is sent too.
    Properties: contraction, ||x - C(x)||^2 <= (1 - k/n) ||x||^2, with a tolerance
      k (1 - tolerance) in place of k over all layers; biased, so it wants error
      feedback.
    Raises:
      ValueError: for a density outside (0, 1] or a tolerance outside [0, 1).
    References: Stich et al., 2018, Sparsified SGD with Memory, arXiv:1809.07599.
    """
    densities = base.ladder(densities, "density", 0.0, 1.0)
    if not 0 <= tolerance < 1:
        raise ValueError(f"top_k: tolerance must be in [0, 1), got {tolerance}")

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys, state):
        del keys
        k = _picked(counts(layout, densities), levels)
        if not tolerance:
            mask = largest(layout, magnitudes(layout, x), k)
        else:
            bound, over, state = _search(layout, x, k, tolerance, state)
            hits = jnp.abs(x).reshape(-1, ROW) >= bound[layout.row_layer][:, None]
            mask = wire.pack_bits(hits).reshape(-1)
            first = functools.partial(first_of_each_layer, layout)
            mask = lax.cond(over, first, lambda mask, k: mask, mask, k)
        return *keep(x, mask), state

    return Compressor(
        name="top_k",
        levels=densities,
        row=ROW,
        contraction=(True,) * len(densities),
        linear=False,
        words=lambda layout: indexed_words(layout, counts(layout, densities))[0],
        errors=lambda layout, x: tail_energy(layout, x, densities),
        # log2 of the threshold, and its slope; zeros where nothing is known yet.
        init=lambda layout: (
            jnp.zeros((2, layout.num_layers), jnp.float32) if tolerance else ()
        ),
        encode=encode,
        pack=functools.partial(_pack_indexed, densities),
        decode=functools.partial(_decode_indexed, densities),
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
        return counts(layout, densities) / layout.sizes[:, None]

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys, state):
        scores = wire.random_words(keys.shared, layout.size).reshape(-1, ROW) >> 1
        scores = jnp.where(layout.valid(), scores | 1, 0)
        k = _picked(counts(layout, densities), levels)
        if unbiased:
            scale = _picked(1 / kept(layout), levels)[layout.row_layer]
            x = (x.reshape(-1, ROW) * scale[:, None]).reshape(-1)
        return *keep(x, largest(layout, scores, k)), state

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        energy = layout.sum_rows(jnp.sum(x.reshape(-1, ROW) ** 2, axis=1))
        share = 1 / kept(layout) - 1 if unbiased else 1 - kept(layout)
        return energy[:, None] * jnp.asarray(share, jnp.float32)

    return Compressor(
        name="random_k",
        levels=densities,
        row=ROW,
        contraction=tuple(not unbiased or d > 0.5 for d in densities),
        linear=True,
        words=lambda layout: counts(layout, densities),
        errors=errors,
        init=lambda layout: (),
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

    Payload: as `top_k` with k the room, unused slots included.
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
        room = jnp.asarray(counts(layout, densities)[:, 0], jnp.int32)
        return first_of_each_layer(layout, mask, room)

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        kept = wire.unpack_bits(passing(layout, x)).astype(bool)
        rest = jnp.where(kept, 0, x).reshape(-1, ROW)
        return layout.sum_rows(jnp.sum(rest**2, axis=1))[:, None]

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys, state):
        del levels, keys
        return *keep(x, passing(layout, x)), state

    return Compressor(
        name="threshold",
        levels=densities,
        row=ROW,
        contraction=(True,),
        linear=False,
        words=lambda layout: indexed_words(layout, counts(layout, densities))[0],
        errors=errors,
        init=lambda layout: (),
        encode=encode,
        pack=functools.partial(_pack_indexed, densities),
        decode=functools.partial(_decode_indexed, densities),
    )


def counts(layout: Layout, densities: tuple[float, ...]) -> np.ndarray:
    """Entries kept of each layer at each density, int64[L, V]."""
    # The least float error must not cost an entry: 0.29 * 100 is 28.999...
    exact = np.floor(layout.sizes[:, None] * np.array(densities) * (1 + 1e-12))
    return np.maximum(1, exact).astype(np.int64)


def _picked(table: np.ndarray, levels: jax.Array) -> jax.Array:
    """Each layer's entry of a table [L, V], 0 for layers that are not sent."""
    return jnp.where(levels < 0, 0, base.pick(table, jnp.maximum(levels, 0)))


def magnitudes(layout: Layout, x: jax.Array) -> jax.Array:
    """Ranks magnitudes by positive integers, uint32[R, row]; padding is 0."""
    bits = wire.to_words(jnp.abs(x)).reshape(-1, ROW)  # ordered as the floats are
    return jnp.where(layout.valid(), bits + 1, 0)


def largest(layout: Layout, scores: jax.Array, k: jax.Array) -> jax.Array:
    """Packed mask of exactly the k[l] largest positive scores of each layer.

    Args:
      layout: L layers in R rows.
      scores: uint32[R, row], below 2^31, 0 in the padding.
      k: int32[L], at most the layer's size.
    """
    scores = scores.astype(jnp.int32)  # signed comparisons vectorise on CPUs

    def count(bound: jax.Array) -> jax.Array:
        return _count(layout, scores >= bound[layout.row_layer][:, None])

    def descend(i: jax.Array, least: jax.Array) -> jax.Array:
        bound = least | (jnp.int32(1) << (30 - i))
        return jnp.where(count(bound) >= k, bound, least)

    # The largest bound that at least k reach. It starts at zero, made from the scores
    # so that it varies over workers as the loop's result does.
    start = layout.max_rows(jnp.min(scores, axis=1)) * 0
    bound = lax.fori_loop(0, 31, descend, start)
    above = wire.pack_bits((scores > bound[layout.row_layer][:, None]).reshape(-1))
    equal = wire.pack_bits((scores == bound[layout.row_layer][:, None]).reshape(-1))
    room = k - count(bound + 1)
    return above | first_of_each_layer(layout, equal, room)


def _count(layout: Layout, hits: jax.Array) -> jax.Array:
    """How many of bool[R, row] are set in each layer, int32[L].

    By way of packed words, whose bits `popcount` adds: a sum along a row does not
    vectorise on CPUs. Which bit of a row stands where does not matter here, and so
    rows are packed across, which does.
    """
    lanes = hits.reshape(-1, wire.WORD, ROW // wire.WORD).astype(jnp.int32)
    bits = jnp.sum(lanes << np.arange(32, dtype=np.int32)[:, None], axis=1)
    counts = jnp.sum(lax.population_count(bits), axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(counts)[layout.first_row + layout.rows - 1]
    return jnp.diff(ends, prepend=jnp.int32(0))


def _search(layout: Layout, x: jax.Array, k: jax.Array, tolerance: float, state):
    """Thresholds above which nearly k[l] magnitudes of each layer lie.

    Secant steps on the logarithm of the count against that of the threshold, which is
    nearly straight; where a step leaves what is known to bracket the threshold, the
    bracket is halved.

    Returns:
      float32[L]; whether some layer has more than k[l]; the next step's state.
    """
    magnitude = jnp.abs(x).reshape(-1, ROW)
    k = k.astype(jnp.float32)
    aim = jnp.maximum(k * (1 - tolerance / 2), 0.5)
    slack = tolerance / 2 * jnp.sum(k)
    old, slope = state
    slope = jnp.where(slope < 0, slope, -4.0)

    def miss(count: jax.Array) -> jax.Array:
        return jnp.log2(jnp.maximum(count, 0.5)) - jnp.log2(aim)

    def off(at: jax.Array, count: jax.Array) -> jax.Array:
        # Below 2^-140 nothing is left to be found, as in a layer of zeros.
        return jnp.sum(jnp.where((k > 0) & (at > -140), jnp.abs(count - aim), 0))

    def count_at(at: jax.Array) -> jax.Array:
        bound = jnp.exp2(at)[layout.row_layer][:, None]
        return _count(layout, magnitude >= bound).astype(jnp.float32)

    def refine(carry: tuple) -> tuple:
        i, at, count, low, high, slope = carry
        low = jnp.where(count > aim, at, low)  # too many: the threshold lies above
        high = jnp.where(count > aim, high, at)
        step = at - jnp.clip(miss(count) / slope, -8, 8)
        step = jnp.where((step > low) & (step < high), step, (low + high) / 2)
        near = jnp.abs(count - aim) <= jnp.maximum(tolerance / 4 * k, 0.5)
        step = jnp.where(near, at, step)
        new, far = count_at(step), jnp.abs(step - at) > 1e-3
        moved = (miss(new) - miss(count)) / jnp.where(far, step - at, 1)
        slope = jnp.where(far, jnp.clip(moved, -64, -0.25), slope)
        return i + 1, step, new, low, high, slope

    def more(carry: tuple) -> jax.Array:
        i, at, count, *_ = carry
        return (i < 60) & (off(at, count) > slack)

    ends = jnp.full_like(old, -150.0), jnp.full_like(old, 128.0)
    carry = (jnp.int32(0), old, count_at(old), *ends, slope)
    _, at, count, low, _, slope = lax.while_loop(more, refine, carry)
    # Ties may leave no threshold with the right count: rather too many, cut to k.
    failed = (count < aim) & (off(at, count) > slack)
    at = jnp.where(failed, low, at)
    bound = jnp.where(k > 0, jnp.exp2(at), jnp.inf)
    return bound, jnp.any((count > k) | failed), jnp.stack([at, slope])


def first_of_each_layer(layout: Layout, mask: jax.Array, room: jax.Array) -> jax.Array:
    """Keeps the first room[l] set bits of each layer of a packed mask."""
    word_layer, before = _word_counts(layout, mask)
    return wire.keep_lowest(mask, jnp.maximum(room[word_layer] - before, 0))


def _word_counts(layout: Layout, mask: jax.Array):
    """Of each word of a packed mask: its layer, and the bits set before it there."""
    per_row = ROW // wire.WORD
    word_layer = np.repeat(layout.row_layer, per_row)
    counts = lax.population_count(mask).astype(jnp.int32)
    before = wire.running_sum(counts) - counts
    return word_layer, before - before[layout.first_row * per_row][word_layer]


def keep(x: jax.Array, mask: jax.Array) -> tuple[Selected, jax.Array]:
    """The units of a packed mask, and x_hat: x where it is set, zero elsewhere."""
    kept = wire.unpack_bits(mask).astype(bool)
    return Selected(x, mask), jnp.where(kept, x, 0)


# Codes of places, the shortest of which a layer has at a level.
_BLOCKS, _BITMAP, _PLAIN = 0, 1, 2
_BLOCK = 2**16  # elements, so that places in it take 16 bits


def _blocks(layout: Layout) -> np.ndarray:
    """Counts of blocks that a layer sends with 16-bit places, int64[L]."""
    blocks = -(-layout.sizes // _BLOCK)
    return np.where(blocks > 1, blocks, 0)


def indexed_words(layout: Layout, k: Any) -> tuple[Any, Any]:
    """Words of a layer with k entries, and the code of their places; NumPy if k is.

    Args:
      layout: L layers.
      k: int[L] or int[L, V], entries; nothing is sent of a layer with none.
    """
    np_or_jnp = np if isinstance(k, np.ndarray) else jnp
    of_layer = lambda x: x.reshape(-1, *[1] * (k.ndim - 1)).astype(np.int32)
    bitmap = np.broadcast_to(of_layer(-(-layout.sizes // wire.WORD)), k.shape)
    in_blocks = (k + 1) // 2 + of_layer(_blocks(layout))
    codes = np_or_jnp.stack([in_blocks, bitmap, k])
    return np_or_jnp.where(k > 0, k + codes.min(0), 0), codes.argmin(0)


class _Plan(NamedTuple):
    """Where everything lies in a message: all values, then the places of each layer."""

    k: jax.Array  # int32[L], entries
    first: jax.Array  # int32[L], slot of a layer's first value
    used: jax.Array  # int32, slots of values in all
    places: jax.Array  # int32[L], first word of a layer's places
    words: jax.Array  # int32[L], words of a layer's places
    code: jax.Array  # int32[L]


def _plan(layout: Layout, k: jax.Array) -> _Plan:
    words, code = indexed_words(layout, k)
    words -= k
    ends, used = jnp.cumsum(k), jnp.sum(k)
    return _Plan(k, ends - k, used, used + jnp.cumsum(words) - words, words, code)


def _first_slots(layout: Layout, mask: jax.Array, plan: _Plan) -> jax.Array:
    """Slot of each word's first entry, int32[size / 32]."""
    word_layer, before = _word_counts(layout, mask)
    return plan.first[word_layer] + before


def pack_indexed(layout: Layout, units: Selected, k: jax.Array, capacity: int):
    """The message of at most k[l] entries of each layer, uint32[capacity]."""
    plan = _plan(layout, k)
    starts = wire.stored(_first_slots(layout, units.mask, plan))
    place, used = wire.positions(units.mask, starts, capacity)
    place = wire.stored(jnp.where(used, place, -1))
    used = place >= 0
    values = jnp.where(used, units.x.at[place].get(mode="clip"), 0)
    origin = jnp.asarray(layout.first_row * ROW, jnp.int32)
    layer_of_word = jnp.asarray(np.repeat(layout.row_layer, ROW // wire.WORD))
    layer = layer_of_word[jnp.minimum(place // wire.WORD, layer_of_word.size - 1)]
    local = jnp.where(used, place - origin[layer], 0).astype(jnp.uint32)
    local, values = wire.stored((local, values))

    # The words after the values, each from what its layer's code says.
    slot = jnp.arange(capacity, dtype=jnp.int32)
    layer = wire.stored(wire.owner(plan.places, capacity))
    offset = slot - plan.places[layer]
    first = plan.first[layer]
    word = jnp.asarray(layout.first_row * (ROW // wire.WORD), jnp.int32)[layer]
    begun = starts.at[word + offset * (_BLOCK // wire.WORD)].get(mode="clip") - first
    blocks = jnp.asarray(_blocks(layout), jnp.int32)[layer]
    pair = first + 2 * (offset - blocks)
    half = lambda at: local.at[at].get(mode="clip") & np.uint32(_BLOCK - 1)
    both = (
        half(pair)
        | jnp.where(pair + 1 < first + plan.k[layer], half(pair + 1), 0) << 16
    )
    in_blocks = jnp.where(offset < blocks, begun.astype(jnp.uint32), both)
    plain = local.at[first + offset].get(mode="clip")
    bitmap = units.mask.at[word + offset].get(mode="clip")
    code = plan.code[layer]
    places = jnp.where(code == _BLOCKS, in_blocks, plain)
    places = jnp.where(code == _BITMAP, bitmap, places)
    places = jnp.where(offset < plan.words[layer], places, 0)
    return jnp.where(slot < plan.used, wire.to_words(values), places)


def adder(layout: Layout, k: jax.Array, capacity: int, bitmaps: bool) -> Callable:
    """Makes (message uint32[capacity], total float32[size], weight) -> total.

    It adds what a message of k[l] entries of each layer says, times the weight.

    Args:
      layout: L layers.
      k: int32[L], as the message was packed with.
      capacity: Static length of the message.
      bitmaps: Whether some layer's places may be a bitmap, which takes time to read.
    """
    plan = _plan(layout, k)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    layer = wire.owner(plan.first, capacity)
    offset = slot - plan.first[layer]
    origin = jnp.asarray(layout.first_row * ROW, jnp.int32)
    code, places = plan.code[layer], plan.places[layer]

    # Blocks of 65,536 elements; a layer without counts of them is one block.
    count = _blocks(layout)
    blocks = np.maximum(count, 1)
    block_layer = np.repeat(np.arange(layout.num_layers), blocks)
    block = np.arange(block_layer.size) - (np.cumsum(blocks) - blocks)[block_layer]
    block_base = jnp.asarray(block * _BLOCK, jnp.int32)
    counted = (count[block_layer] > 0) & (plan.code == _BLOCKS)[block_layer]
    half_word = places + jnp.asarray(count, jnp.int32)[layer] + offset // 2
    half_shift = (16 * (offset % 2)).astype(jnp.uint32)

    word_layer = np.repeat(layout.row_layer, ROW // wire.WORD)
    within = np.arange(word_layer.size) - (layout.first_row * (ROW // 32))[word_layer]

    def from_bitmaps(message: jax.Array) -> jax.Array:
        here = (plan.code == _BITMAP) & (plan.k > 0)
        mask = message.at[plan.places[word_layer] + within].get(mode="clip")
        mask = jnp.where(here[word_layer], mask, 0)
        return wire.positions(mask, _first_slots(layout, mask, plan), capacity)[0]

    def add(message: jax.Array, total: jax.Array, weight: Any) -> jax.Array:
        begun = message.at[plan.places[block_layer] + block].get(mode="clip")
        begun = jnp.where(counted, begun.astype(jnp.int32), 0)
        # Blocks past the first of a layer that is not counted hold nothing.
        empty = ~counted & (block > 0)
        begun = jnp.where(empty, plan.k[block_layer], begun)
        base = block_base[wire.owner(plan.first[block_layer] + begun, capacity)]
        half = (message.at[half_word].get(mode="clip") >> half_shift) & (_BLOCK - 1)
        plain = message.at[places + offset].get(mode="clip").astype(jnp.int32)
        place = jnp.where(code == _BLOCKS, base + half.astype(jnp.int32), plain)
        place += origin[layer]
        if bitmaps:
            there = jnp.any((plan.code == _BITMAP) & (plan.k > 0))
            other = lax.cond(there, from_bitmaps, lambda m: place, message)
            place = jnp.where(code == _BITMAP, other, place)
        place = jnp.where(slot < plan.used, place, layout.size)
        # Entries of one message have places of their own, so that sums have one order
        # on every device; room that is not used adds zeros.
        values = weight * wire.to_floats(message)
        return total.at[place].add(values, mode="drop")

    return add


def _pack_indexed(densities, layout, units: Selected, levels, capacity: int):
    k = _picked(counts(layout, densities), levels)
    return pack_indexed(layout, units, k, capacity), ()


def _decode_indexed(densities, layout, messages, levels, shared) -> jax.Array:
    del shared
    table = counts(layout, densities)
    bitmaps = bool((indexed_words(layout, table)[1] == _BITMAP).any())
    k = _picked(table, levels)
    add = adder(layout, k, messages.shape[1], bitmaps)
    # Made from the messages so that it varies over a mesh's axes as they do.
    nothing = (messages[0, 0] & 0).astype(jnp.float32)
    zero = jnp.zeros((layout.size,), jnp.float32) + nothing
    step = lambda i, total: add(messages[i], total, 1.0)
    return lax.fori_loop(0, len(messages), step, zero) / len(messages)


def _pack_values(layout, units: Selected, levels, capacity: int):
    del levels
    counts = lax.population_count(units.mask).astype(jnp.int32)
    starts = wire.running_sum(counts) - counts
    place, used = wire.positions(units.mask, starts, capacity)
    values = jnp.where(used, units.x.at[place].get(mode="clip"), 0)
    return wire.to_words(values), jnp.where(used, place, layout.size)


def _decode_values(layout, messages, levels, shared: jax.Array) -> jax.Array:
    del levels
    (values,) = messages  # one: the mean of all workers' messages
    place = shared[: values.size]
    zero = jnp.zeros((layout.size,), jnp.float32)
    return zero.at[place].add(wire.to_floats(values), mode="drop")


def tail_energy(
    layout: Layout, x: jax.Array, densities: tuple[float, ...]
) -> jax.Array:
    """Squared error of `top_k` at every density, float32[L, V].

    From a histogram of magnitudes per layer, counts and energies, one pass for all
    densities. Its bins are 1.1 % wide, and only the energy of the bin in which the
    threshold lies is interpolated: the result is within 1e-3 of the exact one.
    """
    bins = _BINS_PER_OCTAVE * _OCTAVES
    magnitude = jnp.abs(x).reshape(-1, ROW)
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

    k = jnp.asarray(counts(layout, densities), jnp.float32)
    return jax.vmap(tail)(count, energy, k) * (largest**2)[:, None]
