"""Versions and gradient levels planned together, and each without the other.

    python scripts/pact_joint.py --config=configs/pact_joint.py    # records
    python scripts/pact_joint.py --report                          # table and figure

A record for each problem, with all of its targets; those that exist are not planned
again.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pact_driver
from matplotlib.figure import Figure
from pact_driver import Record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import pact, report  # noqa: E402

JOINT = "joint"
ROWS = (
    "neither",
    "model only",
    "gradients only",
    "model, then gradients",
    "gradients, then model",
    JOINT,
)


_SINGLE = ("model only", "model, then gradients")


def measure(config, identity: Record) -> Record:
    """All targets of a problem."""
    problem = pact_driver.problem_of(identity)
    problem = pact.with_gradient_levels(problem, identity["seed"])
    aimed = pact_driver.targets(problem, config.losses, config.deadlines)
    return {"cases": {target: tuned(problem) for target, problem in aimed}}


def tuned(problem: pact.Problem) -> Record:
    """Plans the problem as it is, and with what each way of tuning leaves of it."""
    uncompressed = replace(problem, gradient_levels=problem.gradient_levels[:1])
    one_version = replace(problem, switches=())
    found, plans = {}, {}

    def plan(name: str, restricted: pact.Problem | None) -> None:
        if restricted is None:
            found[name], plans[name] = {"joules": None}, None
            return
        found[name], plans[name] = pact_driver.planned(restricted)
        if plans[name]:
            found[name] |= _used(problem, plans[name])

    plan("neither", replace(uncompressed, switches=()))
    plan("model only", uncompressed)
    plan("gradients only", one_version)
    first = plans["model only"]
    plan("model, then gradients", first and keeping_places(problem, first))
    first = plans["gradients only"]
    plan("gradients, then model", first and keeping_levels(problem, first))
    plan(JOINT, problem)
    return {
        "max_loss": problem.max_loss,
        "deadline_s": problem.deadline_s,
        "plans": found,
    }


def keeping_places(problem: pact.Problem, plan: pact.Plan) -> pact.Problem:
    """What is left of the problem where a plan's versions and clusters are fixed.

    How many epochs each gets is free: with compressed gradients the same number would
    miss the target.
    """
    used = {step.version for step in plan.steps} | {problem.start_version}
    kept = [i for i, v in enumerate(problem.versions) if v.name in used]
    places = {step.cluster for step in plan.steps} | {problem.start_cluster}
    take = lambda values: tuple(values[i] for i in kept)
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
        clusters=tuple(c for c in problem.clusters if c.name in places),
        gradient_levels=levels,
    )


def keeping_levels(problem: pact.Problem, plan: pact.Plan) -> pact.Problem:
    """What is left of the problem where only a plan's gradient levels may be used."""
    used = {step.level for step in plan.steps}
    levels = tuple(g for g in problem.gradient_levels if g.name in used)
    # A plan on single nodes used none.
    return replace(problem, gradient_levels=levels or problem.gradient_levels[:1])


def _used(problem: pact.Problem, plan: pact.Plan) -> Record:
    """Epochs in clusters of several nodes, by gradient level; and versions used."""
    several = {c.name for c in problem.clusters if len(c.members) > 1}
    levels = [s.level for s in plan.steps if s.cluster in several]
    return {
        "levels": {name: levels.count(name) for name in dict.fromkeys(levels)},
        "versions": len({s.version for s in plan.steps}),
    }


def text(problems: list[Record]) -> list[str]:
    """Paragraphs of the table's file."""
    found = _cases(problems)
    bounds = [
        p["joules"] / p["lower_bound_j"] - 1
        for p in (c["plans"][JOINT] for c in found)
        if p["joules"]
    ]
    parts = [
        "# PACT: versions and gradient levels together",
        f"{len(found)} cases (problem, target). Energy of each plan over that of the "
        "joint plan, where both exist. Model, then gradients: versions and clusters "
        "are those of the model-only plan, while levels and the numbers of epochs are "
        "planned anew. Gradients, then model: levels are those of the gradients-only "
        f"plan. Joint plans are {100 * np.mean(bounds):.2f} % above a proved lower "
        f"bound in the mean, {100 * max(bounds):.2f} % at most; all plans are those of "
        "the default solver.",
    ]
    matters = [
        c for c in found if any(r > 1.01 for name in _SINGLE for r in _over([c], name))
    ]
    parts += ["## All cases", report.markdown(_table(found))]
    parts += [
        f"## The {len(matters)} cases where compressed gradients gain anything",
        "Those where one of the plans without gradient levels is more than 1 % dearer.",
        report.markdown(_table(matters)) if matters else "None.",
    ]
    return parts


def _cases(problems: list[Record]) -> list[Record]:
    return [
        case | {"kind": p["kind"], "size": p["size"]}
        for p in problems
        for case in p["cases"].values()
    ]


def _table(found: list[Record]) -> list[list[str]]:
    table = [
        [
            "tuned",
            "feasible",
            "energy over joint, geometric mean",
            "median",
            "max",
            "more than 1 % dearer",
            "epochs with compressed gradients",
        ]
    ]
    for name in ROWS:
        plans = [c["plans"][name] for c in found]
        there = [p for p in plans if p["joules"]]
        row = [name, f"{len(there)}/{len(found)}"]
        over = _over(found, name)
        if over:
            mean = np.exp(np.mean(np.log(over)))
            row += [f"{mean:.3f}", f"{np.median(over):.3f}", f"{max(over):.3f}"]
            row += [str(sum(r > 1.01 for r in over))]
        else:
            row += [""] * 4
        epochs = sum(p["epochs"] for p in there)
        coded = sum(n for p in there for k, n in p["levels"].items() if k != "none")
        table.append([*row, f"{100 * coded / epochs:.0f} %" if epochs else ""])
    return table


def _over(found: list[Record], name: str) -> list[float]:
    """Energies over the joint plan's."""
    pairs = [(c["plans"][name]["joules"], c["plans"][JOINT]["joules"]) for c in found]
    return [a / b for a, b in pairs if a and b]


def _ratios(figure: Figure, problems: list[Record]) -> None:
    """Ratios of all cases, sorted, for each way to tune."""
    ax, found = figure.subplots(), _cases(problems)
    for name in ROWS[:-1]:
        over = sorted(_over(found, name))
        if over:
            share = np.arange(1, len(over) + 1) / len(found)
            ax.step(over, share, where="post", label=name)
    ax.set(xscale="log", xlabel="energy over that of the joint plan")
    ax.set(ylabel="share of cases at most so dear", ylim=(0, 1.02))
    ax.axvline(1, color="grey", linewidth=0.8)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


STUDY = pact_driver.Study("pact_joint", measure, text, {"pact_joint": _ratios})


if __name__ == "__main__":
    pact_driver.start(STUDY)
