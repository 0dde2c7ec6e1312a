"""One interface to all solvers, and the choice of resolution."""

import dataclasses
import time

import jax
import numpy as np

from gcjax.pact import cells, exact, scaled
from gcjax.pact.graph import (
    MIDDLE,
    Bounds,
    Graph,
    bounds,
    build,
    estimate,
    rollouts,
    units,
)
from gcjax.pact.problem import Problem
from gcjax.pact.schedule import NoneFoundError, Plan, feasible, replay

SOLVERS = ("bucket", "grid", "cost_scaled", "labels", "brute_force")
CAPACITIES = 1 << 16, 1 << 20  # labels of one run: at first, and at most
_LABELS = 1_000_000  # after which a plan is not improved further
# Labels of a cell are ranked by bounds that price time and epochs: few bins of these
# are enough. Bins of progress decide; many problems need no more than the first.
_FIRST = 1024, 4
_COARSEST, _FINEST = 64, 8192
_SETTLED = 5e-4  # relative gain of a finer resolution that is not worth another
# Bounds that are only estimates may be too high by this share: plans are looked for
# so much above them first, then in windows that double.
_WINDOW = 2.5e-3


def plan(
    problem: Problem,
    solver: str = "bucket",
    resolution: tuple[int, int] | float | None = None,
    *,
    limit_s: float = 600.0,
    progress: bool = False,
) -> Plan:
    """Finds the plan of least energy that meets the target in time.

    Args:
      problem: What is planned.
      solver: "bucket", exact labels that compete in cells, one survivor each; near the
        optimum, in seconds (default). "grid", the same over rounded states: the plain
        reading of a dynamic programme on the time-expanded graph. "cost_scaled",
        within a factor of the optimum over rounded losses. "labels", the optimum, for
        small problems or patient users. "brute_force", for tests.
      resolution: For bucket and grid, bins of progress (for grid: of loss) and of
        time, powers of two; None chooses them, and refines until the answer settles.
        For cost_scaled, the relative error allowed, 0.1 by default.
      limit_s: Processor time for labels, and for the proof that no plan exists.
      progress: Show progress bars.

    Returns:
      A plan that was replayed without rounding and meets all constraints.

    Raises:
      ValueError: for an unknown solver or impossible resolution.
      InfeasibleError: where it is proved that no plan exists.
      NoneFoundError: where none was found, and one may exist.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    begun = time.process_time()
    if problem.start_loss <= problem.max_loss:
        return replay(problem, [], solver=solver)
    if solver == "brute_force":
        found = exact.brute_force(problem)
    else:
        graph = build(problem)
        if solver == "bucket":
            found = _bucket(graph, _check_bins(resolution))
        elif solver == "grid":
            found = _grid(graph, _check_bins(resolution))
        elif solver == "cost_scaled":
            found = scaled.solve(graph, 0.1 if resolution is None else resolution)
        else:
            found = _labels(graph, limit_s, progress)
    if found is None:
        found = _last_resort(problem, solver, limit_s)
    return dataclasses.replace(found, cpu_s=time.process_time() - begun)


def lower_bound(problem: Problem, floats: int = 1 << 24) -> float:
    """Energy in joules that no plan can stay below, proved.

    Args:
      problem: What is planned.
      floats: Size of the tables; larger ones give a tighter bound.
    """
    graph = build(problem)
    return bounds(graph, bins=exact.bound_bins(graph, floats)).root_j


def _check_bins(resolution) -> tuple[int, int] | None:
    if resolution is None:
        return None
    if not (
        isinstance(resolution, tuple)
        and len(resolution) == 2
        and all(isinstance(b, int) and 1 <= b <= 8192 for b in resolution)
        and all(b & (b - 1) == 0 for b in resolution)
    ):
        raise ValueError(
            "resolution must be two powers of two up to 8192, bins of progress and "
            f"of time, got {resolution!r}"
        )
    return resolution


def _last_resort(problem: Problem, solver: str, limit_s: float) -> Plan:
    """The fastest plan, or the proof that there is none."""
    graph = build(problem)
    found = exact.fastest(graph, limit_s)
    if found.choices is not None:
        return replay(problem, found.choices, graph.tables, solver)
    if not found.complete:
        raise NoneFoundError(
            f"{solver} found no plan at this resolution, and whether one exists was "
            f"not settled in {limit_s:g} s: raise resolution or limit_s"
        )
    exact.refuse(problem, limit_s)
    raise AssertionError("unreachable")


def _best_rollout(graph: Graph, bound: Bounds) -> Plan | None:
    plans = [
        replay(graph.problem, choices, graph.tables, "bucket")
        for choices in rollouts(graph, bound)
    ]
    plans = [p for p in plans if feasible(graph.problem, p)]
    return min(plans, key=lambda p: p.joules, default=None)


def _bucket(graph: Graph, fixed: tuple[int, int] | None) -> Plan | None:
    """Searches windows above the estimated optimum, narrow ones first.

    In a narrow window few labels survive, so that cells can be fine. Where the log
    overflows they are made coarser, and where nothing is found the window is widened.
    Once a plan is found, progress is cut finer until that gains nothing more.
    """
    problem = graph.problem
    bound = estimate(graph)
    if bound.proof:
        return None
    best = _best_rollout(graph, bound)
    bins, window = fixed or _FIRST, _WINDOW
    count, largest = 0, _FINEST
    while True:
        known = best.joules if best else np.inf
        reach = bound.root_j * (1 + window) if window < np.inf else np.inf
        upper = min(known, reach)
        log = _run(graph, bound, upper, _three(graph, bound, bins))
        count += int(log.count)
        gain = -1.0
        if log.best >= 0:
            choices = cells.trace(graph, log, int(log.best))
            found = replay(problem, choices, graph.tables, "bucket", resolution=bins)
            if not feasible(problem, found):
                raise AssertionError("a plan in ticks fails its replay")
            gain = (known - found.joules) / found.joules
            best = found if gain > 0 else best
        settled = upper >= known and gain < _SETTLED
        if best and count > _LABELS:
            break
        if fixed is not None and (gain >= 0 or log.full or window == np.inf):
            break
        if log.full and bins[0] > _COARSEST:
            largest = bins[0] // 2
            bins = largest, bins[1]
            if gain >= 0 or (best and settled):
                break  # the coarser one has been tried
        elif gain < 0 and upper < known and window < np.inf:
            window = 2 * window if window < 0.5 else np.inf  # nothing is so cheap
        elif (settled and bins[0] > _FIRST[0]) or 2 * bins[0] > largest:
            break
        else:
            bins = 2 * bins[0], bins[1]
    return dataclasses.replace(best, labels=count) if best else None


def _run(
    graph: Graph, bound: Bounds, upper_j: float, bins, snap: bool = False, **options
) -> cells.Log:
    """Works off the queue, with more room where the first log overflows."""
    a = cells.arrays(graph, bound, upper_j * (1 + 1e-6), bins, snap)
    a = jax.device_put(a)
    for capacity in CAPACITIES:
        log = cells.solve(a, capacity, snap=snap, **options)
        if not log.full:
            break
    return jax.device_get(log)


def _three(graph: Graph, bound: Bounds, bins: tuple[int, int]) -> tuple[int, int, int]:
    """Bins of progress, time and epochs: of what does not bind one is enough."""
    weight = bound.weights[MIDDLE]
    cap = graph.problem.max_epochs
    total = bound.root_j / bound.energy_unit_j
    return (
        bins[0],
        bins[1] if weight[1] > 1e-3 * total else 1,
        min(bins[1], cap) if weight[2] * cap > 1e-3 * total else 1,
    )


def _grid(graph: Graph, fixed: tuple[int, int] | None) -> Plan | None:
    """Rounded states; cells are halved until some plan survives the rounding."""
    bound = bounds(graph)
    bins, best = fixed or (64, 128), None
    while not bound.proof:
        log = _run(graph, bound, np.inf, (*bins, 1), snap=True, guided=False)
        if log.best >= 0:
            choices = cells.trace(graph, log, int(log.best))
            best = replay(
                graph.problem,
                choices,
                graph.tables,
                "grid",
                resolution=bins,
                labels=int(log.count),
            )
        if fixed or log.full or best or bins[0] >= _FINEST:
            break
        bins = 2 * bins[0], 2 * bins[1]
    return best


def _labels(graph: Graph, limit_s: float, progress: bool) -> Plan | None:
    """The optimum, with the bucket's plan as a start."""
    start = _bucket(graph, None)
    upper = start.joules if start else np.inf
    found = exact.labels(graph, upper, limit_s, progress)
    best = start
    if found.choices is not None:
        best = replay(graph.problem, found.choices, graph.tables)
        best = min(best, start or best, key=lambda p: p.joules)
    if best is None:
        return None
    return dataclasses.replace(
        best, solver="labels", lower_bound_j=found.lower_j, labels=found.labels
    )


def frontier(
    problem: Problem,
    solver: str = "bucket",
    resolution: tuple[int, int] = (64, 64),
    capacity: int = 1 << 21,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least energy found for every loss and deadline, from one run.

    Args:
      problem: Its max_loss and deadline_s are the corner of the frontier.
      solver: "bucket" or "grid".
      resolution: Bins of progress (grid: of loss) and of time, powers of two.
      capacity: Labels that there is room for.

    Returns:
      Losses [L + 1], descending to max_loss; deadlines [H], ascending to deadline_s;
      joules [L + 1, H], inf where nothing was found. Joules never rise with a later
      deadline or a higher loss.

    Raises:
      ValueError: for another solver or impossible resolution.
      NoneFoundError: if there are more labels than room.
    """
    if solver not in ("bucket", "grid"):
        raise ValueError(f"a frontier is for 'bucket' or 'grid', got {solver!r}")
    bins = _check_bins(resolution)
    graph = build(problem)
    a = _everything(graph, bins, solver == "grid")
    log = jax.device_get(
        cells.solve(
            jax.device_put(a),
            capacity,
            snap=solver == "grid",
            guided=False,
            improve=False,
        )
    )
    if log.full:
        raise NoneFoundError(
            f"more than {capacity} labels: choose a coarser resolution than {bins}"
        )
    return _surface(graph, log, bins)


def _everything(graph: Graph, bins: tuple[int, int], snap: bool) -> cells.Arrays:
    """Arrays that drop no label but the late ones."""
    weights = np.zeros((1, 3), np.float32)
    size, clusters, _ = graph.energy_j.shape
    table = np.zeros((size, clusters, 2, 1), np.float32)
    bound = Bounds(weights, table, table, units(graph)[0], 0.0, "")
    a = cells.arrays(graph, bound, np.inf, (*bins, 1), snap)
    return a._replace(guide=np.int32(0))


def _surface(graph: Graph, log: cells.Log, bins: tuple[int, int]):
    """Cumulative minimum of all labels' energies over losses and deadlines."""
    problem, count = graph.problem, int(log.count)
    version = log.place[:count] // graph.energy_j.shape[1]
    losses = np.empty(count)
    for m, v in enumerate(problem.versions):
        mine = version == m
        share = log.progress[:count][mine] / cells.TICKS
        at = graph.low[m] + share * (graph.high[m] - graph.low[m])
        losses[mine] = v.curve.loss(at)
    edges = np.linspace(problem.start_loss, problem.max_loss, bins[0] + 1)
    # The first edge that is not below a label's loss; the goal is met at tolerance.
    row = np.searchsorted(-edges, -(losses - 1e-9 * problem.top_loss), "right") - 1
    column = -(-log.used[:count].astype(np.int64) * bins[1] // cells.TICKS) - 1
    column = np.clip(column, 0, bins[1] - 1)
    unit, _ = units(graph)
    joules = np.full((bins[0] + 1, bins[1]), np.inf)
    inside = row >= 0
    at = row[inside], column[inside]
    np.minimum.at(joules, at, log.cost[:count][inside].astype(float) * unit)
    joules = np.minimum.accumulate(joules[::-1], 0)[::-1]
    joules = np.minimum.accumulate(joules, 1)
    deadlines = np.arange(1, bins[1] + 1) / bins[1] * problem.deadline_s
    return edges, deadlines, joules
