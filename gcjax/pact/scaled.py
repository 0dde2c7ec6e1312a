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
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from gcjax.pact import cells
from gcjax.pact.exact import completion
from gcjax.pact.graph import SLACK, TICKS, Bounds, Graph
from gcjax.pact.schedule import NoneFoundError, Plan, feasible, replay

_LOSS_BINS = 128
# Roomy, as labels that share a slot of the table compete.
_CAPACITY = 1 << 21
# Times are whole numbers that float32 adds exactly.
_TIME_UNITS = 1 << 23


def solve(
    graph: Graph,
    error: float,
    loss_bins: int = _LOSS_BINS,
    limit_labels: int = 1 << 22,
) -> Plan | None:
    """A plan of at most (1 + error) times the optimum over rounded losses.

    Args:
      graph: What is searched.
      error: Allowed relative error, above 0.
      loss_bins: Of the grid of losses, from top_loss to max_loss; doubled where no plan
        survives the rounding.
      limit_labels: After which no further pass is begun.

    Returns:
      The plan; None if there is none over rounded losses. `labels` counts those of all
      passes, and `resolution` has the bins of loss and of energy of the last one.

    Raises:
      ValueError: for an error that is not a number above 0.
      NoneFoundError: after `limit_labels`, without a plan.
    """
    if not (isinstance(error, int | float) and 0 < error < math.inf):
        raise ValueError(f"the relative error must be above 0, got {error!r}")
    bound = completion(graph)
    count = 0
    while not bound.proof and loss_bins <= cells.FINEST:
        plan, low, made = _doubled(graph, bound, loss_bins, limit_labels - count)
        count += made.labels
        if plan is None:
            loss_bins *= 2
            continue
        if count < limit_labels:
            last, made = _within(graph, bound, plan.joules, error * low / 2, loss_bins)
            count += made.labels
            plan = min(plan, last or plan, key=lambda p: p.joules)
        return replace(plan, labels=count, resolution=(loss_bins, made.bins))
    return None


class _Pass(NamedTuple):
    labels: int
    full: bool  # whether labels were dropped for lack of room
    bins: int  # of energy


def _doubled(graph: Graph, bound: Bounds, loss_bins: int, limit_labels: int):
    """A plan of at most four times the least energy over rounded losses, if any.

    Tests whether there is no plan of at most `low`, or one of at most twice as much,
    with `low` doubled each time.

    Returns:
      The plan or None, the last `low`, and the passes together.
    """
    finite = graph.energy_j[np.isfinite(graph.energy_j)]
    longest = graph.problem.max_epochs * (
        finite.max() + graph.tables.switch_j[np.isfinite(graph.tables.switch_j)].max()
    )
    low, count = max(bound.root_j, finite.min() * 0.5), 0
    while True:
        plan, made = _within(graph, bound, low, low, loss_bins)
        count += made.labels
        if plan or low > longest:
            return plan, low, made._replace(labels=count)
        if made.full or count >= limit_labels:  # then that there is none proves nothing
            raise NoneFoundError(
                f"cost_scaled gave up after {count} labels at {loss_bins} loss bins "
                f"and {low:.3g} J: raise limit_labels, or allow a larger error"
            )
        low *= 2


def _within(
    graph: Graph, bound: Bounds, most_j: float, lost_j: float, loss_bins: int
) -> tuple[Plan | None, _Pass]:
    """The cheapest plan in bins of energy that lose at most `lost_j` on a plan.

    None proves that no plan over rounded losses needs at most `most_j`, unless labels
    were dropped or `max_epochs` binds: labels of a cell do not compete in epochs.
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
    done &= log.cost[:count] <= _TIME_UNITS
    found = None
    for i in np.flatnonzero(done)[np.argsort(log.used[:count][done], kind="stable")]:
        choices = cells.trace(graph, log, int(i))
        plan = replay(graph.problem, choices, graph.tables, "cost_scaled")
        if feasible(graph.problem, plan):
            found = plan
            break
    return found, _Pass(count, bool(log.full), bins)


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
