"""One interface to all solvers, and the choice of resolution."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from gcjax.pact import bucket, cells, exact, proof, scaled
from gcjax.pact.graph import Bounds, Graph, build, estimate, units
from gcjax.pact.problem import Problem
from gcjax.pact.schedule import NoneFoundError, Plan, replay

SOLVERS = ("bucket", "grid", "cost_scaled", "labels", "brute_force")
_GRID = 64, 128  # bins of loss and time that the grid starts from


def plan(
    problem: Problem,
    solver: str = "bucket",
    resolution: tuple[int, int] | float | None = None,
    *,
    limit_s: float = 600.0,
    limit_labels: int = 1 << 22,
    progress: bool = False,
) -> Plan:
    """Finds the plan of least energy that meets the target in time.

    Args:
      problem: What is planned.
      solver: "bucket", exact labels that compete in cells, one survivor each; near the
        optimum, in seconds (default). "grid", the same over rounded states: the plain
        reading of a dynamic programme on the time-expanded graph. "cost_scaled",
        within a factor of the optimum over rounded losses. "labels", the optimum, in
        seconds to minutes. "brute_force", for tests.
      resolution: For bucket and grid, bins of progress (for grid: of loss) and of
        time, powers of two; None chooses them, and refines until the answer settles.
        For cost_scaled, the relative error allowed, 0.1 by default.
      limit_s: Processor time for labels, and for the proof that no plan exists.
      limit_labels: Partial plans after which grid and cost_scaled begin no further
        pass and give up, at about 20 microseconds each.
      progress: Show progress bars.

    Returns:
      A plan that was replayed without rounding and meets all constraints.

    Raises:
      ValueError: for an unknown solver or impossible resolution.
      InfeasibleError: where it is proved that no plan exists.
      NoneFoundError: where none was found, and one may exist; also where grid or
        cost_scaled gave up.
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
            found = bucket.search(graph, _check_bins(resolution))
        elif solver == "grid":
            found = _grid(graph, _check_bins(resolution), limit_labels)
        elif solver == "cost_scaled":
            error = 0.1 if resolution is None else resolution
            found = scaled.solve(graph, error, limit_labels=limit_labels)
        else:
            found = _labels(graph, limit_s, progress)
    if found is None:
        found = _last_resort(problem, solver, limit_s)
    return dataclasses.replace(found, cpu_s=time.process_time() - begun)


def attempt(problem: Problem, limit_s: float) -> Plan | None:
    """The default solver's plan, or else the fastest; None where none was found.

    Like `plan`, but spends nothing on what to say where there is none.

    Args:
      problem: What is planned.
      limit_s: Processor time for the fastest plan.
    """
    if problem.start_loss <= problem.max_loss:
        return replay(problem, [], solver="bucket")
    graph = build(problem)
    if found := bucket.search(graph, None):
        return found
    return _fastest(graph, limit_s)[0]


def plan_batch(
    problems: Sequence[Problem],
    resolution: tuple[int, int] | None = None,
    capacity: int = 1 << 14,
) -> list[Plan | None]:
    """Plans several problems of one size together, by bucket; for sets of scenarios.

    All searches are one compiled program, `jax.vmap` over problems, which is called
    again while any problem asks for another window. Made for many small problems, up
    to about 3 versions x 12 clusters x 60 epochs: each window waits for the longest of
    its searches.

    Args:
      problems: With equally many versions, and clusters.
      resolution: As in `plan`.
      capacity: Labels of one window that there is room for.

    Returns:
      A plan for each problem; None where no plan was found.

    Raises:
      ValueError: for problems of different sizes, or impossible resolution.
    """
    sizes = {(len(p.versions), len(p.clusters)) for p in problems}
    if len(sizes) > 1:
        raise ValueError(
            "a batch needs equally many versions and clusters in all problems, got "
            f"{sorted(sizes)}"
        )
    return bucket.search_batch(problems, _check_bins(resolution), capacity)


def lower_bound(problem: Problem, bins: int = 2048) -> float:
    """Energy in joules that no plan can stay below, proved.

    Args:
      problem: What is planned.
      bins: Points of progress, a power of two; more give a tighter bound.
    """
    graph = build(problem)
    return proof.least_joules(graph, estimate(graph, bins))


def _check_bins(resolution) -> tuple[int, int] | None:
    if resolution is None:
        return None
    if not (
        isinstance(resolution, tuple)
        and len(resolution) == 2
        and all(isinstance(b, int) and 1 <= b <= cells.FINEST for b in resolution)
        and all(b & (b - 1) == 0 for b in resolution)
    ):
        raise ValueError(
            f"resolution must be two powers of two up to {cells.FINEST}, bins of "
            f"progress and of time, got {resolution!r}"
        )
    return resolution


def _last_resort(problem: Problem, solver: str, limit_s: float) -> Plan:
    """The fastest plan, or the proof that there is none."""
    found, complete = _fastest(build(problem), limit_s)
    if found:
        return found
    if not complete:
        raise NoneFoundError(
            f"{solver} found no plan at this resolution, and whether one exists was "
            f"not settled in {limit_s:g} s: raise resolution or limit_s"
        )
    exact.refuse(problem, limit_s)
    raise AssertionError("unreachable")


def _fastest(graph: Graph, limit_s: float) -> tuple[Plan | None, bool]:
    """The fastest plan; and whether, without one, it is proved that there is none."""
    found = exact.fastest(graph, limit_s)
    if found.choices is None:
        return None, found.complete
    return replay(graph.problem, found.choices, graph.tables, "fastest"), True


def _grid(
    graph: Graph, fixed: tuple[int, int] | None, limit_labels: int
) -> Plan | None:
    """Rounded states; cells are halved until some plan survives the rounding."""
    bound = exact.completion(graph)
    bins, count = fixed or _GRID, 0
    while not bound.proof:
        a = jax.device_put(cells.arrays(graph, bound, np.inf, (*bins, 1), snap=True))
        log = bucket.run(a, snap=True, guided=False)
        count += int(log.count)
        if log.best >= 0:
            choices = cells.trace(graph, log, int(log.best))
            found = dict(resolution=bins, labels=count)
            return replay(graph.problem, choices, graph.tables, "grid", **found)
        if log.full or count >= limit_labels:
            raise NoneFoundError(
                f"grid gave up after {count} labels, the last at {bins[0]} x {bins[1]} "
                "bins: raise limit_labels, or set a coarser resolution"
            )
        if fixed or bins[0] >= cells.FINEST:
            break
        bins = 2 * bins[0], 2 * bins[1]
    return None


def _labels(graph: Graph, limit_s: float, progress: bool) -> Plan | None:
    """The optimum, with the bucket's plan as a start."""
    start = bucket.search(graph, None)
    upper = start.joules if start else np.inf
    found = exact.labels(graph, upper, limit_s, progress)
    best = start
    if found.choices is not None:
        best = replay(graph.problem, found.choices, graph.tables)
        best = min(best, start or best, key=lambda p: p.joules)
    if best is None:
        return None
    lower_j = max(found.lower_j, start.lower_bound_j if start else 0.0)
    return dataclasses.replace(
        best, solver="labels", lower_bound_j=lower_j, labels=found.labels
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
