"""Allocations: how much each worker may send to a parameter server, round by round.

A relative allocation grants numbers of entries, and each worker sends its largest ones;
an absolute one gives thresholds, and what reaches them is sent, whatever its number.
Which ratios or thresholds are wise is for `gcjax.selectors.workers` to say.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gcjax import wire
from gcjax.base import Layout, Problem, Selector, ladder, level_index, pick
from gcjax.compressors import sparsify
from gcjax.selectors.workers import Accordion, largest_remainder

_SPACING = 1.25  # between neighbouring lengths of an upload that changes


class Allocation(NamedTuple):
    """How much each of n workers sends: a rule, its state, and what feeds it.

    Entries are counted over all layers together, [n, 1], or layer by layer, [n, L].
    """

    name: str
    num_workers: int
    relative: bool  # numbers of entries are granted, and not thresholds
    per_layer: bool  # each layer's entries are chosen among its own
    lengths: Callable  # layout -> of each worker, the words that an upload may have
    room: Callable  # layout -> int[1 or L], entries sent at most
    init: Callable  # layout -> state, the same on all workers
    # (layout, state) -> int32[n, 1 or L] entries, or float32[n] thresholds.
    decide: Callable
    # (layout, gradient) -> float32[M] that each worker tells all others; None: nothing.
    report: Callable | None
    every: int  # rounds between reports
    # (layout, state, counts int32[n, 1 or L] of entries sent, reports float32[n, M],
    # zeros between them, due) -> state.
    update: Callable


def ratios(values: Sequence[float], *, per_layer: bool = False) -> Allocation:
    """Each worker sends the same share of its entries every round, the largest.

    Args:
      values: Kept fraction of each worker, in [0, 1]; `gcjax.selectors.workers` has
        rules for them. Numbers of entries add up to the sum of the ratios.
      per_layer: Each layer keeps this share of its own entries, at least one where the
        ratio is positive, as the code of DAGC does; else they are the largest of all.

    Raises:
      ValueError: for a ratio outside [0, 1].
    References: Lu et al., 2023, arXiv:2311.07324 (its text does not say per what the
      largest are taken).
    """
    values = _checked("ratios", values, 0.0, 1.0)

    def counts(layout: Layout) -> np.ndarray:
        if not per_layer:
            with jax.ensure_compile_time_eval():
                granted = largest_remainder(values, _entries(layout))
            return np.asarray(granted)[:, None]
        exact = np.floor(values[:, None] * layout.sizes * (1 + 1e-6))
        return np.where(values[:, None] > 0, np.maximum(1, exact), 0).astype(np.int32)

    def lengths(layout: Layout) -> list[list[int]]:
        each = counts(layout)
        return [[_length(view(per_layer, layout), k)] for k in each]

    return Allocation(
        name="ratios",
        num_workers=len(values),
        relative=True,
        per_layer=per_layer,
        lengths=lengths,
        room=lambda layout: counts(layout).max(0),
        init=lambda layout: (),
        decide=lambda layout, state: jnp.asarray(counts(layout), jnp.int32),
        report=None,
        every=1,
        update=_unchanged,
    )


def resolved(
    rule: Callable[[jax.Array], jax.Array],
    num_workers: int,
    *,
    every: int = 50,
    decay: float = 0.9,
) -> Allocation:
    """Ratios from the workers' gradient norms, solved again every few rounds.

    Every worker tells the others one number a round, its squared gradient norm. The
    square root of its running mean stands for zeta, the bound on a worker's gradient
    in `gcjax.selectors.workers`: it holds the common gradient and the noise too.

    Args:
      rule: zeta float32[n] -> ratios [n] in [0, 1], to be traced, such as
        `lambda zeta: dagc_r(p, 0.001, criterion="psi", zeta=zeta)`.
      num_workers: n.
      every: Rounds between solutions; until the first one zeta is 1 everywhere.
      decay: Of the running mean, per round, in [0, 1).

    Raises:
      ValueError: for `every` < 1 or a decay outside [0, 1).
    """
    if every < 1 or not 0 <= decay < 1:
        raise ValueError(
            f"resolved: every must be >= 1 and decay in [0, 1), got {every}, {decay}"
        )

    def solve(layout: Layout, zeta: jax.Array) -> jax.Array:
        return largest_remainder(rule(zeta), _entries(layout)).astype(jnp.int32)

    def init(layout: Layout):
        zeta = jnp.ones((num_workers,), jnp.float32)
        return jnp.int32(0), zeta * 0, solve(layout, zeta)

    def update(layout, state, counts, reports, due):
        del counts, due
        round_, energy, granted = state
        energy = decay * energy + (1 - decay) * reports[:, 0]
        unbiased = energy / (1 - decay ** (round_ + 1).astype(jnp.float32))
        again = (round_ + 1) % every == 0
        solved = jax.lax.cond(
            again,
            lambda e: solve(layout, jnp.sqrt(e)),
            lambda e: granted,
            jnp.maximum(unbiased, 1e-30),
        )
        return round_ + 1, energy, solved

    return Allocation(
        name="resolved",
        num_workers=num_workers,
        relative=True,
        per_layer=False,
        lengths=lambda layout: [_ladder(layout, 1.0)] * num_workers,
        room=lambda layout: np.array([_entries(layout)]),
        init=init,
        decide=lambda layout, state: state[2][:, None],
        report=lambda layout, gradient: jnp.sum(gradient**2)[None],
        every=1,
        update=update,
    )


def thresholds(values: Sequence[float], *, max_ratio: float = 1.0) -> Allocation:
    """Each worker sends its entries of at least a given magnitude.

    All first tell each other how many these are.

    Args:
      values: Least magnitude sent of each worker, positive, in units of the gradient;
        infinity never sends. The same for all is the hard threshold.
      max_ratio: Share of all entries that are sent at most, in (0, 1]; the last ones
        beyond it wait in the error. It bounds the buffers.

    Raises:
      ValueError: for a threshold that is not positive, or `max_ratio` out of range.
    References: Lu et al., 2023, arXiv:2311.07324, section 5 (DAGC-A); Sahu et al.,
      2021, arXiv:2108.00951 (the hard threshold).
    """
    values = _checked("thresholds", values, 0.0, np.inf, low_open=True)
    return _absolute(
        "thresholds",
        len(values),
        max_ratio,
        init=lambda layout: (),
        decide=lambda layout, state: jnp.asarray(values, jnp.float32),
        update=_unchanged,
    )


def steered(
    weights: Sequence[float],
    ratio: float,
    *,
    exponent: float = -1.0,
    gain: float = 0.1,
    max_ratio: float = 1.0,
) -> Allocation:
    """Thresholds tau p^exponent, with tau steered towards a mean ratio.

    With exponent -1 the entries sent are the K largest p_i |a_ij| over all workers and
    layers, which least changes the weighted sum of what enters the compressors; with 0
    it is a hard threshold, with -2/3 DAGC-A, at a traffic of one's choice.

    Nothing is sent in the first round, in which all tell each other the mean square of
    their gradients; tau starts where normal ones would have the wanted traffic. From
    then on log tau moves by `gain` times the relative excess of the entries sent, so
    that the mean traffic of many rounds is the wanted one.

    Args:
      weights: p, one per worker, not negative; 0 never sends.
      ratio: Entries sent, of all entries of the workers with p > 0, in (0, 1).
      exponent: Of p; p is taken in units of its mean.
      gain: In (0, 1]. Above about 0.1 tau swings: what was held back comes at once.
      max_ratio: See `thresholds`.

    Raises:
      ValueError: for arguments out of range.
    References: none; the sparsifier that is optimal at every single round.
    """
    p = _checked("steered: weights", weights, 0.0, np.inf)
    if not (0 < ratio < 1 and 0 < gain <= 1):
        raise ValueError(
            f"steered: ratio must be in (0, 1) and gain in (0, 1], got {ratio}, {gain}"
        )
    if not p.sum() > 0:
        raise ValueError("steered: weights must not all be zero, or nobody sends")
    used = p > 0
    scale = np.where(used, (p / p[used].mean()).clip(1e-30) ** exponent, np.inf)
    quantile = statistics.NormalDist().inv_cdf(1 - ratio / 2)

    def update(layout, state, counts, reports, due):
        target = ratio * int(used.sum()) * _entries(layout)
        excess = jnp.sum(counts).astype(jnp.float32) / target - 1
        spread = jnp.sqrt(reports[:, 0])[used] / jnp.asarray(scale[used], jnp.float32)
        first = jnp.log(quantile * jnp.maximum(jnp.mean(spread), 1e-30))
        return jnp.where(due, first, state + gain * jnp.minimum(excess, 10))

    made = _absolute(
        "steered",
        len(p),
        max_ratio,
        init=lambda layout: jnp.float32(jnp.inf),
        decide=lambda layout, state: jnp.exp(state) * jnp.asarray(scale, jnp.float32),
        update=update,
    )
    mean_square = lambda layout, x: (jnp.sum(x**2) / _entries(layout))[None]
    return made._replace(report=mean_square, every=2**30)  # once


def switched(
    rule: Accordion, num_workers: int, *, relative: bool = True, max_ratio: float = 1.0
) -> Allocation:
    """Ratios or thresholds that follow the changes of each worker's gradient norm.

    Every worker tells the others one number a round, the norm of its gradient.

    Args:
      rule: From `gcjax.selectors.workers.accordion`.
      num_workers: n.
      relative: Its values are ratios; else thresholds.
      max_ratio: Share of all entries that are sent at most, in (0, 1].

    Raises:
      ValueError: for `max_ratio` out of range.
    """
    made = _absolute(
        "switched",
        num_workers,
        max_ratio,
        # Before the first round there is no norm to decide on.
        init=lambda layout: rule.update(
            jnp.full(num_workers, jnp.nan), rule.init(num_workers)
        ),
        decide=lambda layout, state: state[0],
        update=lambda layout, state, counts, reports, due: rule.update(
            reports[:, 0], state[1]
        ),
    )
    entries = lambda layout, state: jnp.floor(
        jnp.minimum(state[0], max_ratio) * _entries(layout)
    ).astype(jnp.int32)[:, None]
    return made._replace(
        relative=relative,
        decide=entries if relative else made.decide,
        report=lambda layout, gradient: jnp.linalg.norm(gradient)[None],
    )


def pairs(
    selector: Selector,
    weights: Sequence[float],
    densities: Sequence[float] = sparsify.DENSITIES,
    *,
    every: int = 100,
) -> Allocation:
    """One choice over all layers of all workers, by a selector of layers' levels.

    Every so often each worker tells all others its table of squared errors [L, V], of
    its last gradient; times p^2, as errors of the weighted mean, all n L rows make one
    problem of the selector. What the tables cost to send is counted.

    Args:
      selector: Such as `gcjax.lgreco(default=0.01)`. Its default holds at first.
      weights: p, one per worker, not negative; divided by their sum.
      densities: Ladder of densities, as of `gcjax.top_k`. Some must be below the
        selector's default: what some pairs get, others give up.
      every: Rounds between choices; the first one follows the first round.

    Raises:
      ValueError: for weights or densities out of range, `every` < 1, a default that is
        not on the ladder or the least of it, or a selector that would send layers
        uncompressed.
    References: Markov et al., 2024, L-GreCo, arXiv:2210.17357, whose layers are all of
      one gradient. With one worker this is its solution; with one layer and errors
      proportional to (p zeta / density)^2 it is that of criterion "psi" of `dagc_r`.
    """
    p = _checked("pairs: weights", weights, 0.0, np.inf)
    if not p.sum() > 0 or every < 1 or selector.dense:
        raise ValueError(
            "pairs: weights must not all be zero, every must be >= 1, and the selector "
            "must compress every layer"
        )
    p = p / p.sum()
    densities = ladder(densities, "density", 0.0, 1.0)
    first = level_index(densities, selector.default)
    if first == 0 and len(densities) > 1:
        raise ValueError(
            f"pairs: no density is below the default, {selector.default:g}, so none "
            "could be given up for another; pass lower densities"
        )
    wanted = selector.levels or densities
    kept = [level_index(densities, v) for v in wanted]

    def table(layout: Layout) -> np.ndarray:
        """Words of every layer at every density, int64[L, V]."""
        return sparsify.indexed_words(layout, sparsify.counts(layout, densities))[0]

    def init(layout: Layout):
        rows = len(p) * layout.num_layers
        return jnp.full((rows,), first, jnp.int32), selector.init(rows)

    def decide(layout: Layout, state) -> jax.Array:
        levels = state[0].reshape(len(p), -1)
        table = jnp.asarray(sparsify.counts(layout, densities), jnp.int32)
        return jax.vmap(lambda v: pick(table, v))(levels)

    def report(layout: Layout, gradient: jax.Array) -> jax.Array:
        return sparsify.tail_energy(layout, gradient, densities).reshape(-1)

    def choose(layout: Layout, state, reports):
        levels, inner = state
        rows, count = levels.size, len(densities)
        errors = reports.reshape(len(p), -1) * jnp.asarray(p**2, jnp.float32)[:, None]
        words = np.tile(table(layout), (len(p), 1))
        problem = Problem(
            errors.reshape(rows, count)[:, kept],
            words[:, kept],
            jnp.full((rows,), kept.index(first), jnp.int32),
            [],
            ("uploads",) * len(kept),
            np.tile(layout.sizes, len(p)),
        )
        chosen, inner = selector.update(problem, inner)
        usable = jnp.all(chosen >= 0)  # else a table was not finite
        new = jnp.asarray(kept, jnp.int32)[jnp.maximum(chosen, 0)]
        return jnp.where(usable, new, levels), inner

    def update(layout, state, counts, reports, due):
        del counts
        keep = lambda state, reports: state
        change = functools.partial(choose, layout)
        return jax.lax.cond(due, change, keep, state, reports)

    def lengths(layout: Layout) -> list[list[int]]:
        words = table(layout)
        ends = int(words.min(1).sum()), int(words.max(1).sum())
        of_default = words[:, first].sum()[None]
        return [wire.capacity_ladder(*ends, of_default, _SPACING)] * len(p)

    return Allocation(
        name="pairs",
        num_workers=len(p),
        relative=True,
        per_layer=True,
        lengths=lengths,
        room=lambda layout: layout.sizes,
        init=init,
        decide=decide,
        report=report,
        every=every,
        update=update,
    )


def view(per_layer: bool, layout: Layout) -> Layout:
    """The layout in which entries are chosen: as it is, or as one layer."""
    whole = Layout(("all",), ((layout.size,),), layout.row)
    return layout if per_layer else whole


def _absolute(name, num_workers, max_ratio, *, init, decide, update) -> Allocation:
    """An allocation by thresholds."""
    if not 0 < max_ratio <= 1:
        raise ValueError(f"{name}: max_ratio must be in (0, 1], got {max_ratio}")
    room = lambda layout: max(1, int(max_ratio * _entries(layout)))
    return Allocation(
        name=name,
        num_workers=num_workers,
        relative=False,
        per_layer=False,
        lengths=lambda layout: [_ladder(layout, max_ratio)] * num_workers,
        room=lambda layout: np.array([room(layout)]),
        init=init,
        decide=decide,
        report=None,
        every=1,
        update=update,
    )


def _unchanged(layout, state, counts, reports, due):
    del layout, counts, reports, due
    return state


def _entries(layout: Layout) -> int:
    """Entries of all layers, without padding."""
    return int(layout.sizes.sum())


def _length(layout: Layout, k: np.ndarray) -> int:
    """Words of a message of k[l] entries of each layer."""
    return int(sparsify.indexed_words(layout, np.asarray(k, np.int64))[0].sum())


def _ladder(layout: Layout, max_ratio: float) -> list[int]:
    """Lengths from nothing to the share of all entries that are sent at most."""
    whole = view(False, layout)
    most = max(1, int(max_ratio * _entries(layout)))
    low, high = (_length(whole, np.array([k])) for k in (1, most))
    return [0, *wire.capacity_ladder(low, high, np.array([]), _SPACING)]


def _checked(
    name: str, values: Any, low: float, high: float, low_open: bool = False
) -> np.ndarray:
    """Numbers, one per worker, within bounds."""
    values = np.asarray(values, np.float64)
    inside = (values > low if low_open else values >= low) & (values <= high)
    if values.ndim != 1 or not values.size or not inside.all():
        bound = "(" if low_open else "["
        raise ValueError(
            f"{name} must be one number per worker in {bound}{low:g}, {high:g}], got "
            f"{np.array2string(values, threshold=8, precision=4)}"
        )
    return values
