"""The multiple-choice knapsack behind adaptive compression: one level per layer.

Given tables [layers, levels] of the error that a level causes and the size it sends,
pick a level per layer: one total least, the other within a budget. Three methods:

* "lagrangian" (default): a Lagrangian multiplier by bisection, then a dynamic
  programme over the few levels that the duality gap leaves open. A few milliseconds,
  jit- and vmap-able, mostly within 0.01 % of the optimum.
* "dp": the discretised dynamic programme of L-GreCo, jit- and vmap-able.
* "exact": a mixed-integer programme on the host (SciPy's HiGHS), for tests.

References:
  Markov et al., 2024, L-GreCo: Layerwise-Adaptive Gradient Compression for
    Efficient Data-parallel Deep Learning, arXiv:2210.17357.
  Pisinger, 1995, A minimal algorithm for the multiple-choice knapsack problem,
    European Journal of Operational Research 83 (the core around the multiplier).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_METHODS = ("dp", "lagrangian", "exact")
# Relative excess that still counts as within the budget: a caller's float32 sum may
# be off by as much, and the default it was taken from must stay admissible.
_TOLERANCE = 8e-7
_CORE_BINS = 256
_CORE_CHANGES = 640  # that the core considers over all layers, at least 8 per layer


def minimise_size(
    errors, sizes, error_budget, default=None, method="lagrangian", *, bins=10_000
) -> jax.Array:
    """Picks one level per layer: least total size within a total error budget.

    Minimises sum_l sizes[l, x_l] subject to sum_l errors[l, x_l] <= error_budget.
    The answer is never worse than `default` where that is within the budget, nor
    than the best single level used for all layers. Equal sizes: lower error wins,
    of all assignments in "exact", of those examined in the other methods.

    Args:
      errors: Errors, [L, V] floats >= 0, any order of levels; used in float32.
      sizes: Sizes, [L, V] floats or integers > 0 (bits, seconds, ...).
      error_budget: Scalar; totals are within it to 1e-6 relative.
      default: A level, or int [L] levels, that the answer must not be worse than.
        Traced values out of range (such as -1 of an earlier answer) are ignored.
      method: "lagrangian", "dp" or "exact" (host only, needs SciPy).
      bins: Error bins of "dp"; each layer wastes less than one (one if error 0).

    Returns:
      int32 [L] levels. The least-error levels if nothing is within the budget;
      -1 everywhere if a table or the budget holds a NaN or an infinity.

    Raises:
      ValueError: Unknown method, wrong shapes, level out of range, traced "exact".
      ImportError: "exact" without SciPy.

    Note:
      "dp" discretises errors by q = clip(ceil(E bins / budget), 1, bins), as in the
      L-GreCo authors' released code, with one deviation: that code admits the first
      layer only strictly above its own bin, which loses one bin. Its answers are
      ours at `error_budget * (1 - 1 / bins)` and `bins - 1`.

    References: Markov et al., 2024, arXiv:2210.17357.
    """
    return _minimise(sizes, errors, error_budget, default, method, bins)


def minimise_error(
    errors, sizes, size_budget, default=None, method="lagrangian", *, bins=10_000
) -> jax.Array:
    """Picks one level per layer: least total error within a total size budget.

    The dual of `minimise_size`: minimises sum_l errors[l, x_l] subject to
    sum_l sizes[l, x_l] <= size_budget. Equal errors: lower size wins.

    Args:
      errors: Errors, [L, V] floats >= 0.
      sizes: Sizes, [L, V] floats or integers > 0.
      size_budget: Scalar in the unit of `sizes`; totals are within it to 1e-6.
      default: As in `minimise_size`, and so is `method`.
      method: "dp" discretises the sizes.
      bins: Size bins of "dp".

    Returns:
      int32 [L] levels. The least-size levels if nothing is within the budget;
      -1 everywhere if a table or the budget holds a NaN or an infinity.

    Raises: As `minimise_size`.
    """
    return _minimise(errors, sizes, size_budget, default, method, bins)


def _minimise(cost, weight, budget, default, method, bins):
    """Least total cost within a budget of total weight, arguments unchecked."""
    traced = [isinstance(x, jax.core.Tracer) for x in (cost, weight, budget, default)]
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if method == "exact" and any(traced):
        reason = 'method "exact" needs concrete arrays'
        raise ValueError(reason + '; under jit or vmap use "lagrangian"')
    if not isinstance(bins, (int, np.integer)) or bins < 1:
        raise ValueError(f"bins must be a positive integer, got {bins!r}")
    cost, weight, budget = map(_as_float, (cost, weight, budget))
    if cost.ndim != 2 or cost.shape != weight.shape or 0 in cost.shape or budget.shape:
        raise ValueError(
            "errors and sizes must be non-empty tables [layers, levels] of one shape "
            "and the budget a scalar (jax.vmap solves several), got shapes "
            f"{cost.shape}, {weight.shape} and {budget.shape}"
        )
    if default is not None:
        default = _check_default(default, traced[-1], *cost.shape)
    if method != "exact":
        return _solve(cost, weight, budget, default, method=method, bins=int(bins))
    found = _exact(*(np.asarray(x, np.float64) for x in (cost, weight, budget)))
    return _select(cost, weight, budget, default, found)


def _check_default(default, traced, layers, levels):
    """Returns `default` as int32 [layers], or raises ValueError."""
    default = default if traced else np.asarray(default)
    if default.dtype.kind not in "iu" or default.shape not in ((), (layers,)):
        raise ValueError(
            f"default must be a level or int32[{layers}], one level per layer, "
            f"got {default.dtype}{list(default.shape)}"
        )
    if not traced and (default.min() < 0 or default.max() >= levels):
        raise ValueError(
            f"default must hold levels in [0, {levels}), "
            f"got {default.min()} to {default.max()}"
        )
    return jnp.broadcast_to(jnp.asarray(default, jnp.int32), (layers,))


def _as_float(x):
    """As float32; on the host first, so that integers above 2**31 survive."""
    if isinstance(x, jax.Array):
        return x.astype(jnp.float32)
    with np.errstate(over="ignore"):  # an overflow becomes inf, answered with -1
        return jnp.asarray(np.asarray(x).astype(np.float32))


@partial(jax.jit, static_argnames=("method", "bins"))
def _solve(cost, weight, budget, default, *, method, bins):
    """Finds and selects on device; see `_select`."""
    # Stand-ins for tables with NaN or inf, so that the search is always well defined.
    finite = _all_finite(cost, weight, budget)
    c, w, b = (jnp.where(finite, x, 1) for x in (cost, weight, budget))
    c = _scaled(c, jnp.max(jnp.abs(c)))
    w, b = _in_budget_units(w, b)
    found = _dp(c, w, b, bins) if method == "dp" else _lagrangian(c, w, b)
    return _select(cost, weight, budget, default, found)


@jax.jit
def _select(cost, weight, budget, default, found):
    """The best within budget of `found`, `default` and the single levels."""
    layers, levels = cost.shape
    least = _argmin_pair(weight, cost)
    columns = jnp.broadcast_to(jnp.arange(levels)[:, None], (levels, layers))
    rows = [found[None], least[None], columns]
    if default is not None:  # first, so that it wins ties
        rows.insert(0, default[None])
    rows = jnp.concatenate([x.astype(jnp.int32) for x in rows])
    in_range = jnp.all((rows >= 0) & (rows < levels), axis=1)
    rows = jnp.clip(rows, 0, levels - 1)

    w, b = _in_budget_units(weight, budget)
    c = _scaled(cost, jnp.max(jnp.abs(cost)))
    w_high, w_low = _split_sum(_take(w, rows))
    c_high, c_low = _split_sum(_take(c, rows))
    within = in_range & ((w_high - b) + w_low <= _TOLERANCE * jnp.abs(b))
    # Relative to row 0 the differences are exact to well below one float32 rounding.
    c_total = jnp.where(within, (c_high - c_high[0]) + (c_low - c_low[0]), jnp.inf)
    x = rows[_argmin_pair(c_total, (w_high - w_high[0]) + (w_low - w_low[0]))]
    # Levels of equal cost but less weight are free.
    lighter = jnp.argmin(jnp.where(cost == _take(cost, x)[:, None], weight, jnp.inf), 1)
    x = jnp.where(_take(weight, lighter) < _take(weight, x), lighter, x)
    x = jnp.where(jnp.any(within), x, least)
    return jnp.where(_all_finite(cost, weight, budget), x, -1).astype(jnp.int32)


def _all_finite(*arrays):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]))


def _take(table, x):
    """table[l, x[..., l]] for tables [L, V] and levels [..., L]."""
    return table[jnp.arange(table.shape[0]), x]


def _argmin_pair(first, second):
    """Argmin over the last axis of `first`, ties broken by `second`."""
    tied = first == jnp.min(first, axis=-1, keepdims=True)
    return jnp.argmin(jnp.where(tied, second, jnp.inf), axis=-1)


def _scaled(x, reference):
    """Divides x by a power of two >= `reference`: exact, so integers stay exact."""
    return jnp.ldexp(x, -jnp.frexp(jnp.where(reference > 0, reference, 1))[1])


def _in_budget_units(weight, budget):
    """Scales to budget <= 1, and caps the weights that are over the budget anyway."""
    weight = jnp.where(budget > 0, jnp.minimum(weight, 2 * budget), weight)
    reference = jnp.maximum(jnp.max(jnp.abs(weight)), jnp.abs(budget))
    return _scaled(weight, reference), _scaled(budget, reference)


def _split_sum(x):
    """Sums the last axis as two floats, far more exactly than one float32 sum.

    For |x| <= 1 the high parts, multiples of 2**-12, have an exact sum in any order;
    the low parts are too small for the rounding of their sum to matter.
    """
    high = jnp.round(x * 4096) / 4096
    return jnp.sum(high, -1), jnp.sum(x - high, -1)


def _slack(weight, budget, x):
    high, low = _split_sum(_take(weight, x))
    return (budget - high) - low


def _lagrangian(cost, weight, budget):
    """Multiplier search, greedy filling, then the core around the multiplier: [L]."""
    cost, weight, budget = _above_lightest(cost, weight, budget)
    start, multiplier = _bisect(cost, weight, budget)
    # A second pass has less of a gap to close, thus finer bins: few layers need it.
    passes = 2 if cost.shape[0] < 16 else 1

    def improve(_, x):
        found = _core(cost, weight, budget, start, x, multiplier)
        found = _fill(cost, weight, budget, found)
        gain = jnp.sum(_take(cost, x) - _take(cost, found))
        within = _slack(weight, budget, found) >= -_TOLERANCE / 2 * budget
        return jnp.where(within & (gain > 0), found, x)

    return lax.fori_loop(0, passes, improve, _fill(cost, weight, budget, start))


def _above_lightest(cost, weight, budget):
    """Weights above each layer's lightest level, and the budget left above these.

    Costs count from the cheapest affordable level; those of levels that the budget
    does not allow even alone are inf. All are scaled to at most 1, for float32.
    """
    lightest = jnp.min(weight, axis=1)
    high, low = _split_sum(lightest)
    budget = jnp.maximum((budget - high) - low, 0)
    weight = weight - lightest[:, None]
    affordable = weight <= budget
    cost = jnp.where(affordable, cost, jnp.inf)
    cost = cost - jnp.min(cost, axis=1, keepdims=True)
    cost = _scaled(cost, jnp.max(jnp.where(affordable, cost, 0)))
    return cost, _scaled(weight, budget), _scaled(budget, budget)


def _bisect(cost, weight, budget):
    """Least multiplier whose argmin of cost + multiplier * weight is affordable."""

    def cheapest(log):
        return jnp.argmin(cost + jnp.exp2(log) * weight, axis=1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        ok = _slack(weight, budget, cheapest(middle)) >= 0
        return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

    bounds = jnp.asarray(-45.0, cost.dtype), jnp.asarray(45.0, cost.dtype)
    _, log = lax.fori_loop(0, 40, halve, bounds)
    x = cheapest(log)
    # Where even the largest multiplier is too small, the lightest levels.
    x = jnp.where(_slack(weight, budget, x) >= 0, x, _argmin_pair(weight, cost))
    return x, jnp.exp2(log)


def _fill(cost, weight, budget, x):
    """Spends the slack: again and again the single-layer change that gains most."""
    layers = jnp.arange(cost.shape[0])

    def change(carry):
        x, _, rounds = carry
        reach = _take(weight, x) + _slack(weight, budget, x)
        best = jnp.argmin(jnp.where(weight <= reach[:, None], cost, jnp.inf), axis=1)
        gain = _take(cost, x) - _take(cost, best)
        layer = jnp.argmax(gain)
        better = gain[layer] > 0
        return jnp.where((layers == layer) & better, best, x), better, rounds + 1

    going = lambda carry: carry[1] & (carry[2] < 4 * layers.size)
    return lax.while_loop(going, change, (x, jnp.bool_(True), 0))[0]


def _core(cost, weight, budget, start, best, multiplier):
    """Dynamic programme over the changes of `start` that could still beat `best`.

    A change of one layer has a reduced cost, its cost + multiplier * weight, >= 0;
    a solution is worth the sum of these + multiplier * slack left, so changes above
    the duality gap of `best` are out. States are binned by net change of weight; a bin
    keeps one state, of least reduced cost, with its exact weight, so binning may lose
    states but, unlike rounded weights, never misjudges cost or feasibility. Large
    changes come first: the window of useful states, and so the bins, narrow as they go.
    """
    slack = _slack(weight, budget, start)
    gap = jnp.sum(_take(cost, best) - _take(cost, start)) + multiplier * slack
    reduced, change, level = _open_changes(cost, weight, start, multiplier, gap)
    order = jnp.argsort(-jnp.max(jnp.abs(change), axis=1))
    reduced, change = reduced[order], change[order]

    # Before layer l those states are useful which the layers from l on can bring below
    # the slack, but not more than gap / multiplier below.
    up, down = (jnp.max(x, axis=1, initial=0) for x in (change, -change))
    up, down = (jnp.append(lax.cumsum(x, reverse=True), 0) for x in (up, down))
    low = slack - 1.001 * jnp.minimum(gap / multiplier, 2 * budget) - up
    high = slack + down
    low, high = low.at[0].min(0), high.at[0].max(0)
    width = jnp.maximum((high - low) / (_CORE_BINS - 2), jnp.finfo(low.dtype).tiny)
    low = low - width / 2
    grids = low[:-1], width[:-1], low[1:], width[1:]

    first = jnp.floor(-low[0] / width[0]) == jnp.arange(_CORE_BINS, dtype=low.dtype)
    total = jnp.where(first, 0, jnp.inf).astype(cost.dtype)
    state = total, jnp.zeros_like(total)
    (total, moved), path = lax.scan(_add_layer, state, (reduced, change, *grids))
    total = jnp.where(moved <= slack, total + multiplier * (slack - moved), jnp.inf)
    picks = _backtrack(jnp.argmin(total), *path)
    return start.at[order].set(_take(level[order], picks).astype(start.dtype))


def _open_changes(cost, weight, start, multiplier, gap):
    """Reduced cost, change of weight and level of the open changes, [L, M] each."""
    layers, n = cost.shape
    change = weight - _take(weight, start)[:, None]
    reduced = (cost - _take(cost, start)[:, None]) + multiplier * change
    reduced = jnp.where(reduced > gap * (1 + 1e-5), jnp.inf, reduced)
    reduced = jnp.where(jnp.arange(n) == start[:, None], -1, reduced)  # always open
    # The M best; as with the bins, few layers need more of them.
    value, level = lax.top_k(-reduced, min(n, max(8, _CORE_CHANGES // layers)))
    reduced = jnp.maximum(-value, 0)
    change = jnp.take_along_axis(change, level, 1)
    return reduced, jnp.where(jnp.isfinite(reduced), change, 0), level


def _add_layer(state, row):
    """One layer of the core: from bins (low, width) to bins (new_low, new_width)."""
    total, moved = state
    reduced, change, low, width, new_low, new_width = row
    cells = jnp.arange(_CORE_BINS)
    bins = cells.astype(total.dtype)
    # New bins are no wider, so that each draws on at most two old ones per change.
    source = (new_low + bins * new_width - change[:, None] - low) / width
    source = jnp.clip(jnp.floor(source), -1, _CORE_BINS).astype(jnp.int32)
    source = jnp.clip(jnp.concatenate([source, source + 1]), 0, _CORE_BINS - 1)
    # Gathers and argmins dominate the time: `take` and the two minima are the faster.
    reached = jnp.take(moved, source, mode="clip") + jnp.tile(change, 2)[:, None]
    options = jnp.take(total, source, mode="clip") + jnp.tile(reduced, 2)[:, None]
    inside = jnp.floor((reached - new_low) / new_width) == bins
    options = jnp.where(inside, options, jnp.inf)
    total = jnp.min(options, axis=0)
    rows = jnp.arange(len(options))[:, None]
    pick = jnp.min(jnp.where(options == total, rows, len(options) - 1), axis=0)
    path = pick % change.size, source[pick, cells]
    return (total, reached[pick, cells]), path


def _dp(cost, weight, budget, bins):
    """T[l, e], the least cost of layers 0..l at a binned weight of at most e: [L]."""
    ratio = weight * bins / jnp.where(budget > 0, budget, 1)
    needed = jnp.clip(jnp.ceil(ratio), 1, bins).astype(jnp.int32)
    cost = jnp.where(weight <= budget, cost, jnp.inf)
    levels = jnp.arange(cost.shape[1], dtype=jnp.int32)
    barrier = jnp.full(bins, jnp.inf, cost.dtype)

    def add_layer(total, row):
        padded = jnp.concatenate([barrier, total])

        def try_level(best, level):
            cost, needed, index = level
            option = lax.dynamic_slice(padded, (bins - needed,), (bins + 1,)) + cost
            better = option < best[0]
            pick = jnp.where(better, index, best[1])
            return (jnp.where(better, option, best[0]), pick), None

        first = jnp.full(bins + 1, jnp.inf, total.dtype), jnp.zeros(bins + 1, jnp.int32)
        return lax.scan(try_level, first, (*row, levels))[0]

    start = jnp.zeros(bins + 1, cost.dtype)
    total, picks = lax.scan(add_layer, start, (cost, needed))
    sources = jnp.arange(bins + 1) - jnp.take_along_axis(needed, picks, 1)
    # argmin takes the first: among equal costs the lowest binned weight.
    return _backtrack(jnp.argmin(total), picks, sources)


def _backtrack(end, picks, sources):
    """Follows sources [L, bins] from bin `end` after the last layer: picks, int [L]."""

    step = lambda position, row: (row[1][position], row[0][position])
    return lax.scan(step, end.astype(sources.dtype), (picks, sources), reverse=True)[1]


def _exact(cost, weight, budget):
    """Mixed-integer optimum, float64 NumPy arrays in and int32 [L] out."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError(
            'method "exact" needs SciPy; install it with: pip install "gcjax[test]"'
        ) from error
    x = np.zeros(len(cost), np.int32)
    if not all(np.isfinite(table).all() for table in (cost, weight, budget)):
        return x
    lightest = weight.min(axis=1)
    weight, slack = weight - lightest[:, None], budget - lightest.sum()
    if slack < 0:
        return x  # any assignment: `_select` sees that nothing is within budget
    affordable = weight <= slack
    layer, level = np.nonzero(affordable)
    cost = cost - np.where(affordable, cost, np.inf).min(axis=1, keepdims=True)
    # HiGHS has absolute tolerances of about 1e-6: scale up, and let the weight in
    # with 1e-10 of the cost, so that it decides between equal costs.
    c, w = cost[affordable], weight[affordable]
    c, w = 1e6 * c / (c.max() or 1.0), 1e4 * w / (slack or 1.0)
    one_each = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    answer = milp(
        c + 1e-8 * w,
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(w, ub=1e4)],
        options={"mip_rel_gap": 0},
    )
    if answer.x is None:
        raise RuntimeError(f"scipy.optimize.milp found no solution: {answer.message}")
    chosen = answer.x > 0.5
    x[layer[chosen]] = level[chosen]
    return x
