"""A plan, and what it costs when it is replayed without any rounding."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gcjax.pact.problem import Problem
from gcjax.pact.tables import Tables, advance, tabulate

# Sums of a plan's seconds and joules differ in their last digits with their order.
# Constraints are met within this share of the deadline, and of the top loss.
TOLERANCE = 1e-9


class Step(NamedTuple):
    """One epoch, and what is predicted of it."""

    version: str
    cluster: str
    fraction: float  # of the cluster's data
    level: str  # of gradient compression; "none" for a single node
    loss: float  # at its end
    seconds: float  # from the plan's start to its end
    joules: float  # likewise


@dataclass(frozen=True)
class Plan:
    """A schedule that meets loss and deadline of its problem.

    Attributes:
      steps: The epochs.
      loss: At the end.
      seconds: In all.
      joules: In all.
      solver: That found it.
      lower_bound_j: Energy that no plan can stay below, as far as proved.
      cpu_s: Processor time of the search, compilation included.
      labels: Partial plans looked at.
      resolution: Bins of loss and time, where the solver has such.
    """

    steps: tuple[Step, ...]
    loss: float
    seconds: float
    joules: float
    solver: str
    lower_bound_j: float = 0.0
    cpu_s: float = 0.0
    labels: int = 0
    resolution: tuple[int, int] | None = None


class InfeasibleError(ValueError):
    """Proved: no plan meets loss, deadline and number of epochs together.

    Attributes:
      nearest_deadline_s: Least time to the loss target; inf if never.
      nearest_loss: Lowest loss within the deadline, to about 0.1 %.
    """

    def __init__(self, message: str, nearest_deadline_s: float, nearest_loss: float):
        super().__init__(message)
        self.nearest_deadline_s = nearest_deadline_s
        self.nearest_loss = nearest_loss


class NoneFoundError(ValueError):
    """No plan was found; whether one exists is not known."""


def replay(
    problem: Problem,
    choices: Iterable[tuple[int, int]],
    tables: Tables | None = None,
    solver: str = "replay",
    **found,
) -> Plan:
    """Adds up a list of (version, action) exactly, through the predictor itself.

    Args:
      problem: What was planned for.
      choices: Version and action, as indices of `Tables`, of every epoch.
      tables: Of the problem, if there already.
      solver: Stands in the plan.
      **found: Further fields of the plan.

    Raises:
      ValueError: for an impossible action.
    """
    tables = tables or tabulate(problem)
    m, c = tables.start
    loss, seconds, joules, steps = problem.start_loss, 0.0, 0.0, []
    for target, a in choices:
        joules += tables.switch_j[m, target, c] + tables.energy_j[target, c, a]
        seconds += tables.switch_s[m, target, c] + tables.seconds[target, c, a]
        if not joules < float("inf"):
            raise ValueError(f"step {len(steps)} of the plan is impossible")
        samples = tables.progress[target, c, a]
        loss = float(advance(problem, m, target, loss, samples))
        m, c = target, int(tables.destination[a])
        names = [g.name for g in problem.gradient_levels] or ["none"]
        alone = len(problem.clusters[c].members) == 1
        steps.append(
            Step(
                problem.versions[m].name,
                problem.clusters[c].name,
                float(tables.fraction[a]),
                "none" if alone else names[tables.level[a]],
                loss,
                float(seconds),
                float(joules),
            )
        )
    return Plan(tuple(steps), loss, float(seconds), float(joules), solver, **found)


def action_of(problem: Problem, step: Step, tables: Tables) -> int:
    """Which action of the tables an epoch takes.

    Raises:
      ValueError: where the problem has no such action.
    """
    clusters = [c.name for c in problem.clusters]
    same = np.zeros(len(tables.destination), bool)
    if step.cluster in clusters:
        c = clusters.index(step.cluster)
        same = (tables.destination == c) & (tables.fraction == step.fraction)
        if len(problem.clusters[c].members) > 1:  # alone, all levels are one
            names = [g.name for g in problem.gradient_levels] or ["none"]
            same &= np.array([names[g] == step.level for g in tables.level])
    if not same.any():
        raise ValueError(
            f"the problem has no epoch on {step.fraction:g} of the data of "
            f"{step.cluster!r} at level {step.level!r}"
        )
    return int(np.flatnonzero(same)[0])


def choices_of(
    problem: Problem, steps: Iterable[Step], tables: Tables
) -> list[tuple[int, int]]:
    """Versions and actions of epochs, as `replay` takes them."""
    versions = [v.name for v in problem.versions]
    return [
        (versions.index(step.version), action_of(problem, step, tables))
        for step in steps
    ]


def feasible(problem: Problem, plan: Plan) -> bool:
    """Whether a replayed plan meets all of its problem's constraints."""
    return (
        plan.loss <= problem.max_loss + TOLERANCE * problem.top_loss
        and plan.seconds <= problem.deadline_s * (1 + TOLERANCE)
        and len(plan.steps) <= problem.max_epochs
    )
