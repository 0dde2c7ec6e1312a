"""Scaling of costs: a plan within a factor of the optimum, deadline kept exactly.

The usual roles are exchanged: cells are told apart by energy, rounded up to bins, and
keep the label of least time. Losses stay rounded up on their grid, so the optimum that
is meant is that of the problem whose losses are rounded so; it may be dearer than the
real one, and lies below the real one for a target tightened by a bin for each epoch.

References:
  Hassin, "Approximation schemes for the restricted shortest path problem", Mathematics
  of Operations Research 17, 1992, for narrowing the bounds before the last pass.
"""

import math

import jax
import numpy as np

from gcjax.pact import cells
from gcjax.pact.exact import completion
from gcjax.pact.graph import SLACK, TICKS, Bounds, Graph
from gcjax.pact.schedule import NoneFoundError, Plan, feasible, replay

_LOSS_BINS = 128
_CAPACITY = 1 << 21
# Times are whole numbers that float32 adds exactly.
_TIME_UNITS = 1 << 23


def solve(graph: Graph, error: float, loss_bins: int = _LOSS_BINS) -> Plan | None:
    """A plan of at most (1 + error) times the optimum over rounded losses.

    Args:
      graph: What is searched.
      error: Allowed relative error, above 0.
      loss_bins: Of the grid of losses, from top_loss to max_loss.

    Returns:
      The plan; None if there is none over rounded losses, or too many labels.

    Raises:
      ValueError: for an error that is not a number above 0.
      NoneFoundError: if there are more labels than room.
    """
    if not (isinstance(error, int | float) and 0 < error < math.inf):
        raise ValueError(f"the relative error must be above 0, got {error!r}")
    bound = completion(graph)
    if bound.proof:
        return None
    low = bound.root_j
    finite = graph.energy_j[np.isfinite(graph.energy_j)]
    longest = graph.problem.max_epochs * (
        finite.max() + graph.tables.switch_j[np.isfinite(graph.tables.switch_j)].max()
    )
    low = max(low, finite.min() * 0.5)
    # Tests: no plan of at most `low`, or one of at most twice as much.
    while True:
        plan = _within(graph, bound, low, low, loss_bins)
        if plan or low > longest:
            break
        low *= 2
    if plan is None:
        return None
    last = _within(graph, bound, plan.joules, error * low / 2, loss_bins)
    return min(plan, last or plan, key=lambda p: p.joules)


def _within(
    graph: Graph, bound: Bounds, most_j: float, lost_j: float, loss_bins: int
) -> Plan | None:
    """The cheapest plan in bins of energy that lose at most `lost_j` on a plan.

    None proves that no plan over rounded losses needs at most `most_j`, unless
    `max_epochs` binds: labels of a cell do not compete in epochs.
    """
    epochs = graph.problem.max_epochs
    budget = most_j + lost_j
    bins = 1 << math.ceil(math.log2(epochs * budget / lost_j))
    a = _exchanged(graph, bound, budget, (loss_bins, bins, 1))
    log = cells.solve(
        jax.device_put(a), _CAPACITY, snap=True, guided=False, improve=False
    )
    log = jax.device_get(log)
    count = int(log.count)
    version = log.place[:count] // graph.energy_j.shape[1]
    done = graph.goal[version] & (log.progress[:count] >= TICKS)
    for i in np.flatnonzero(done)[np.argsort(log.used[:count][done], kind="stable")]:
        choices = cells.trace(graph, log, int(i))
        plan = replay(graph.problem, choices, graph.tables, "cost_scaled")
        if feasible(graph.problem, plan):
            return plan
    if log.full:  # then that there is none proves nothing
        raise NoneFoundError(
            f"more than {_CAPACITY} labels at {loss_bins} loss bins: choose fewer bins "
            "or a larger error"
        )
    return None


def _exchanged(graph: Graph, bound: Bounds, budget_j: float, bins) -> cells.Arrays:
    """Arrays with time as what cells minimise, and energy as what they divide."""
    problem, tables = graph.problem, graph.tables
    a = cells.arrays(graph, bound, np.inf, bins, snap=True)
    units = _TIME_UNITS / problem.deadline_s
    budget = budget_j / bound.energy_unit_j

    def times(seconds, possible):
        whole = np.ceil(seconds * units * (1 - 1e-12))
        return np.float32(np.where(possible, whole, np.inf))

    def energies(joules):
        return cells.ticks(joules / budget_j)

    energy, time, epoch = np.asarray(bound.weights, float).T
    fixed = energy * budget + time + epoch * problem.max_epochs
    return a._replace(
        cost=times(graph.seconds, np.isfinite(graph.energy_j)),
        used=energies(graph.energy_j),
        switch_cost=times(tables.switch_s, graph.allowed()[..., None]),
        switch_used=energies(tables.switch_j),
        weights=np.float32(np.stack([time / _TIME_UNITS, energy * budget, epoch], 1)),
        fixed=np.float32(fixed * (1 + SLACK)),
        upper=np.float32(0),
    )
