"""Collectives: all there are, each with the words that one worker sends through it.

Nothing else in gcjax communicates between workers, so that whatever is sent is counted
where it is sent, under a name that `gcjax.wire_report` finds in the program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gcjax import wire
from gcjax.base import Words
from gcjax.workers import checked


def gather(x: jax.Array, axis_name: str, name: str) -> tuple[jax.Array, Words]:
    """All workers' arrays, stacked. One worker sends (N - 1) times its size."""
    to = {"to": "invarying"} if checked(axis_name) else {}
    with _declared(name, x):
        return lax.all_gather(x, axis_name, **to), no_words()._replace(gathered=size(x))


def all_reduce(x: jax.Array, axis_name: str, name: str) -> tuple[jax.Array, Words]:
    """Mean over workers. One worker sends 2 (N - 1) / N times the size (a ring)."""
    with _declared(name, x):
        total = lax.psum(x, axis_name) / lax.axis_size(axis_name)
    return total, no_words()._replace(reduced=size(x))


def scatter(x: jax.Array, axis_name: str, name: str) -> tuple[jax.Array, Words]:
    """Sends x[j] to worker j; [i] of the result is what worker i sent here.

    One worker sends (N - 1) / N times the size of x.
    """
    with _declared(name, x):
        received = lax.all_to_all(x, axis_name, 0, 0, tiled=True)
    return received, no_words()._replace(scattered=size(x))


def pass_on(x: jax.Array, axis_name: str, name: str) -> tuple[jax.Array, Words]:
    """Sends x to the next worker of a ring and receives the one before's."""
    count = lax.axis_size(axis_name)
    ring = [(i, (i + 1) % count) for i in range(count)]
    with _declared(name, x):
        return lax.ppermute(x, axis_name, ring), no_words()._replace(permuted=size(x))


def send(x: jax.Array, source: int, target: int, axis_name: str, name: str):
    """Sends x from one worker to one other; all others receive zeros.

    What is counted is the caller's affair: the one sends, not all.
    """
    with _declared(name, x):
        return lax.ppermute(x, axis_name, [(source, target)])


def every_workers(x: jax.Array, axis_name: str) -> jax.Array:
    """All workers' arrays, stacked, without a message: where workers are simulated."""
    return lax.all_gather(x, axis_name)


def switch(needed: jax.Array, ladder: list[int], at_capacity: Callable, *args: Any):
    """Calls `at_capacity` with the least capacity of a ladder that suffices.

    The index must be the same on all workers: a collective stands in the branch.
    """
    if len(ladder) == 1:
        return at_capacity(ladder[0], *args)
    branches = [lambda *a, c=c: at_capacity(c, *a) for c in ladder]
    index = jnp.searchsorted(jnp.array(ladder, jnp.int32), needed)
    return lax.switch(index, branches, *args)


def size(x: jax.Array) -> jax.Array:
    """Size of an array in 32-bit words, int32."""
    return jnp.int32(_words(x))


def no_words() -> Words:
    """What one worker contributed where nothing was sent."""
    return Words(*[jnp.int32(0)] * len(Words._fields))


def _words(x: jax.Array) -> int:
    return -(-x.size * x.dtype.itemsize * 8 // wire.WORD)


def _declared(name: str, x: jax.Array):
    """Names a collective and what is counted for it, for `wire_report` to find."""
    return jax.named_scope(f"gcjax:{name}:words={_words(x)}")
