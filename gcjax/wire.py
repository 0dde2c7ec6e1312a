"""Messages: packing bits into 32-bit words, and run-time sizes in static buffers.

Everything that crosses the wire is an array of uint32 words, because narrower types
are widened by some backends. Nothing here communicates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = 32  # bits in a word
_LANES = np.arange(WORD, dtype=np.uint32)


def to_words(x: jax.Array) -> jax.Array:
    """Views float32 values as uint32 words."""
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def to_floats(words: jax.Array) -> jax.Array:
    """Views uint32 words as float32 values."""
    return lax.bitcast_convert_type(words, jnp.float32)


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs bool[..., 32 * n] into uint32[..., n], the first one lowest."""
    lanes = bits.reshape(*bits.shape[:-1], -1, WORD).astype(jnp.uint32)
    return jnp.sum(lanes << _LANES, axis=-1, dtype=jnp.uint32)


def unpack_bits(words: jax.Array) -> jax.Array:
    """Unpacks uint32[..., n] into uint32[..., 32 * n] of zeros and ones."""
    lanes = (words[..., None] >> _LANES) & 1
    return lanes.reshape(*words.shape[:-1], -1)


def stored(tree: Any) -> Any:
    """Returns arrays as they are, but keeps XLA on CPUs from computing them twice.

    Its fusion puts cheap producers into every consumer, once for each element that is
    read, through optimisation barriers too; what is read 4 to 32 times is then computed
    as often. A loop whose number of turns it does not know (it is none) stops that.
    """

    def loop(tree: Any) -> Any:
        first = jax.tree.leaves(tree)[0]
        bits = first.reshape(-1)[0]
        if bits.dtype != jnp.uint32:
            bits = lax.bitcast_convert_type(bits, jnp.uint32)
        turns = (bits == 0x7F8DBEEF).astype(jnp.int32)  # and then i = 0
        same = lambda i, tree: jax.tree.map(lambda x: x + i.astype(x.dtype), tree)
        return lax.fori_loop(0, turns, same, tree)

    return lax.platform_dependent(tree, cpu=loop, default=lambda tree: tree)


def fit(words: jax.Array, capacity: int) -> jax.Array:
    """Cuts or pads a flat array with zeros to a static length."""
    return jnp.pad(words, (0, max(0, capacity - words.size)))[:capacity]


def segments(lengths: jax.Array, capacity: int) -> tuple[jax.Array, ...]:
    """Maps the slots of a buffer to the segments laid into it one after the other.

    Args:
      lengths: int32[S], words of each segment, known at run time.
      capacity: Static length of the buffer.

    Returns:
      For each slot the segment and the position within it, int32[capacity], and
      whether the slot is used, bool[capacity].
    """
    ends = jnp.cumsum(lengths)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    # One count at every end, summed up, is the number of segments that have ended.
    ended = jnp.zeros((capacity,), jnp.int32).at[ends].add(1, mode="drop")
    segment = jnp.minimum(jnp.cumsum(ended), lengths.size - 1)
    return segment, slot - (ends - lengths)[segment], slot < ends[-1]


def compact(
    flat: jax.Array, sizes: np.ndarray, lengths: jax.Array, capacity: int
) -> jax.Array:
    """Lays prefixes of static segments one after the other into a buffer.

    Args:
      flat: [sum(sizes)], the segments in full, one after the other.
      sizes: int[S], static sizes of the segments.
      lengths: int32[S], how much of each is taken, known at run time.
      capacity: Static length of the buffer; what does not fit is cut off.
    """
    segment, offset, used = segments(lengths, capacity)
    base = jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32)
    return jnp.where(used, flat[base[segment] + offset], 0)


def expand(buffer: jax.Array, sizes: np.ndarray, lengths: jax.Array) -> jax.Array:
    """Undoes `compact`; what was not taken becomes zero."""
    segment = np.repeat(np.arange(len(sizes)), sizes)
    offset = np.arange(len(segment)) - (np.cumsum(sizes) - sizes)[segment]
    start = jnp.cumsum(lengths) - lengths
    taken = buffer.at[start[segment] + offset].get(mode="clip")
    return jnp.where(offset < lengths[segment], taken, 0)


def keep_lowest(words: jax.Array, count: jax.Array) -> jax.Array:
    """Keeps the lowest `count` set bits of each uint32 word and clears the others."""
    below = select_bit(words, count)
    return jnp.where(
        count >= lax.population_count(words).astype(jnp.int32),
        words,
        words & ((jnp.uint32(1) << below.astype(jnp.uint32)) - 1),
    )


def select_bit(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Position, int32, of the set bit number `rank` (from 0) of each uint32 word.

    Without that many set bits the result is 31 at most and has no meaning.
    """
    position = jnp.zeros(words.shape, jnp.int32)
    for half in (16, 8, 4, 2, 1):  # descend into the half that holds the bit
        low = words & jnp.uint32((1 << half) - 1)
        count = lax.population_count(low).astype(jnp.int32)
        above = rank >= count
        position += jnp.where(above, half, 0)
        rank -= jnp.where(above, count, 0)
        words = jnp.where(above, words >> half, low)
    return position


def owner(start: jax.Array, capacity: int) -> jax.Array:
    """For each slot of a buffer the segment in it, int32[capacity].

    Args:
      start: int32[S], first slot of each segment, ascending; an empty segment starts
        where the next one does, which takes the slot.
      capacity: Static length of the buffer.
    """
    number = jnp.arange(start.size, dtype=jnp.int32)
    first = jnp.zeros((capacity,), jnp.int32).at[start].max(number, mode="drop")
    return lax.cummax(first)


def running_sum(x: jax.Array) -> jax.Array:
    """Cumulative sum of int32[n], in two levels, which is faster than one."""
    if x.size % 64:
        return jnp.cumsum(x)
    inner = jnp.cumsum(x.reshape(-1, 64), axis=1)
    outer = jnp.cumsum(inner[:, -1]) - inner[:, -1]
    return (inner + outer[:, None]).reshape(-1)


def positions(mask: jax.Array, start: jax.Array, capacity: int) -> tuple:
    """Positions of the set bits of a packed mask, laid into a buffer.

    Args:
      mask: uint32[n], see `pack_bits`.
      start: int32[n], ascending: slot of each word's first set bit; those of a word
        lie one after the other.
      capacity: Static number of slots.

    Returns:
      int32[capacity], the position in each slot, and bool[capacity], whether the slot
      is used.
    """
    counts = lax.population_count(mask).astype(jnp.int32)
    # Empty words would hide the one whose bits lie before them.
    word = owner(jnp.where(counts > 0, start, capacity), capacity)
    rank = jnp.arange(capacity, dtype=jnp.int32) - start[word]
    return word * WORD + select_bit(mask[word], rank), rank < counts[word]


def capacity_ladder(
    low: int, high: int, exact: np.ndarray, spacing: float
) -> list[int]:
    """Static lengths for messages between `low` and `high` words.

    Neighbours differ by the factor `spacing` at most, so that rounding up costs about
    `(spacing - 1) / 2` on average; `exact` lengths up to `high` are on the ladder as
    they are.
    """
    count = int(np.ceil(np.log(high / low) / np.log(spacing))) if high > low else 0
    steps = low * (high / low) ** (np.arange(count + 1) / max(count, 1))
    steps = np.ceil(steps - 1e-9).astype(int)
    ladder = {low, high, *steps.tolist(), *(int(e) for e in exact)}
    return sorted(c for c in ladder if low <= c <= high)


def noise(key: jax.Array, size: int) -> jax.Array:
    """Uniform float32[size] in [0, 1) from hashing a counter with a key.

    Rounding needs one random number per element, and a full threefry draw costs more
    than the rest of a quantiser; one round of an integer hash ("lowbias32", C. Wellons,
    2018, Prospecting for Hash Functions), keyed twice, suffices and fuses with its use.
    """
    # By way of int32: a conversion from unsigned does not vectorise on most CPUs.
    bits = (random_words(key, size) >> 8).astype(jnp.int32)
    return bits.astype(jnp.float32) * np.float32(2**-24)


def random_words(key: jax.Array, size: int) -> jax.Array:
    """Random uint32[size]; see `noise`."""
    first, second = jax.random.key_data(key).reshape(-1)[-2:]
    x = lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B9) + first
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = ((x ^ (x >> 15)) + second) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
