"""Messages: bits in words, run-time sizes in static buffers, against plain NumPy.

One shape per function, so that each compiles once; hypothesis varies the contents.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gcjax import wire

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
WORDS = 5  # words of a mask, 160 bits
words = st.lists(
    st.one_of(
        st.sampled_from([0, 1, 1 << 31, 0xFFFFFFFF, 0x80000001, 0xFFFF0000]),
        st.integers(0, 2**32 - 1),
    ),
    min_size=WORDS,
    max_size=WORDS,
).map(lambda values: np.array(values, np.uint32))


def bits_of(words):
    """The bits of words, lowest first, bool[32 * n]."""
    return np.array([(int(w) >> i) & 1 for w in words for i in range(32)], bool)


# --- Bits. ---------------------------------------------------------------------------

pack = jax.jit(wire.pack_bits)
unpack = jax.jit(wire.unpack_bits)


@few
@given(words)
def test_bits_are_packed_lowest_first_and_come_back(mask):
    np.testing.assert_array_equal(pack(bits_of(mask)), mask)
    np.testing.assert_array_equal(unpack(mask), bits_of(mask))


def test_bits_pack_along_the_last_axis():
    bits = np.random.default_rng(0).integers(0, 2, (3, 2, 64)).astype(bool)
    packed = wire.pack_bits(bits)
    assert packed.shape == (3, 2, 2) and packed.dtype == jnp.uint32
    for i in np.ndindex(3, 2):
        np.testing.assert_array_equal(bits_of(packed[i]), bits[i])
    np.testing.assert_array_equal(wire.unpack_bits(packed), bits)


def test_floats_and_words_are_two_views():
    x = np.array([0.0, -0.0, 1.5, -3e38, 1e-40, np.inf], np.float32)
    np.testing.assert_array_equal(wire.to_words(x), x.view(np.uint32))
    np.testing.assert_array_equal(
        np.asarray(wire.to_floats(x.view(np.uint32))).view(np.uint32),
        x.view(np.uint32),
    )


select = jax.jit(wire.select_bit)


@few
@given(words)
def test_select_bit_finds_every_set_bit(mask):
    ranks = np.arange(32, dtype=np.int32)
    found = np.asarray(select(mask[:, None], np.tile(ranks, (WORDS, 1))))
    for word, row in zip(mask, found, strict=True):
        at = np.flatnonzero(bits_of([word]))
        np.testing.assert_array_equal(row[: at.size], at)
        assert (row <= 31).all()


keep = jax.jit(wire.keep_lowest)


@few
@given(words, st.lists(st.integers(0, 40), min_size=WORDS, max_size=WORDS))
@example(np.full(WORDS, 0xFFFFFFFF, np.uint32), [0, 1, 31, 32, 33])
def test_keep_lowest_keeps_that_many_of_the_lowest_bits(mask, counts):
    kept = np.asarray(keep(mask, np.array(counts, np.int32)))
    for word, count, result in zip(mask, counts, kept, strict=True):
        bits = bits_of([word])
        bits[np.flatnonzero(bits)[count:]] = False
        np.testing.assert_array_equal(bits_of([result]), bits)


CAPACITY = 60  # below the 160 possible positions: both too many and too few occur
positions = jax.jit(wire.positions, static_argnums=2)


@few
@given(words)
@example(np.zeros(WORDS, np.uint32))
@example(np.array([0, 0, 1 << 31, 0, 1], np.uint32))
@example(np.full(WORDS, 0xFFFFFFFF, np.uint32))
def test_positions_are_those_of_the_set_bits(mask):
    counts = np.array([bin(int(w)).count("1") for w in mask])
    start = (np.cumsum(counts) - counts).astype(np.int32)
    found, used = map(np.asarray, positions(mask, start, CAPACITY))
    at = np.flatnonzero(bits_of(mask))[:CAPACITY]
    np.testing.assert_array_equal(used, np.arange(CAPACITY) < at.size)
    np.testing.assert_array_equal(found[used], at)


@few
@given(words, st.integers(0, 40))
def test_positions_of_segments_start_where_they_shall(mask, gap):
    """Two segments of words, with unused slots after the first."""
    counts = np.array([bin(int(w)).count("1") for w in mask])
    start = np.cumsum(counts) - counts
    start[2:] += gap
    found, used = map(np.asarray, positions(mask, start.astype(np.int32), 200))
    at, slot = np.flatnonzero(bits_of(mask)), np.flatnonzero(used)
    np.testing.assert_array_equal(found[used], at)
    np.testing.assert_array_equal(slot, np.arange(at.size) + gap * (at >= 64))


@few
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_owner_is_the_segment_of_each_slot(sizes):
    start = np.cumsum(sizes) - sizes
    found = np.asarray(wire.owner(jnp.asarray(start, jnp.int32), int(sum(sizes)) + 2))
    expected = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(found[: expected.size], expected)


@pytest.mark.parametrize("size", [1, 64, 100, 6400])
def test_running_sum_is_the_cumulative_sum(size):
    x = np.random.default_rng(0).integers(-5, 9, size)
    found = wire.running_sum(jnp.asarray(x, jnp.int32))
    np.testing.assert_array_equal(found, np.cumsum(x))


def test_stored_returns_what_it_is_given():
    tree = jnp.arange(5, dtype=jnp.int32), jnp.array([np.nan, 2.0])
    for x, y in zip(jax.jit(wire.stored)(tree), tree, strict=True):
        np.testing.assert_array_equal(x, y)


# --- Segments. -----------------------------------------------------------------------

SIZES = np.array([4, 1, 9, 6])
lengths = st.tuples(*(st.integers(0, int(n)) for n in SIZES)).map(
    lambda values: np.array(values, np.int32)
)
segments = jax.jit(wire.segments, static_argnums=1)


@few
@given(lengths)
@example(np.array([0, 0, 0, 0], np.int32))
@example(np.array([0, 1, 0, 6], np.int32))
def test_segments_lie_one_after_the_other(lengths):
    segment, offset, used = map(np.asarray, segments(lengths, 24))
    expected = [(s, o) for s, n in enumerate(lengths) for o in range(n)]
    np.testing.assert_array_equal(used, np.arange(24) < len(expected))
    pairs = list(zip(segment[used].tolist(), offset[used].tolist(), strict=True))
    assert pairs == expected
    assert (0 <= segment).all() and (segment < SIZES.size).all()


FLAT = np.arange(1, SIZES.sum() + 1, dtype=np.float32)
PARTS = np.split(FLAT, np.cumsum(SIZES)[:-1])
compact = jax.jit(lambda x, n, c: wire.compact(x, SIZES, n, c), static_argnums=2)
expand = jax.jit(lambda buffer, n: wire.expand(buffer, SIZES, n))


@few
@given(lengths)
@example(SIZES.astype(np.int32))
@example(np.zeros(4, np.int32))
def test_compact_lays_prefixes_and_expand_puts_them_back(lengths):
    taken = np.concatenate([p[:n] for p, n in zip(PARTS, lengths, strict=True)])
    for capacity in (FLAT.size, 30, 10):  # exact at most, larger, cutting off
        buffer = np.asarray(compact(FLAT, lengths, capacity))
        expected = np.zeros(max(capacity, taken.size), np.float32)
        expected[: taken.size] = taken
        np.testing.assert_array_equal(buffer, expected[:capacity])
        if taken.size <= capacity:
            prefixes = [
                np.where(np.arange(p.size) < n, p, 0)
                for p, n in zip(PARTS, lengths, strict=True)
            ]
            np.testing.assert_array_equal(
                expand(buffer, lengths), np.concatenate(prefixes)
            )


def test_fit_cuts_and_pads():
    x = jnp.arange(1, 5)
    assert wire.fit(x, 2).tolist() == [1, 2]
    assert wire.fit(x, 4).tolist() == [1, 2, 3, 4]
    assert wire.fit(x, 6).tolist() == [1, 2, 3, 4, 0, 0]


# --- Capacities. ---------------------------------------------------------------------


@settings(few, max_examples=200)
@given(
    low=st.integers(1, 5000),
    factor=st.floats(1, 300),
    exact=st.lists(st.integers(1, 100_000), max_size=4),
    spacing=st.floats(1.01, 2),
)
@example(low=1, factor=1.0, exact=[], spacing=1.05)
def test_capacity_ladder_is_fine_and_holds_the_exact_lengths(
    low, factor, exact, spacing
):
    high = max(low, int(low * factor))
    ladder = wire.capacity_ladder(low, high, np.array(exact), spacing)
    assert ladder[0] == low and ladder[-1] == high
    assert ladder == sorted(set(ladder))
    assert {e for e in exact if low <= e <= high} <= set(ladder)
    # A step is the factor `spacing`, rounded up.
    for a, b in zip(ladder, ladder[1:], strict=False):
        assert b <= np.ceil(a * spacing)


# --- Random numbers. -----------------------------------------------------------------


def keys_of(count):
    """Keys as an aggregator derives them, for 8 workers at step after step."""

    def key(i):
        return jax.random.fold_in(jax.random.fold_in(seed, i // 8), i % 8 + 1)

    seed = jax.random.key(3)
    return jax.vmap(key)(jnp.arange(count))


def draw(count, size):
    return np.asarray(jax.vmap(lambda key: wire.noise(key, size))(keys_of(count)))


def test_noise_has_the_mean_and_the_spread_of_a_uniform_number():
    """4 million draws: 5 standard errors of the mean are 7e-4, 0.14 % of it."""
    u = draw(64, 1 << 16).astype(np.float64)
    assert 0 <= u.min() and u.max() < 1
    error = 5 / np.sqrt(u.size)
    assert abs(u.mean() - 1 / 2) < error * np.sqrt(1 / 12)
    assert abs((u**2).mean() - 1 / 3) < error * np.sqrt(1 / 5 - 1 / 9)
    share = np.histogram(u, 32, (0, 1))[0] / u.size
    assert np.abs(share - 1 / 32).max() < error * np.sqrt(1 / 32)


def correlation(a, b):
    """Correlation of two samples of uniform numbers, in standard errors."""
    return np.mean((a - 0.5) * (b - 0.5)) * 12 * np.sqrt(a.size)


def test_noise_is_uncorrelated_between_neighbours_steps_and_workers():
    """Over a million pairs each, so that 5 standard errors are 0.5 %."""
    u = draw(32, 1 << 15).astype(np.float64)
    for lag in (1, 2, 3, 31, 32, 33, 256, 1024):
        assert abs(correlation(u[:, lag:], u[:, :-lag])) < 5, f"elements {lag} apart"
    for lag in (1, 2, 3, 8, 16):  # workers of a step, and a worker's steps
        assert abs(correlation(u[lag:], u[:-lag])) < 5, f"keys {lag} apart"
    # Not even shifted against each other.
    for lag in (1, 32):
        assert abs(correlation(u[1:, lag:], u[:-1, :-lag])) < 5


def test_noise_of_one_element_over_many_steps_has_mean_one_half():
    """No element is rounded up more often than others; 4096 steps, 512 elements."""
    u = draw(4096, 512).astype(np.float64)
    assert np.abs(u.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 4096)
    # The means spread as those of independent draws do, not more.
    spread = u.mean(0).std() / np.sqrt(1 / 12 / 4096)
    assert abs(spread - 1) < 5 / np.sqrt(2 * 512)


def test_every_random_bit_is_one_half_of_the_time():
    words = jax.vmap(lambda key: wire.random_words(key, 1 << 14))(keys_of(64))
    for bit in range(32):
        share = np.mean((np.asarray(words) >> bit) & 1, dtype=np.float64)
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(words.size), f"bit {bit}"
