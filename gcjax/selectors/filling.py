"""Filling a sum of ratios up, worker by worker: checked arguments, exact solvers.

What `gcjax.selectors.workers` is made of. Arguments are NumPy arrays where they are
concrete, so that their values can be refused, and JAX arrays where they are traced.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXPONENTS = {"psi": 2 / 3, "omega": 1 / 2}  # of p zeta, that minimise the criterion
_HALVINGS = 48  # of an interval of float32 numbers, which is then as short as can be


class Problem(NamedTuple):
    """What `pose` checked: workers with p = 0 have p, zeta and caps 0."""

    p: jax.Array  # float32[n], sum 1
    spread: jax.Array  # float32[n], p zeta
    caps: jax.Array  # float32[n]
    total: jax.Array  # float32, sum of the ratios
    valid: jax.Array  # bool

    def weights(self, exponent: float) -> jax.Array:
        """(p zeta)^exponent, float32[n], 0 where p is."""
        positive = self.p > 0
        power = jnp.where(positive, self.spread, 1) ** jnp.float32(exponent)
        return jnp.where(positive, power, 0)


def pose(p: Any, mean_ratio: Any, zeta: Any, max_ratio: Any) -> Problem:
    """Checks and normalises the arguments of `workers.dagc_r`, which describes them."""
    p = vector(p, "p")
    zeta = np.ones(p.shape, np.float32) if zeta is None else vector(zeta, "zeta")
    caps, mean = as_float(max_ratio), scalar(mean_ratio, "mean_ratio")
    if zeta.shape != p.shape or caps.shape not in ((), p.shape):
        raise ValueError(
            f"zeta must be [n] and max_ratio a number or [n] for p [n], got "
            f"{list(zeta.shape)} and {list(caps.shape)} for {list(p.shape)}"
        )

    def conditions(np, p, zeta, caps, mean):
        used = p > 0
        room = np.sum(np.where(used, caps, 0)) * np.float32(1 + 1e-6)
        within = mean * np.sum(used).astype(np.float32) <= room
        return [
            (is_share(np, p), "p must be finite, not negative and not all 0"),
            (
                np.all(~used | (np.isfinite(zeta) & (zeta > 0))),
                "zeta must be positive and finite wherever p > 0",
            ),
            (
                np.all(~used | ((caps > 0) & (caps <= 1))),
                "max_ratio must be in (0, 1]",
            ),
            ((mean > 0) & within, "mean_ratio must be in (0, max_ratio]"),
        ]

    valid = check(conditions, p, zeta, caps, mean)
    return _normalised(valid, p, zeta, caps, mean)


@jax.jit
def _normalised(valid, p, zeta, caps, mean) -> Problem:
    # Stand-ins for what is not valid, so that all that follows is well defined.
    p, zeta, caps = (jnp.where(valid, x, 1) for x in (p, zeta, caps))
    mean = jnp.where(valid, mean, 0.5)
    used = p > 0
    caps = jnp.where(used, caps, 0)
    p = p / jnp.max(p)  # before the sum, which might overflow
    p = p / jnp.sum(p)
    zeta = jnp.where(used, zeta, 0)
    zeta = zeta / jnp.max(zeta)
    total = mean * jnp.sum(used).astype(jnp.float32)
    total = jnp.minimum(total, jnp.sum(caps))
    return Problem(p, p * zeta, caps, total, jnp.asarray(valid))


def is_share(np, p):
    """Whether p may be the workers' shares, in NumPy or in its JAX counterpart."""
    return np.all(np.isfinite(p) & (p >= 0)) & np.any(p > 0)


def check(conditions: Callable, *values: Any) -> Any:
    """Raises ValueError if a condition fails on concrete values; else gives a bool.

    Args:
      conditions: (NumPy or jax.numpy, *values) -> [(whether it holds, message)].
      *values: Arrays, of NumPy if concrete.
    """
    if any(isinstance(v, jax.Array) for v in values):
        return jnp.all(jnp.stack([ok for ok, _ in conditions(jnp, *values)]))
    for ok, message in conditions(np, *values):
        if not ok:
            raise ValueError(message + ", got " + _short(values))
    return True


def _short(values) -> str:
    """Arrays in one line."""
    text = ", ".join(np.array2string(v, threshold=8, precision=4) for v in values)
    return " ".join(text.split())


def as_float(x: Any) -> Any:
    """As float32: of NumPy, except where JAX traces."""
    if isinstance(x, jax.core.Tracer):
        return x.astype(jnp.float32)
    return np.asarray(x).astype(np.float32)


def vector(x: Any, name: str) -> Any:
    """As float32[n]; raises ValueError for another shape."""
    x = as_float(x)
    if x.ndim != 1 or not x.size:
        raise ValueError(
            f"{name} must hold one number per worker, [n], got shape {list(x.shape)}"
        )
    return x


def scalar(x: Any, name: str) -> Any:
    """As one float32; raises ValueError for another shape."""
    x = as_float(x)
    if x.ndim:
        raise ValueError(f"{name} must be one number, got shape {list(x.shape)}")
    return x


# --- The solvers. ---------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def minimise(criterion: str, problem: Problem) -> jax.Array:
    """Ratios of one criterion, valid or not."""
    if criterion == "paper":
        return _paper(problem)
    if criterion == "phi_exact":
        return _least_phi(problem)
    weights = problem.weights(EXPONENTS[criterion])
    return fill(weights, problem.caps, problem.total)


@jax.jit
def fill(weights: jax.Array, caps: jax.Array, total: jax.Array) -> jax.Array:
    """Water filling: shares min(caps, c weights) of the given sum, exactly.

    Saturated are those whose caps / weights are least; how many is found from prefix
    sums, as each number of them implies a c. Weights and caps are 0 together.
    """
    saturates = jnp.where(weights > 0, caps / jnp.where(weights > 0, weights, 1), 0)
    order = jnp.argsort(saturates)
    w, cap = weights[order], caps[order]
    left = jnp.cumsum(w[::-1])[::-1]
    rest = total - (jnp.cumsum(cap) - cap)
    c = rest / jnp.where(left > 0, left, 1)
    fits = (left > 0) & (c <= saturates[order])
    c = jnp.where(jnp.any(fits), c[jnp.argmax(fits)], jnp.inf)
    shares = jnp.where(weights > 0, jnp.minimum(caps, c * weights), 0)
    # What rounding of the prefix sums left over goes to those not saturated.
    free = jnp.where(shares < caps, shares, 0)
    scale = 1 + (total - jnp.sum(shares)) / jnp.maximum(jnp.sum(free), 1e-37)
    return jnp.where(free > 0, jnp.minimum(caps, shares * scale), shares)


def _paper(problem: Problem) -> jax.Array:
    """Theorem 4, again for those that are left whenever some exceed their cap."""
    order = jnp.argsort(-problem.p)  # stable, so that ties go by position
    p, caps = problem.p[order], problem.caps[order]

    def solve(active):
        spent = jnp.sum(jnp.where((p > 0) & ~active, caps, 0))
        return active, _theorem_4(p, active, problem.total - spent)

    over = lambda state: state[0] & (state[1] > caps)
    active, shares = lax.while_loop(
        lambda state: jnp.any(over(state)),
        lambda state: solve(state[0] & ~over(state)),
        solve(p > 0),
    )
    found = jnp.where(active, shares, caps)
    return jnp.zeros_like(found).at[order].set(found)


def _theorem_4(p: jax.Array, active: jax.Array, total: jax.Array) -> jax.Array:
    """The n closed-form candidates and the best of them; notation of the paper.

    Args:
      p: Descending, [n].
      active: Which of them there are, bool[n].
      total: Sum of their ratios, n * mean_ratio in the paper.
    """
    index = jnp.arange(p.size)
    power = jnp.where(active, p, 0) ** (2 / 3)
    last = jnp.max(jnp.where(active, index, -1))
    before = jnp.max(jnp.where(active & (index != last), index, -1))
    r = jnp.where(index == last, before, last)
    p_r = jnp.where(r < 0, 1, p[r])  # one worker alone: Q is 0 anyway
    # The sum of the others, not by subtraction, which cancels next to a large p.
    upward, downward = jnp.cumsum(power), jnp.cumsum(power[::-1])[::-1]
    others = jnp.append(0, upward[:-1]) + jnp.append(downward[1:], 0)
    q = others / p_r ** (2 / 3)
    phi = (1 + q) * (p + p_r * q) / total
    # Of equal p the first one is a candidate, and of equal phi the last one wins.
    count = active.astype(jnp.int32)
    seen = jnp.cumsum(count) - count
    group = lax.cummax(jnp.where(p == jnp.roll(p, 1), 0, index).at[0].set(0))
    duplicate = seen > seen[group]
    phi = jnp.where(active & ~duplicate, phi, jnp.inf)
    j = p.size - 1 - jnp.argmin(phi[::-1])
    shares = jnp.where(index == j, 1, (p / p_r[j]) ** (2 / 3))
    return jnp.where(active, shares * (total / (1 + q[j])), 0)


def _least_phi(problem: Problem) -> jax.Array:
    """The minimiser of phi: max(m, c p^(2/3)), capped, with the best floor m.

    With t = (m / c)^(3/2), the p below which a worker is at the floor, the derivative
    of the least phi at floor m has the sign of
    sum_i max(0, t - p_i) - sum_i p_i sqrt(m / d_i), which changes once as t grows.
    """
    p, caps, total = problem.p, problem.caps, problem.total
    used = p > 0
    least_cap = jnp.min(jnp.where(used, caps, jnp.inf))

    def at(t):
        weights = jnp.where(used, jnp.maximum(t, p) ** (2 / 3), 0)
        return fill(weights, caps, total)

    def beyond(t):
        ratios = at(t)
        floor = jnp.min(jnp.where(used, ratios, jnp.inf))
        raised = jnp.sum(jnp.where(used & (ratios < caps), jnp.maximum(t - p, 0), 0))
        root = jnp.sqrt(floor / jnp.where(used, ratios, 1))
        return (raised > jnp.sum(p * root)) | (floor >= least_cap)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        past = beyond(middle)
        return jnp.where(past, low, middle), jnp.where(past, middle, high)

    # From the largest p on all are at the floor, and 2 is beyond the root for any p.
    bounds = jnp.zeros_like(total), jnp.full_like(total, 2)
    return at(lax.fori_loop(0, _HALVINGS, halve, bounds)[0])
