"""Packets of a fixed size: how many values each carries, at how many bits.

A worker may send a given number of packets per round. Its largest entries go into them
in descending order, those of one packet at one width: narrow codes carry more entries,
wide ones carry them better. The widths are the shortest path through the ranks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import wire
from gcjax.base import Compressor, Keys, Layout

WIDTHS = tuple(range(3, 17))  # bits of a value that are chosen from, sign included
MODELS = ("grid", "pq", "qsgd")
_HEADER = 2  # words: count and width; the largest magnitude
_RAW = 32  # width of values that are sent as they are


class Units(NamedTuple):
    """The units of `fed_cvlc`."""

    packets: jax.Array  # uint32[packets, words of one]


class State(NamedTuple):
    """What a worker remembers."""

    widths: jax.Array  # int32[packets], of the last solution
    rounds: jax.Array  # int32, so far


def fed_cvlc(
    packets: int,
    packet_bytes: int,
    every: int = 50,
    *,
    model: str = "grid",
    bits: int | None = None,
) -> Compressor:
    """Fed-CVLC: the widths of a round's packets that lose the least energy.

    Of the whole gradient, all layers together, the entries of largest magnitude are
    sent: packet y takes the next floor(room / (b_y + s)) of them, with s bits for a
    place and b_y for sign and magnitude. The b_y, in 3..16, minimise
    (energy of what is not sent + sum_y q(k_y, b_y) energy_y) / energy, exactly, by
    dynamic programming over ranks. Magnitudes are rounded to the nearest of
    2^(b - 1) - 1 equal steps up to the packet's largest, and zero.

    Args:
      packets: Per worker and round, at least 1.
      packet_bytes: Of one packet, at most 65,536, header included; a multiple of 4.
      every: Rounds after which a worker solves again.
      model: What q is: "pq" sqrt(k) / 4^b, or "qsgd" k / 4^b, as the authors have them;
        or "grid", what rounding loses here, k steps^2 / 12.
      bits: A fixed width for all packets, 2..16, or 32 for plain float32, the baseline
        that sends the largest entries; None to solve.

    Payload: per packet a word with count and width, float32 the largest magnitude,
      k places of s = ceil(log2(elements of the layout)) bits, and k codes of b bits:
      `packets * packet_bytes` in all, whatever is in them.
    Properties: contraction, since every entry is rounded to one at least as near to it
      as zero is; biased, so it wants error feedback.
    Raises:
      ValueError: for arguments out of range, or a packet too small for one value.
    References: Su, Zhou, Cui, Lui and Liu, 2024, Fed-CVLC: Federated Learning
      Communication with Variable-Length Codes, arXiv:2402.03770.
    Note: Deviations: exact instead of coordinate descent over pairs of packets;
      rounding to the nearest, which halves the loss of stochastic rounding and whose
      bias error feedback takes care of; the header counts; every worker solves for
      itself, and no packet of signs of unselected entries is sent.
    """
    if packets < 1 or not 12 <= packet_bytes <= 2**16 or packet_bytes % 4:
        raise ValueError(
            "fed_cvlc: packets must be >= 1 and packet_bytes a multiple of 4 in "
            f"[12, 65536], got {packets} and {packet_bytes}"
        )
    if every < 1 or model not in MODELS:
        raise ValueError(
            f"fed_cvlc: every must be >= 1 and model one of {MODELS}, got {every} and "
            f"{model!r}"
        )
    if bits is not None and bits not in (*range(2, 17), _RAW):
        raise ValueError(f"fed_cvlc: bits must be in 2..16 or 32, got {bits}")
    form = partial(_Form, packets=packets, words=packet_bytes // 4, fixed=bits)

    def words(layout: Layout) -> np.ndarray:
        form(layout.size).check()  # before anything is compiled
        share = np.cumsum(layout.sizes) / layout.sizes.sum()
        ends = np.round(share * packets * packet_bytes / 4).astype(np.int64)
        return np.diff(ends, prepend=0)[:, None]

    def encode(layout: Layout, x: jax.Array, levels: jax.Array, keys: Keys, state):
        del keys
        shape = form(layout.size)
        is_sent = (levels >= 0)[layout.row_layer][:, None]
        x = jnp.where(is_sent, x.reshape(layout.num_rows, -1), 0).reshape(-1)
        magnitudes, places = lax.top_k(jnp.abs(x), min(shape.most, x.size))
        if bits is None:
            again = lambda: solve(magnitudes, _energy(x, magnitudes), shape, model)
            due = state.rounds % every == 0
            widths = lax.cond(due, again, lambda: state.widths)
            rounds = state.rounds + jnp.any(levels >= 0).astype(jnp.int32)
            state = State(widths, rounds)
        else:
            widths = jnp.full_like(places[:packets], bits, shape=(packets,))
        made = _write(shape, widths, x[places], places)
        return Units(made), _read(shape, made[None], x.size), state

    def errors(layout: Layout, x: jax.Array) -> jax.Array:
        levels = jnp.zeros(layout.num_layers, jnp.int32)
        x = layout.clear_padding(x)
        _, x_hat, _ = encode(layout, x, levels, None, init(layout))
        lost = jnp.sum((x - x_hat).reshape(layout.num_rows, -1) ** 2, axis=1)
        return layout.sum_rows(lost)[:, None]

    def init(layout: Layout):
        del layout
        return State(jnp.zeros(packets, jnp.int32), jnp.int32(0)) if not bits else ()

    return Compressor(
        name="fed_cvlc",
        levels=(packets,),
        row=32,
        contraction=(True,),
        linear=False,
        words=words,
        errors=errors,
        init=init,
        encode=encode,
        pack=lambda layout, units, levels, capacity: (
            wire.fit(units.packets.reshape(-1), capacity),
            (),
        ),
        decode=lambda layout, messages, levels, shared: (
            _read(
                form(layout.size),
                messages[:, : packets * packet_bytes // 4].reshape(
                    len(messages), packets, -1
                ),
                layout.size,
            )
            / len(messages)
        ),
    )


class _Form(NamedTuple):
    """What a message looks like; static."""

    size: int  # elements of the vector
    packets: int
    words: int  # of a packet
    fixed: int | None  # width of all packets, if it is not chosen

    @property
    def place_bits(self) -> int:
        """Bits of a place."""
        return max(1, (self.size - 1).bit_length())

    def count(self, width: int) -> int:
        """Values in a full packet at a width."""
        return 32 * (self.words - _HEADER) // (width + self.place_bits)

    @property
    def slots(self) -> int:
        """Most values in a packet."""
        return self.count(self.fixed or WIDTHS[0])

    @property
    def most(self) -> int:
        """Most values in all packets."""
        return self.packets * self.slots

    def check(self) -> None:
        """Raises ValueError if a packet has no room for one value."""
        if self.count(self.fixed or WIDTHS[-1]) < 1:
            raise ValueError(
                f"fed_cvlc: packets of {4 * self.words} bytes are too small for one of "
                f"{self.size} elements; use larger packets"
            )


# --- Which widths. --------------------------------------------------------------------


def _energy(x: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Energy of all, in units of the largest squared."""
    largest = jnp.maximum(magnitudes[0], jnp.finfo(jnp.float32).tiny)
    return jnp.sum((x / largest) ** 2)


def solve(
    magnitudes: jax.Array, energy: jax.Array, form: _Form, model: str
) -> jax.Array:
    """Widths of the packets, int32[packets], by a shortest path through the ranks.

    Args:
      magnitudes: The largest ones, descending, [n].
      energy: Of all elements, in units of the largest magnitude squared.
      form: Of the message.
      model: As in `fed_cvlc`.
    """
    ranks = form.most + 1
    largest = jnp.maximum(magnitudes[0], jnp.finfo(jnp.float32).tiny)
    scaled = jnp.pad(magnitudes / largest, (0, ranks - magnitudes.size))
    before = jnp.append(0, jnp.cumsum(scaled[:-1] ** 2))  # energy ahead of each rank
    # Of every width, a packet that ends at each rank: where it starts, what it costs.
    counts = np.array([form.count(width) for width in WIDTHS])[:, None]
    start = np.maximum(np.arange(ranks) - counts, 0)
    k = np.clip(magnitudes.size - start, 0, counts)
    widths = np.array(WIDTHS)[:, None]
    if model == "grid":
        cost = jnp.asarray(k / 12 / _steps(widths) ** 2, jnp.float32)
        cost *= scaled[start] ** 2
    else:
        cost = jnp.asarray((np.sqrt(k) if model == "pq" else k) / 4.0**widths)
        cost = cost.astype(jnp.float32) * (before - before[start])
    cost = jnp.where(np.arange(ranks) < counts, jnp.inf, cost)

    def add_packet(best, _):
        options = best[start] + cost
        return jnp.min(options, axis=0), jnp.argmin(options, axis=0).astype(jnp.int8)

    # Made from the energies, so that it varies over workers as they do.
    none = jnp.where(np.arange(ranks) == 0, before * 0, jnp.inf)
    best, choices = lax.scan(add_packet, none, length=form.packets)
    end = jnp.argmin(best + jnp.maximum(energy - before, 0))

    def step_back(end, choice):
        chosen = choice[end].astype(jnp.int32)
        return end - jnp.asarray(counts[:, 0], jnp.int32)[chosen], chosen

    _, chosen = lax.scan(step_back, end.astype(jnp.int32), choices, reverse=True)
    return chosen + WIDTHS[0]


def _steps(width):
    """Steps of magnitude up to a packet's largest."""
    return 2.0 ** (width - 1) - 1


# --- Bits. ----------------------------------------------------------------------------


def _write(form: _Form, widths, values, places) -> jax.Array:
    """Packets uint32[packets, words] of values and places [n], largest first."""
    room = 32 * (form.words - _HEADER)
    counts = room // (widths + form.place_bits)
    first = jnp.cumsum(counts) - counts
    counts = jnp.clip(values.size - first, 0, counts)
    slot = jnp.arange(form.slots, dtype=jnp.int32)
    rank = jnp.minimum(first[:, None] + slot, values.size - 1)
    used = slot < counts[:, None]
    value, place = values[rank], places[rank].astype(jnp.uint32)
    scale = jnp.where(counts > 0, jnp.abs(value[:, 0]), 0)
    width, count = widths[:, None], counts[:, None]

    safe = jnp.where(scale > 0, scale, 1)[:, None]
    steps = jnp.round(jnp.abs(value) / safe * _steps(width.astype(jnp.float32)))
    sign = (value < 0).astype(jnp.uint32) << (width - 1).astype(jnp.uint32)
    code = steps.astype(jnp.int32).astype(jnp.uint32) | sign
    if form.fixed == _RAW:
        code = wire.to_words(value)

    packets = jnp.zeros((form.packets, form.words + 1), jnp.uint32)
    packets = packets.at[:, 0].set((counts | widths << 24).astype(jnp.uint32))
    packets = packets.at[:, 1].set(wire.to_words(scale))
    places_at = 32 * _HEADER + slot * form.place_bits
    codes_at = 32 * _HEADER + count * form.place_bits + slot * width
    for at, field in ((places_at, place), (codes_at, code)):
        packets = _put(packets, jnp.broadcast_to(at, used.shape), field, used)
    return packets[:, :-1]


def _put(packets, at, field, used):
    """Adds fields of bits to packets at bit positions, all [packets, slots]."""
    row = jnp.arange(packets.shape[0])[:, None]
    at = jnp.where(used, at, 0)
    field = jnp.where(used, field, 0)
    word, bit = at >> 5, (at & 31).astype(jnp.uint32)
    # A shift by 32 bits is undefined, one by 31 and then one is not.
    packets = packets.at[row, word].add(field << bit)
    return packets.at[row, word + 1].add((field >> 1) >> (31 - bit))


def _get(packets, at, width):
    """Reads fields of `width` bits, all [..., slots]."""
    take = lambda word: jnp.take_along_axis(packets, word, axis=-1, mode="clip")
    word, bit = at >> 5, (at & 31).astype(jnp.uint32)
    field = (take(word) >> bit) | ((take(word + 1) << 1) << (31 - bit))
    return field & (jnp.uint32(0xFFFFFFFF) >> (32 - width).astype(jnp.uint32))


def _read(form: _Form, packets: jax.Array, size: int) -> jax.Array:
    """Sum float32[size] of what M messages uint32[M, packets, words] say."""
    packets = packets.reshape(-1, form.words)
    count = (packets[:, :1] & 0xFFFFFF).astype(jnp.int32)
    width = (packets[:, :1] >> 24).astype(jnp.int32)
    scale = wire.to_floats(packets[:, 1:2])
    slot = jnp.arange(form.slots, dtype=jnp.int32)
    used = slot < count
    s = jnp.int32(form.place_bits)
    at = jnp.broadcast_to(32 * _HEADER + slot * s, used.shape)
    place = _get(packets, at, s).astype(jnp.int32)
    at = jnp.where(used, 32 * _HEADER + count * s + slot * width, 0)
    code = _get(packets, at, width)
    if form.fixed == _RAW:
        value = wire.to_floats(code)
    else:
        half = (jnp.uint32(1) << (width - 1).astype(jnp.uint32)) - 1
        steps = (code & half).astype(jnp.int32).astype(jnp.float32)
        value = steps / _steps(width.astype(jnp.float32)) * scale
        value = jnp.where(code > half, -value, value)
    out = jnp.zeros_like(scale, shape=(size,))
    place = jnp.where(used, place, size)
    return out.at[place.reshape(-1)].add(
        jnp.where(used, value, 0).reshape(-1), mode="drop"
    )
