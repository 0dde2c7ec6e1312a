"""Plans whose predictor may be wrong: margins, and planning again after every epoch.

A plan rests on curves and jumps that were fitted, and its loss may turn out higher than
promised. Three remedies, alone or together:

*A margin from the error.* If heights above the floor, floors and jumps are known up to
a factor in 1 +- error, `cautious` gives the curves at the unfavourable end. The next
loss of a curve never falls when its floor, its scale or the loss before rises, and
neither does the loss after a jump: so what a plan reaches with cautious curves, it
reaches with all that the error allows. Where caution leaves no plan, `widest` lowers it
to what the deadline has room for, and the promise becomes a hope.

*A margin on the loss.* If what is known is how far measured losses scatter around the
curves, a plan can aim at so much less than the target. Where that leaves no plan,
`with_margin` aims as low as the deadline has room for.

*Receding horizon.* After every epoch the loss is measured, and the rest is planned anew
from there, with the time that is left; training stops as soon as the target is met.
With cautious curves the rest of the old plan still meets the target, whatever was
measured within the error, so that some plan is left at every epoch.

References:
  Malandrino et al., "Matching DNN Compression and Cooperative Training with Resources
  and Data Availability", INFOCOM 2023, arXiv:2212.02304, plan once, as far as their
  abstract tells, which is all that was at hand; the remedies are our additions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gcjax.pact.planning import attempt
from gcjax.pact.predictor import refit_curve
from gcjax.pact.problem import Problem
from gcjax.pact.schedule import Plan, Step, choices_of, replay
from gcjax.pact.tables import advance, switched, tabulate

# Of a version, (loss before, effective samples, loss after) of each of its epochs.
History = dict[str, list[tuple[float, float, float]]]


class Standing(NamedTuple):
    """Where a run stands between two epochs."""

    version: str
    cluster: str
    loss: float  # measured
    seconds: float  # since the start
    epochs: int


def rest(problem: Problem, now: Standing) -> Problem:
    """What is left to plan, with the time and the epochs that are left."""
    return dataclasses.replace(
        problem,
        start_version=now.version,
        start_cluster=now.cluster,
        start_loss=min(now.loss, problem.top_loss),
        deadline_s=problem.deadline_s - now.seconds,
        max_epochs=problem.max_epochs - now.epochs,
    )


def refitted(problem: Problem, history: History, noise: dict[str, float]) -> Problem:
    """The problem with the curves that the epochs so far suggest.

    Args:
      problem: With the curves of the profile.
      history: Of the run.
      noise: Of each version's measured losses, the relative standard deviation.
    """
    versions = []
    for version in problem.versions:
        if epochs := history.get(version.name):
            fitted = refit_curve(
                version.curve, *np.transpose(epochs), noise[version.name]
            )
            version = dataclasses.replace(version, curve=fitted)
        versions.append(version)
    return dataclasses.replace(problem, versions=tuple(versions))


class Chosen(NamedTuple):
    """The next epoch, and how it was found."""

    step: Step | None  # None where the target is met or nothing fits into the time left
    candidate: int  # that had the plan; how many there are where none had one
    margin: float  # of the plan below the target


def next_step(
    candidates: Sequence[Problem], now: Standing, limit_s: float, margin: float = 0.0
) -> Chosen:
    """The next epoch, by the first candidate for the problem that has a plan.

    Where none has one, the epoch after which the first predicts the least loss is
    taken, of those that end in time.

    Args:
      candidates: The whole problem, with the curves to try one after the other.
      now: Where the run stands.
      limit_s: Processor time that a search beyond the default solver may take.
      margin: How far below the target to aim, where a plan leads there; see
        `with_margin`.
    """
    problem = candidates[0]
    if (
        now.loss <= problem.max_loss
        or now.seconds >= problem.deadline_s
        or now.epochs >= problem.max_epochs
    ):
        return Chosen(None, 0, 0.0)
    for i, candidate in enumerate(candidates):
        plan, kept = with_margin(rest(candidate, now), margin, limit_s)
        if plan:
            return Chosen(plan.steps[0], i, kept)
    return Chosen(least_loss(rest(problem, now)), len(candidates), 0.0)


def least_loss(problem: Problem) -> Step | None:
    """The epoch after which the loss is lowest, of those that end in time."""
    tables = tabulate(problem)
    m, c = tables.start
    best, choice = np.inf, None
    for n in np.flatnonzero(np.isfinite(tables.switch_j[m, :, c])).tolist():
        seconds = tables.switch_s[m, n, c] + tables.seconds[n, c]
        in_time = tables.possible[n, c] & (seconds <= problem.deadline_s)
        for a in np.flatnonzero(in_time).tolist():
            gained = tables.progress[n, c, a]
            loss = float(advance(problem, m, n, problem.start_loss, gained))
            if loss < best:
                best, choice = loss, (n, a)
    return replay(problem, [choice], tables).steps[0] if choice else None


def cautious(problem: Problem, error: float) -> Problem:
    """The problem at the unfavourable end of what its predictor's error allows.

    Args:
      problem: As the predictor has it: its floors, scales and jumps are the true ones
        times factors in 1 +- `error`.
      error: Relative, in [0, 1).

    Raises:
      ValueError: for another error, or where floors so high leave nothing to reach.
    """
    if not 0 <= error < 1:
        raise ValueError(f"the relative error must be in [0, 1), got {error}")
    up = 1 / (1 - error)

    def worse(curve):
        changed = dict(floor=curve.floor * up, scale=curve.scale * up)
        return dataclasses.replace(curve, **changed)

    def larger(jump):
        # `height * rate` of at most 1, as for every jump.
        most = 1 / jump.rate if jump.rate else np.inf
        return dataclasses.replace(jump, height=min(jump.height * up, most))

    return dataclasses.replace(
        problem,
        versions=tuple(
            dataclasses.replace(v, curve=worse(v.curve)) for v in problem.versions
        ),
        switches=tuple(
            dataclasses.replace(s, jump=larger(s.jump)) for s in problem.switches
        ),
    )


def widest(
    problem: Problem, error: float, limit_s: float, shares: int = 8
) -> tuple[Plan | None, float]:
    """The plan of the most caution that the target has room for.

    Args:
      problem: As the predictor has it.
      error: Its relative error, in [0, 1).
      limit_s: Processor time that a search beyond the default solver may take.
      shares: Steps in which caution is lowered, from `error` down to 0.

    Returns:
      The plan, None where there is none without caution either; and the error that it
      withstands.
    """

    def plan_at(error: float) -> Plan | None:
        try:
            return attempt(cautious(problem, error), limit_s)
        except ValueError:  # floors above the loss of an untrained model
            return None

    return _most(plan_at, error, shares)


def with_margin(
    problem: Problem, margin: float, limit_s: float, shares: int = 4
) -> tuple[Plan | None, float]:
    """The plan that aims below the target, by as much of a margin as there is room for.

    Args:
      problem: As the predictor has it.
      margin: By which share of the target the plan's loss is to be lower, in [0, 1).
      limit_s: Processor time that a search beyond the default solver may take.
      shares: Steps in which the margin is lowered, down to 0.

    Returns:
      The plan, None where there is none without a margin either; and its margin.

    Raises:
      ValueError: for a margin out of range.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"the margin must be a share in [0, 1), got {margin}")

    def plan_at(margin: float) -> Plan | None:
        aimed = problem.with_target(max_loss=problem.max_loss * (1 - margin))
        return attempt(aimed, limit_s)

    return _most(plan_at, margin, shares)


def _most(
    plan_at: Callable[[float], Plan | None], most: float, shares: int
) -> tuple[Plan | None, float]:
    """The plan for the largest share of `most` that has one, by bisection."""
    values = [most * i / shares for i in range(shares + 1)] if most else [0.0]
    # The largest known to have a plan, the smallest known to have none.
    low, high, best = -1, len(values), None
    step = high - 1
    while high - low > 1:
        if plan := plan_at(values[step]):
            low, best = step, plan
        else:
            high = step
        step = (low + high) // 2
    return best, values[max(low, 0)]


def follow(
    real: Problem, candidates: Callable[[History], Sequence[Problem]], limit_s: float
) -> tuple[Plan, int]:
    """Carries a plan out in simulation, and plans again after every epoch.

    Args:
      real: The problem with the curves that training follows.
      candidates: From what was seen, the problems that plans are made for; see
        `next_step`.
      limit_s: Processor time that a search beyond the default solver may take.

    Returns:
      What was done, as a plan; whether it met the target is for `feasible` to tell.
      And the number of epochs before which no plan was found.
    """
    tables = tabulate(real)
    m, c = tables.start
    history: History = {}
    done, choices, lost = replay(real, [], tables), [], 0
    while True:
        before = done.loss if choices else real.start_loss
        now = Standing(
            real.versions[m].name,
            real.clusters[c].name,
            before,
            done.seconds,
            len(choices),
        )
        tried = candidates(history)
        step, found, _ = next_step(tried, now, limit_s)
        if step is None:
            return done, lost
        lost += found == len(tried)
        (choice,) = choices_of(real, [step], tables)
        choices.append(choice)
        done = replay(real, choices, tables)
        n, a = choice
        line = (
            float(switched(real, m, n, before)),
            float(tables.progress[n, c, a]),
            done.loss,
        )
        history.setdefault(step.version, []).append(line)
        m, c = n, int(tables.destination[a])


def carried_out(real: Problem, plan: Plan) -> Plan:
    """A whole plan with other curves."""
    tables = tabulate(real)
    return replay(real, choices_of(real, plan.steps, tables), tables)


def until_met(real: Problem, plan: Plan) -> Plan:
    """A plan carried out with other curves until the target is met, or to its end."""
    done, goal = carried_out(real, plan), real.max_loss
    met = next((i for i, s in enumerate(done.steps) if s.loss <= goal), len(done.steps))
    return carried_out(real, dataclasses.replace(plan, steps=done.steps[: met + 1]))
