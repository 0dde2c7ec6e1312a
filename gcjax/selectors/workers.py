"""Selectors that give every worker its own compression ratio or threshold.

Workers hold different shares `p` of the data, and different links. A ratio is the kept
fraction of a gradient. All functions but `fit_iterations` and `accordion` are pure
functions of arrays [n], one entry per worker in the caller's order, which jit and vmap;
they take O(n log n).

A worker with `p = 0` takes no part: its ratio is 0, and n counts the others. `p` need
not be normalised, so sample counts will do. Bad values raise ValueError where all are
concrete; of traced ones they make the result NaN.

Three criteria say what a set of ratios d costs, in iterations up to a constant, with
z_i the heterogeneity of worker i (a bound on its gradient's norm at the optimum):

* phi = (sum_i p_i / sqrt(d_i)) / sqrt(min_i d_i), the key factor of DAGC's theorem;
* psi = sqrt(n sum_i (p_i z_i / d_i)^2), each worker's memory contracting at its own
  rate;
* omega = sum_i p_i z_i / d_i <= psi, the triangle inequality on the averaged error.

**DAGC's Theorem 4 does not minimise phi.** It restricts the ratio of one worker to be
the least, and sets all others above it by p^(2/3); that several workers share the least
ratio, as in the uniform allocation, is never considered. Phi is convex, uniform is its
minimum if and only if the largest share is at most 2 / n, and in an arithmetic series
of worker sizes it always is. `phi_exact` is the true minimiser.

References:
  Lu et al., 2023, DAGC: Data-Aware Adaptive Gradient Compression, INFOCOM;
    arXiv:2311.07324.
  Stich, 2020, On Communication Compression for Distributed Optimization on
    Heterogeneous Data, arXiv:2009.02388 (the analysis behind the criteria).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax.selectors import filling

CRITERIA = ("paper", "phi_exact", "psi", "omega")
_GRID = 128  # deadlines tried, in each of three rounds


# --- Ratios from shares of the data. --------------------------------------------------


def dagc_r(
    p: Any,
    mean_ratio: Any,
    *,
    criterion: str = "paper",
    zeta: Any = None,
    max_ratio: Any = 1.0,
) -> jax.Array:
    """DAGC-R: ratios that minimise a criterion at a given mean ratio.

    Args:
      p: Share of each worker, [n], not negative, not all 0, in any order.
      mean_ratio: Mean ratio of the workers with p > 0, in (0, max_ratio].
      criterion: "paper", Theorem 4 to the letter; "phi_exact", the true minimum of the
        same phi; "psi", (p zeta)^(2/3); or "omega", (p zeta)^(1/2). All but the
        first solve the problem exactly, `max_ratio` included.
      zeta: Heterogeneity of each worker, [n], positive, for psi and omega; None if all
        are alike. Only its ratios matter.
      max_ratio: Largest ratio, in (0, 1]: one, or one for each worker [n], whose mean
        is then the limit of `mean_ratio`.

    Returns:
      float32[n] ratios with sum n * mean_ratio to rounding. One worker gets mean_ratio.
    Raises:
      ValueError: for bad shapes or an unknown criterion, always; for bad values where
        all are concrete.
    References: Lu et al., 2023, arXiv:2311.07324, Theorem 4 and Algorithm 2.
    Note: "paper" is not monotone in p: the worker found to hold the least ratio may be
      one of middle size. Of equal p the first in order can be that worker (by the test
      for duplicates in the text; the released code takes the last), and of equal values
      of phi the candidate of least p wins. Where the theorem, which knows no cap,
      exceeds `max_ratio`, those workers get `max_ratio` and it is applied again to the
      others with what is left.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    if zeta is not None and criterion not in filling.EXPONENTS:
        raise ValueError(f"zeta is for psi and omega, criterion {criterion!r} has none")
    problem = filling.pose(p, mean_ratio, zeta, max_ratio)
    return jnp.where(problem.valid, filling.minimise(criterion, problem), jnp.nan)


def power_rule(
    p: Any, mean_ratio: Any, exponent: float, zeta: Any = None, max_ratio: Any = 1.0
) -> jax.Array:
    """Ratios proportional to (p zeta)^exponent, capped, the excess to the others.

    Exponent 0 is uniform, 2/3 minimises psi, 1/2 omega, and 1 the noise term
    sum_i p_i^2 / d_i.

    Args:
      p: As in `dagc_r`, and so are mean_ratio, zeta and max_ratio.
      exponent: A finite number.

    Returns:
      float32[n] ratios min(max_ratio, c (p zeta)^exponent) of sum n * mean_ratio.
    Raises: As `dagc_r`.
    """
    problem = filling.pose(p, mean_ratio, zeta, max_ratio)
    ratios = filling.fill(problem.weights(exponent), problem.caps, problem.total)
    return jnp.where(problem.valid, ratios, jnp.nan)


def dagc_a(p: Any, mean_threshold: Any) -> jax.Array:
    """DAGC-A: thresholds proportional to p^(-2/3), of a given harmonic mean.

    Args:
      p: As in `dagc_r`.
      mean_threshold: Harmonic mean over the workers with p > 0, positive, in units of
        what is compared with it (gradient, or learning rate times gradient).

    Returns:
      float32[n] thresholds; infinity, which never sends, for p = 0.
    Raises: As `dagc_r`.
    References: Lu et al., 2023, arXiv:2311.07324, Theorem 8. Equal harmonic means are
      equal traffic only where ratios are inversely proportional to thresholds, an
      assumption of the paper: measure what is sent.
    """
    p = filling.vector(p, "p")
    mean = filling.scalar(mean_threshold, "mean_threshold")
    valid = filling.check(
        lambda np, p, mean: [
            (
                filling.is_share(np, p),
                "p must be finite, not negative and not all 0",
            ),
            (np.isfinite(mean) & (mean > 0), "mean_threshold must be positive"),
        ],
        p,
        mean,
    )
    p = jnp.where(valid, jnp.asarray(p), 1)
    positive = p > 0
    power = jnp.where(positive, p, 1) ** (2 / 3)
    total = jnp.sum(jnp.where(positive, power, 0))
    count = jnp.sum(positive).astype(p.dtype)
    thresholds = jnp.where(positive, mean * total / count / power, jnp.inf)
    return jnp.where(valid, thresholds, jnp.nan)


# --- The criteria. --------------------------------------------------------------------


def phi(p: Any, ratios: Any) -> jax.Array:
    """DAGC's key factor (sum_i p_i / sqrt(d_i)) / sqrt(min_i d_i), a float32 scalar.

    Args:
      p: Shares [n]; normalised here. Workers with p = 0 do not count.
      ratios: d, [n].

    References: Lu et al., 2023, arXiv:2311.07324, Theorems 1 to 4.
    """
    return _criterion("phi", p, ratios, None)


def psi(p: Any, ratios: Any, zeta: Any = None) -> jax.Array:
    """The per-worker criterion sqrt(n sum_i (p_i zeta_i / d_i)^2), a float32 scalar.

    Args:
      p: As in `phi`, and so are ratios.
      zeta: [n]; None for ones.
    """
    return _criterion("psi", p, ratios, zeta)


def omega(p: Any, ratios: Any, zeta: Any = None) -> jax.Array:
    """The averaged-error criterion sum_i p_i zeta_i / d_i, a float32 scalar.

    Args:
      p: As in `psi`, and so are ratios and zeta.
    """
    return _criterion("omega", p, ratios, zeta)


def _criterion(name, p, ratios, zeta) -> jax.Array:
    arrays = (None if x is None else filling.as_float(x) for x in (p, ratios, zeta))
    return _score(name, *arrays)


@partial(jax.jit, static_argnums=0)
def _score(name, p, d, zeta) -> jax.Array:
    used = p > 0
    p, d = p / jnp.sum(p), jnp.where(used, d, 1)
    if name == "phi":
        least = jnp.min(jnp.where(used, d, jnp.inf))
        return jnp.sum(p / jnp.sqrt(d)) / jnp.sqrt(least)
    terms = p / d if zeta is None else p * zeta / d
    if name == "omega":
        return jnp.sum(terms)
    return jnp.sqrt(jnp.sum(used).astype(jnp.float32) * jnp.sum(terms**2))


# --- Whole numbers. -------------------------------------------------------------------


def largest_remainder(ratios: Any, size: int) -> jax.Array:
    """Entries kept by each worker, whose sum is exactly round(size * sum(ratios)).

    Rounds down, and gives what is missing, one each, to the largest fractions; of equal
    ones to the first. Products are exact, in 24 + 31 bits. The sum has no limit: what
    is missing follows from the fractions alone.

    Args:
      ratios: float32[n] in [0, 1], n < 65,536.
      size: Elements of what is compressed, below 2^31.

    Returns:
      int32[n], each in [0, size].
    Raises:
      ValueError: if size is out of range, or concrete ratios are.
    """
    if not 1 <= size < 2**31:
        raise ValueError(f"size must be in [1, 2^31), got {size}")
    ratios = filling.vector(ratios, "ratios")
    filling.check(
        lambda np, r: [(np.all((r >= 0) & (r <= 1)), "ratios must be in [0, 1]")],
        ratios,
    )
    return _rounded(ratios, size)


@jax.jit
def _rounded(ratios: jax.Array, size: int) -> jax.Array:
    whole, fraction = _multiply(ratios, size)
    # The sum of 32-bit fractions, by halves.
    low = jnp.sum(fraction & 0xFFFF, dtype=jnp.uint32)
    high = jnp.sum(fraction >> 16, dtype=jnp.uint32) + (low >> 16)
    missing = (high + 0x8000) >> 16
    descending = jnp.argsort(~fraction)  # stable
    rank = jnp.argsort(descending).astype(jnp.uint32)
    return (whole + (rank < missing).astype(jnp.uint32)).astype(jnp.int32)


def _multiply(ratios: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """ratios * size as uint32[n] whole parts and fractions in units of 2^-32."""
    exponent = jnp.minimum(jnp.frexp(ratios)[1], 0)
    mantissa = jnp.ldexp(ratios, 24 - exponent).astype(jnp.uint32)  # <= 2^24
    size = jnp.asarray(size).astype(jnp.uint32)

    def halve(whole, fraction):
        return whole >> 1, (fraction >> 1) | (whole << 31)

    def add_bit(i, parts):  # Horner's scheme from the lowest bit of the mantissa
        whole, fraction = parts
        bit = (mantissa >> i.astype(jnp.uint32)) & 1
        return halve(whole + bit * size, fraction)

    def shift(i, parts):
        return jax.tree.map(
            lambda new, old: jnp.where(i < -exponent, new, old), halve(*parts), parts
        )

    zero = jnp.zeros_like(mantissa)
    whole, fraction = lax.fori_loop(0, 24, add_bit, (zero, zero))
    whole += (mantissa >> 24) * size  # a ratio of 1
    return lax.fori_loop(0, 63, shift, (whole, fraction))


# --- Ratios from links. ---------------------------------------------------------------


def bcrs(bandwidths: Any, latencies: Any, bits: Any, default_ratio: Any) -> jax.Array:
    """BCRS: ratios with which all uploads end when the slowest one does.

    With T = max_i (latency_i + default_ratio * bits / bandwidth_i), worker i sends
    min(1, (T - latency_i) bandwidth_i / bits), which is at least `default_ratio`.

    Args:
      bandwidths: Of each worker, [n], bits/s, positive.
      latencies: [n], seconds, not negative.
      bits: Of an upload of ratio 1, positive.
      default_ratio: In (0, 1].

    Returns:
      float32[n] ratios.
    Raises:
      ValueError: for bad shapes, always; for bad values where all are concrete.
    References: Tang et al., 2024, Bandwidth-Aware and Overlap-Weighted Compression for
      Communication-Efficient Federated Learning, arXiv:2408.14736; the formula as its
      abstract implies it, and not compared with the authors' text or code.
    """
    bandwidths, latencies, bits, default = _links(
        bandwidths, latencies, bits, default_ratio
    )
    slowest = jnp.max(latencies + bits / bandwidths * default)
    ratios = (slowest - latencies) * bandwidths / bits
    return jnp.clip(ratios, default, 1)


def bcrs_coefficients(p: Any, ratios: Any, mix: float = 0.5) -> jax.Array:
    """Averaging coefficients that follow the ratios: mix d / sum(d) + (1 - mix) p.

    Args:
      p: Shares of the data, [n], normalised here.
      ratios: d, [n]; from `bcrs`.
      mix: Weight of the ratios, in [0, 1]; 0 leaves the shares as they are.

    Returns:
      float32[n] of sum 1; 0 where p is.
    Raises:
      ValueError: if mix is out of range or shapes differ.
    References: Tang et al., 2024, arXiv:2408.14736, adapts the coefficients to the
      ratios; this mixture is an assumption, because its formula was not available.
    """
    p, ratios = filling.vector(p, "p"), filling.vector(ratios, "ratios")
    if not 0 <= mix <= 1 or p.shape != ratios.shape:
        raise ValueError(
            f"mix must be in [0, 1], and p and ratios of one shape, got {mix}, "
            f"{list(p.shape)} and {list(ratios.shape)}"
        )
    p, ratios = jnp.asarray(p), jnp.asarray(ratios)
    ratios = jnp.where(p > 0, ratios, 0)
    return mix * ratios / jnp.sum(ratios) + (1 - mix) * p / jnp.sum(p)


def _links(bandwidths, latencies, bits, ratio):
    """Checks links; where traced ones are bad, bandwidths become NaN."""
    values = (
        filling.vector(bandwidths, "bandwidths"),
        filling.vector(latencies, "latencies"),
    )
    values += filling.scalar(bits, "bits"), filling.scalar(ratio, "the ratio")
    if values[0].shape != values[1].shape:
        raise ValueError(
            "bandwidths and latencies must have one entry per worker, got shapes "
            f"{list(values[0].shape)} and {list(values[1].shape)}"
        )

    def conditions(np, bandwidths, latencies, bits, ratio):
        ok = np.all(np.isfinite(bandwidths) & (bandwidths > 0))
        late = np.all(np.isfinite(latencies) & (latencies >= 0))
        return [
            (ok, "bandwidths must be positive bits/s"),
            (late, "latencies must be seconds >= 0"),
            (np.isfinite(bits) & (bits > 0), "bits must be positive"),
            ((ratio > 0) & (ratio <= 1), "the ratio must be in (0, 1]"),
        ]

    valid = filling.check(conditions, *values)
    bandwidths, *rest = map(jnp.asarray, values)
    return jnp.where(valid, bandwidths, jnp.nan), *rest


class Deadline(NamedTuple):
    """What `deadline` chose; float32."""

    seconds: jax.Array  # in which every upload must end
    ratios: jax.Array  # [n]
    iterations: jax.Array  # predicted, to the accuracy of the fitted runs
    total_seconds: jax.Array  # predicted, to that accuracy


def deadline(
    p: Any,
    mean_ratio: Any,
    links: tuple[Any, Any, Any],
    fit: tuple[Any, Any],
    other_seconds: Any,
    *,
    criterion: str = "psi",
    zeta: Any = None,
) -> Deadline:
    """Ratios under the round deadline of least predicted time to accuracy.

    A deadline T caps ratios at (T - latency_i) bandwidth_i / bits. Below the caps they
    minimise the criterion at a mean of at most `mean_ratio`, and are the caps where
    these do not allow that much. A run then takes a + b * criterion iterations of
    T + other_seconds each. Deadlines beyond the one that the uncapped ratios need
    change nothing and are not considered.

    Args:
      p: As in `dagc_r`, and so are mean_ratio and zeta.
      links: bandwidths [n] in bits/s, latencies [n] in seconds, and the bits of an
        upload of ratio 1.
      fit: a >= 0 and b > 0, from `fit_iterations`, with the same criterion.
      other_seconds: Of a round, compute and download; positive. (Without it, and with
        a = 0, T * psi(T) is constant wherever all caps bind: no deadline is best.)
      criterion: "phi_exact", "psi" or "omega".

    Raises:
      ValueError: As `dagc_r` and `bcrs`; if fit or other_seconds are out of range.
    """
    if criterion not in CRITERIA[1:]:
        raise ValueError(f"criterion must be one of {CRITERIA[1:]}, got {criterion!r}")
    bandwidths, latencies, bits, _ = _links(*links, mean_ratio)
    a, b, other = (
        filling.scalar(x, "a, b, other_seconds") for x in (*fit, other_seconds)
    )
    valid = filling.check(
        lambda np, a, b, other: [
            ((a >= 0) & (b > 0), "fit must be a >= 0 and b > 0"),
            (other > 0, "other_seconds, compute and download, must be positive"),
        ],
        a,
        b,
        other,
    )
    free = filling.pose(p, mean_ratio, zeta, 1.0)
    if bandwidths.shape != free.p.shape:
        raise ValueError(
            f"links must have one entry per worker, got {list(bandwidths.shape)} for p "
            f"{list(free.p.shape)}"
        )
    score = {"phi_exact": lambda p, d, zeta: phi(p, d), "psi": psi, "omega": omega}
    zeta = None if zeta is None else jnp.asarray(filling.as_float(zeta))
    used = free.p > 0

    first = jnp.max(jnp.where(used, latencies, 0))

    def at(offset):  # of the deadline from the largest latency
        caps = (offset + (first - latencies)) * bandwidths / bits
        caps = jnp.where(used, jnp.clip(caps, 0, 1), 0)
        total = jnp.minimum(free.total, jnp.sum(caps))
        ratios = filling.minimise(criterion, free._replace(caps=caps, total=total))
        iterations = a + b * score[criterion](free.p, ratios, zeta)
        seconds = first + offset
        return Deadline(seconds, ratios, iterations, (seconds + other) * iterations)

    uncapped = filling.minimise(criterion, free) * bits / bandwidths - (
        first - latencies
    )
    last = jnp.max(jnp.where(used, uncapped, 0))

    def best_of(offsets):
        totals = jax.vmap(lambda offset: at(offset).total_seconds)(offsets)
        i = jnp.nanargmin(totals)
        return offsets[jnp.maximum(i - 1, 0)], offsets[i], offsets[i + 1 - i // _GRID]

    low, high = 1e-4 * last, last
    for _ in range(3):  # each time between the neighbours of the best so far
        grid = jnp.exp(jnp.linspace(jnp.log(low), jnp.log(high), _GRID + 1))
        low, best, high = best_of(grid.at[-1].set(high))
    found = at(best)
    ok = free.valid & valid & jnp.all(jnp.isfinite(bandwidths))
    return jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), found)


def fit_iterations(criteria: Any, iterations: Any) -> tuple[float, float]:
    """Fits iterations = a + b * criterion with a, b >= 0, by least squares.

    Args:
      criteria: Of at least three runs, [m], by `phi`, `psi` or `omega`.
      iterations: Measured, to a common accuracy, [m].

    Returns:
      a and b. A b of 0 says that the criterion does not predict these runs.
    Raises:
      ValueError: for fewer than three runs, runs that share one criterion, or numbers
        that are not finite.
    """
    x, y = np.asarray(criteria, np.float64), np.asarray(iterations, np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 3 or np.ptp(x) == 0:
        raise ValueError(
            "a fit needs the criteria, not all the same, and iterations of at least 3 "
            f"runs, got shapes {list(x.shape)} and {list(y.shape)}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("criteria and iterations must be finite; leave out other runs")
    b = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
    a = y.mean() - b * x.mean()
    if b < 0:
        return float(y.mean()), 0.0
    if a < 0:
        return 0.0, float(np.sum(x * y) / np.sum(x * x))
    return float(a), float(b)


# --- Ratios over time. ----------------------------------------------------------------


class Accordion(NamedTuple):
    """A pair of pure functions, made by `accordion`."""

    init: Callable  # n -> state
    # (norms float32[n] of the workers' last updates, state) -> (values [n], state)
    update: Callable


class AccordionState(NamedTuple):
    """State of `accordion`."""

    norms: jax.Array  # float32[n], of the round before; NaN in the first one
    credit: jax.Array  # float32[n], sum of mean_ratio - ratio so far
    rounds: jax.Array  # int32, so far


def accordion(
    aggressive: float,
    conservative: float,
    *,
    change: float = 0.5,
    mean_ratio: float | None = None,
    rounds: int | None = None,
) -> Accordion:
    """ACCORDION: little compression while a worker's updates change quickly.

    A worker takes the conservative value in the first round and wherever
    | |u_t| - |u_(t-1)| | / |u_(t-1)| >= change, else the aggressive one.

    As DAGC's authors ran it, the values are the smallest and the largest of the
    workers' ratios by DAGC-R, or the largest and the smallest threshold by DAGC-A; how
    much is sent is then left to chance. With `mean_ratio` every worker's ratios have
    that mean over all rounds, exactly: a conservative round borrows, rounds that could
    be aggressive pay back, and send `mean_ratio` once nothing is owed; no one borrows
    what aggressive rounds cannot pay back in time.

    Args:
      aggressive: Ratio or threshold of much compression, positive.
      conservative: Of little compression, positive.
      change: Relative change of the norm from which on a round is critical, positive.
      mean_ratio: To match; between the two ratios. None: not matched.
      rounds: Number of rounds, for `mean_ratio`.

    Raises:
      ValueError: for values out of range.
    References: Agarwal et al., 2021, Adaptive Gradient Communication via Critical
      Learning Regime Identification, arXiv:2010.16248; Lu et al., 2023,
      arXiv:2311.07324. The matched form is ours.
    """
    if not (aggressive > 0 and conservative > 0 and change > 0):
        raise ValueError(
            "accordion: aggressive, conservative and change must be positive, got "
            f"{aggressive}, {conservative} and {change}"
        )
    matched = mean_ratio is not None
    if matched and not aggressive < mean_ratio <= conservative <= 1:
        raise ValueError(
            "accordion: mean_ratio must be above the aggressive ratio and at most the "
            f"conservative one, got {mean_ratio} for {aggressive} and {conservative}"
        )
    if matched != (rounds is not None and rounds >= 1):
        raise ValueError(
            f"accordion: mean_ratio and rounds >= 1 go together, got {mean_ratio} and "
            f"{rounds}"
        )

    def init(n: int) -> AccordionState:
        return AccordionState(jnp.full(n, jnp.nan), jnp.zeros(n), jnp.int32(0))

    def update(norms, state: AccordionState):
        norms = jnp.asarray(norms, jnp.float32)
        stable = jnp.abs(norms - state.norms) < change * state.norms
        values, credit = jnp.where(stable, aggressive, conservative), state.credit
        if matched:
            repay = jnp.clip(mean_ratio + credit, aggressive, conservative)
            later = (rounds - 1 - state.rounds).astype(jnp.float32)
            owed = conservative - mean_ratio - credit
            affordable = owed <= (mean_ratio - aggressive) * later
            values = jnp.where(~stable & affordable, conservative, repay)
            credit = credit + mean_ratio - values
        return values, AccordionState(norms, credit, state.rounds + 1)

    return Accordion(init, update)
