"""Low rank: the local mathematics of PowerSGD. Its two collectives are in
`exchange.power_sgd`.

A tensor of shape (..., m) is viewed as a matrix [n, m], so that convolutions of shape
(height, width, in, out) have their output channels as columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax.base import Layout


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows n and columns m of the matrix that a tensor is viewed as."""
    return int(np.prod(shape[:-1])), int(shape[-1]) if shape else 1


def admits(shape: Sequence[int], ranks: Sequence[int]) -> np.ndarray:
    """Ranks that exist for a tensor and make it smaller, bool[V]."""
    n, m = matrix_shape(shape)
    ranks = np.array(ranks)
    return (ranks <= min(n, m)) & (ranks * (n + m) < n * m)


def words(layout: Layout, ranks: Sequence[int]) -> np.ndarray:
    """Words of both factors at each rank, int64[L, V]."""
    sides = np.array([sum(matrix_shape(s)) for s in layout.shapes], np.int64)
    return sides[:, None] * np.array(ranks)


def matrices(layout: Layout, x: jax.Array) -> list[jax.Array]:
    """The layers of a flat vector as matrices [n, m]."""
    return [m.reshape(matrix_shape(m.shape)) for m in layout.unflatten(x)]


def tail_energy(layout: Layout, x: jax.Array, ranks: Sequence[int]) -> jax.Array:
    """Squared error of the best approximation at every rank, float32[L, V].

    The sum of the smallest eigenvalues of each layer's smaller Gram matrix. In float32
    tails below about 1e-6 of a layer's energy are noise; they are cut off at 0.
    """
    table = []
    for matrix in matrices(layout, x):
        n, m = matrix.shape
        tall = matrix if n >= m else matrix.T
        gram = product(tall.T, tall)
        eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(gram), 0)  # ascending
        tails = jnp.concatenate([jnp.zeros(1), jnp.cumsum(eigenvalues)])
        side = min(n, m)
        table.append(tails[np.maximum(side - np.array(ranks), 0)])
    return jnp.stack(table)


def by_shape(fn: Callable, *lists: Sequence[jax.Array]) -> list[jax.Array]:
    """Maps a function over the layers, those of equal shapes in one batched call."""
    groups: dict[Any, list[int]] = {}
    for i, arrays in enumerate(zip(*lists, strict=True)):
        groups.setdefault(tuple(a.shape for a in arrays), []).append(i)
    out: list = [None] * len(lists[0])
    for members in groups.values():
        if len(members) == 1:
            (i,) = members
            out[i] = fn(*(arrays[i] for arrays in lists))
            continue
        stacks = [jnp.stack([arrays[i] for i in members]) for arrays in lists]
        for i, result in zip(members, jax.vmap(fn)(*stacks), strict=True):
            out[i] = result
    return out


def init_factors(layout: Layout, widths: Sequence[int], key: jax.Array) -> list:
    """Random right factors, float32[m, width] of each layer."""
    return [
        jax.random.normal(
            jax.random.fold_in(key, i), (matrix_shape(shape)[1], width), jnp.float32
        )
        for i, (shape, width) in enumerate(zip(layout.shapes, widths, strict=True))
    ]


def orthogonalize(p: jax.Array, rank: jax.Array) -> jax.Array:
    """Orthonormal basis of the first `rank` columns; the others become zero."""
    basis, _ = jnp.linalg.qr(first_columns(p, rank))
    return first_columns(basis, rank)


def first_columns(matrix: jax.Array, rank: jax.Array) -> jax.Array:
    """Sets all but the first `rank` columns to zero."""
    return jnp.where(jnp.arange(matrix.shape[1]) < rank, matrix, 0)


def unit_scale(matrix: jax.Array) -> jax.Array:
    """Scales the largest magnitude to 1, if it is not 0.

    Q is of the gradient's size, so that M Q would be of its square and overflow early;
    the scale of P does not matter, because P is orthogonalised.
    """
    largest = jnp.max(jnp.abs(matrix))
    return matrix / jnp.where(largest > 0, largest, 1)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in full float32 on every backend."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
