"""How a quantiser's codes lie in 32-bit words: neighbours in fields, or bit planes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax import wire
from gcjax.base import Rows


class Body(NamedTuple):
    """How codes become words."""

    store: Callable  # codes int32[R, row] -> stored
    load: Callable  # stored -> codes int32[R, row]
    # (stored, order int[S, R], rows [S, R], words) -> uint32[S, words]
    pack: Callable
    # (uint32[S, words], rows [S, R], natural) -> stored: of all S R rows, or of the
    # rows int[R'] among them that `natural` lists
    unpack: Callable
    words: Callable  # rows [S, R] -> words of each of S messages


def fields(width: int, row: int) -> Body:
    """Codes of one width, neighbours in one word.

    A width that does not divide 32 is split into powers of two, 9 = 8 + 1. Where the
    rows of a message are those of a layout in their order, units that hold nothing
    are left out.
    """
    parts = [f for f in (16, 8, 4, 2, 1) if width & f]  # bits of each field
    shifts = [sum(parts[:i]) for i in range(len(parts))]
    ones = lambda f: jnp.int32((1 << f) - 1)
    lanes = lambda f: f * np.arange(wire.WORD // f, dtype=np.int32)

    def store(codes: jax.Array) -> list[jax.Array]:
        if len(parts) > 1:
            codes = lax.optimization_barrier(codes)
        fields = []
        for f, shift in zip(parts, shifts, strict=True):
            bits = ((codes >> shift) & ones(f)) if len(parts) > 1 else codes
            bits = bits.reshape(len(codes), -1, wire.WORD // f) << lanes(f)
            fields.append(jnp.sum(bits, axis=-1, dtype=jnp.int32))
        return lax.optimization_barrier(fields)

    def load(fields: list[jax.Array]) -> jax.Array:
        codes = jnp.int32(0)
        for words, f, shift in zip(fields, parts, shifts, strict=True):
            bits = (words[:, :, None] >> lanes(f)) & ones(f)
            codes |= bits.reshape(len(words), row) << shift
        return codes

    def sent_units(rows: Rows) -> np.ndarray | None:
        """Units that are sent; None for all."""
        shares = not isinstance(rows.valid, np.ndarray) or len(rows.valid) > 1
        if shares or rows.unit == row:
            return None
        first = np.arange(row // rows.unit) * rows.unit
        return np.flatnonzero(first < rows.valid.reshape(-1, 1))

    def pack(fields: list[jax.Array], order: np.ndarray, rows: Rows, words: int):
        chosen, out = sent_units(rows), []
        for x, f in zip(fields, parts, strict=True):
            x = jnp.pad(x, ((0, order.size - len(x)), (0, 0)))
            if chosen is not None:
                x = x.reshape(-1, rows.unit * f // wire.WORD)[chosen]
            out.append(x.reshape(len(order), -1))
        message = jnp.concatenate(out, axis=1)
        message = jnp.pad(message, ((0, 0), (0, words - message.shape[1])))
        return lax.bitcast_convert_type(message, jnp.uint32)

    def unpack(messages: jax.Array, rows: Rows, natural) -> list[jax.Array]:
        messages = lax.bitcast_convert_type(messages, jnp.int32)
        chosen, fields, at = sent_units(rows), [], 0
        count = rows.valid.size * (row // rows.unit)
        each = len(chosen) if chosen is not None else count // len(messages)
        for f in parts:
            size = each * rows.unit * f // wire.WORD
            x = messages[:, at : at + size]
            at += size
            if chosen is not None:  # what was left out is read as something else
                x = x.reshape(each, -1)[np.searchsorted(chosen[:-1], np.arange(count))]
            x = x.reshape(rows.valid.size, -1)
            fields.append(x if natural is None else x[: len(natural)])
        return fields

    def words(rows: Rows) -> np.ndarray:
        chosen = sent_units(rows)
        per_row = row // rows.unit
        each = rows.valid.shape[1] * per_row if chosen is None else len(chosen)
        return np.full(len(rows.valid), each * rows.unit * width // wire.WORD)

    return Body(store, load, pack, unpack, words)


def planes(widest: int, row: int) -> Body:
    """Codes of a width for each row, known at run time: bit planes of units.

    Codes are stored as bytes. A unit's plane is `unit` bits; a message is, row by row
    and unit by unit, as many planes as the row's width says, fetched by one gather.
    """
    bytes_ = np.arange(0, wire.WORD, 8, dtype=np.uint32)
    steps = np.arange(8, dtype=np.uint32)[:, None]
    ones = np.uint32(0x01010101)  # one bit of each of the four bytes of a word

    def store(codes: jax.Array) -> jax.Array:
        codes = lax.bitcast_convert_type(codes, jnp.uint32)
        codes = codes.reshape(len(codes), row // 4, 4) << bytes_
        return lax.optimization_barrier(jnp.sum(codes, axis=-1, dtype=jnp.uint32))

    def load(stored: jax.Array) -> jax.Array:
        codes = (stored[:, :, None] >> bytes_) & np.uint32(255)
        return codes.reshape(len(stored), row).astype(jnp.int32)

    def lengths(rows: Rows) -> Any:
        """Planes of each unit, int[S, R, per_row]."""
        first = np.arange(0, row, rows.unit, dtype=np.int32)
        used = (first < rows.valid[..., None]).astype(np.int32)
        return used * rows.width[..., None]

    def words(rows: Rows) -> Any:
        return lengths(rows).sum((1, 2)) * (rows.unit // wire.WORD)

    def pack(stored: jax.Array, order: np.ndarray, rows: Rows, words: int):
        per_row, size = row // rows.unit, rows.unit // wire.WORD
        bits = stored.reshape(-1, 1, 8, size)
        bits = (bits >> np.arange(widest, dtype=np.uint32)[:, None, None]) & ones
        planes = jnp.sum(bits << steps, axis=2, dtype=jnp.uint32).reshape(-1, size)
        planes = lax.optimization_barrier(planes)

        def message(order: jax.Array, lengths: jax.Array) -> jax.Array:
            ends = jnp.cumsum(lengths.reshape(-1))
            start = ends - lengths.reshape(-1)
            slot = jnp.arange(words // size, dtype=jnp.int32)
            at = wire.owner(start, slot.size)
            source = (order[at // per_row] * per_row + at % per_row) * widest
            source += slot - start[at]
            taken = planes.at[source].get(mode="clip")
            return jnp.where((slot < ends[-1])[:, None], taken, 0).reshape(-1)

        sent = jax.vmap(message)(jnp.asarray(order, jnp.int32), lengths(rows))
        return jnp.pad(sent, ((0, 0), (0, words - sent.shape[1])))

    def unpack(messages: jax.Array, rows: Rows, natural) -> jax.Array:
        per_row, size = row // rows.unit, rows.unit // wire.WORD
        count = jnp.asarray(lengths(rows), jnp.int32)
        slots = messages.shape[1] // size
        table = messages[:, : slots * size].reshape(-1, size)
        ends = jnp.cumsum(count.reshape(len(messages), -1), axis=1)
        start = ends.reshape(count.shape) - count
        start += np.arange(len(messages), dtype=np.int32)[:, None, None] * slots
        start, count = start.reshape(-1, per_row), count.reshape(-1, per_row)
        if natural is not None:
            start, count = start[natural], count[natural]
        start, count = start.reshape(-1), count.reshape(-1)
        planes = [
            jnp.where((p < count)[:, None], table.at[start + p].get(mode="clip"), 0)
            for p in range(widest)
        ]
        stored = jnp.uint32(0)
        for p, plane in enumerate(wire.stored(planes)):
            stored |= ((plane[:, None, :] >> steps) & ones) << p
        return wire.stored(stored).reshape(-1, row // 4)

    return Body(store, load, pack, unpack, words)
