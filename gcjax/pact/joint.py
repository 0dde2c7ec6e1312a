"""Versions and gradient levels planned together, or each without the other.

A way of planning is told by what it leaves of the problem: `joint` everything, "model
only" no compressed gradients, "gradients only" no switches, and one after the other
what the plan made first leaves open. All can be carried out in the whole problem, whose
versions, clusters and levels they use.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gcjax.pact.problem import Problem
from gcjax.pact.schedule import Plan

JOINT = "joint"
# In an order in which those that build on another one come after it.
WAYS = (
    "neither",
    "model only",
    "gradients only",
    "model, then gradients",
    "gradients, then model",
    JOINT,
)


def restricted(
    problem: Problem, way: str, first: Callable[[str], Plan | None]
) -> Problem | None:
    """What a way of planning leaves of a problem.

    Args:
      problem: Its first gradient level is the uncompressed one.
      way: One of `WAYS`.
      first: Gives the plan of an earlier way, for those that build on it.

    Returns:
      The problem that is left, None where the way to build on has no plan.

    Raises:
      ValueError: for an unknown way.
    """
    uncompressed = replace(problem, gradient_levels=problem.gradient_levels[:1])
    if way == "neither":
        return replace(uncompressed, switches=())
    if way == "model only":
        return uncompressed
    if way == "gradients only":
        return replace(problem, switches=())
    if way == "model, then gradients":
        plan = first("model only")
        return plan and keeping_places(problem, plan)
    if way == "gradients, then model":
        plan = first("gradients only")
        return plan and keeping_levels(problem, plan)
    if way == JOINT:
        return problem
    raise ValueError(f"a way of planning is one of {WAYS}, got {way!r}")


def keeping_places(problem: Problem, plan: Plan) -> Problem:
    """What is left of the problem where a plan's versions and clusters are fixed.

    How many epochs each gets is free: with compressed gradients the same number would
    miss the target.
    """
    used = {step.version for step in plan.steps} | {problem.start_version}
    kept = [i for i, v in enumerate(problem.versions) if v.name in used]
    places = {step.cluster for step in plan.steps} | {problem.start_cluster}
    take = lambda values: tuple(values[i] for i in kept)
    each = lambda cluster: np.broadcast_to(cluster.efficiency, len(problem.versions))
    levels = tuple(
        replace(
            level,
            up_fraction=take(level.up_fraction),
            down_fraction=take(level.down_fraction),
            efficiency=take(level.efficiency),
        )
        for level in problem.gradient_levels
    )
    return replace(
        problem,
        versions=take(problem.versions),
        switches=tuple(
            s for s in problem.switches if s.source in used and s.target in used
        ),
        clusters=tuple(
            replace(c, efficiency=take(each(c).tolist()))
            for c in problem.clusters
            if c.name in places
        ),
        gradient_levels=levels,
    )


def keeping_levels(problem: Problem, plan: Plan) -> Problem:
    """What is left of the problem where only a plan's gradient levels may be used."""
    used = {step.level for step in plan.steps}
    levels = tuple(g for g in problem.gradient_levels if g.name in used)
    # A plan on single nodes used none.
    return replace(problem, gradient_levels=levels or problem.gradient_levels[:1])


def levels_used(problem: Problem, plan: Plan) -> dict[str, int]:
    """Epochs in clusters of several nodes, by gradient level."""
    several = {c.name for c in problem.clusters if len(c.members) > 1}
    levels = [s.level for s in plan.steps if s.cluster in several]
    return {name: levels.count(name) for name in dict.fromkeys(levels)}
