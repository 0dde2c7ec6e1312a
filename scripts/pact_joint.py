"""Versions and gradient levels planned together, and each without the other.

    python scripts/pact_joint.py --config=configs/pact_joint.py    # records
    python scripts/pact_joint.py --report                          # table and figure

A record for each problem, with all of its targets; those that exist are not planned
again.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pact_driver
from matplotlib.figure import Figure
from pact_driver import Record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import pact, report  # noqa: E402
from gcjax.pact import joint  # noqa: E402
from gcjax.pact.joint import JOINT, WAYS  # noqa: E402

_SINGLE = ("model only", "model, then gradients")
_LABELS_S = 120.0  # processor time for the proof of an optimum


def measure(config, identity: Record) -> Record:
    """All targets of a problem."""
    problem = pact_driver.problem_of(identity)
    problem = pact.with_gradient_levels(problem, identity["seed"])
    aimed = pact_driver.targets(problem, config.losses, config.deadlines)
    return {"cases": {target: tuned(problem) for target, problem in aimed}}


def tuned(problem: pact.Problem) -> Record:
    """Plans the problem as it is, and with what each way of tuning leaves of it."""
    limits = dict(limit_s=_LABELS_S)
    found, plans = {}, {}
    for way in WAYS:
        left = joint.restricted(problem, way, plans.get)
        found[way], plans[way] = {"joules": None}, None
        if left:
            found[way], plans[way] = pact_driver.planned(left, "labels", **limits)
        if plan := plans[way]:
            found[way] |= {
                "levels": joint.levels_used(problem, plan),
                "versions": len({s.version for s in plan.steps}),
            }
    return {
        "max_loss": problem.max_loss,
        "deadline_s": problem.deadline_s,
        "plans": found,
    }


def text(problems: list[Record]) -> list[str]:
    """Paragraphs of the table's file."""
    found = _cases(problems)
    parts = [
        "# PACT: versions and gradient levels together",
        f"{len(found)} cases (problem, target). Energy of each plan over that of the "
        "joint plan, where both exist. Model, then gradients: versions and clusters "
        "are those of the model-only plan, while levels and the numbers of epochs are "
        "planned anew. Gradients, then model: levels are those of the gradients-only "
        f"plan. {proofs(found)}",
    ]
    matters = [
        c for c in found if any(r > 1.01 for name in _SINGLE for r in ratios([c], name))
    ]
    parts += ["## All cases", report.markdown(compared(found))]
    parts += [
        f"## The {len(matters)} cases where compressed gradients gain anything",
        "Those where one of the plans without gradient levels is more than 1 % dearer.",
        report.markdown(compared(matters)) if matters else "None.",
    ]
    return parts


def proofs(found: list[Record]) -> str:
    """How many of the plans are optima, of what each way leaves of the problem."""
    plans = [p for c in found for p in c["plans"].values()]
    made = [p for p in plans if p["joules"]]
    proved = sum(p["joules"] <= p["lower_bound_j"] * (1 + 1e-6) for p in made)
    unsettled = sum(p.get("gave_up", False) for p in plans)
    text = (
        f"All plans are those of exact labels: {proved} of {len(made)} are proved to "
    )
    text += "be optimal."
    if unsettled:
        text += f" For {unsettled} more it is open whether a plan exists."
    return text


def _cases(problems: list[Record]) -> list[Record]:
    return [
        case | {"kind": p["kind"], "size": p["size"]}
        for p in problems
        for case in p["cases"].values()
    ]


def compared(found: list[Record]) -> list[list[str]]:
    """A table of ways to plan over many cases, each as `tuned` makes it."""
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
    for name in WAYS:
        plans = [c["plans"][name] for c in found]
        there = [p for p in plans if p["joules"]]
        row = [name, f"{len(there)}/{len(found)}"]
        over = ratios(found, name)
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


def ratios(found: Iterable[Record], name: str) -> list[float]:
    """Energies over the joint plan's."""
    pairs = [(c["plans"][name]["joules"], c["plans"][JOINT]["joules"]) for c in found]
    return [a / b for a, b in pairs if a and b]


def _ratios(figure: Figure, problems: list[Record]) -> None:
    """Ratios of all cases, sorted, for each way to tune."""
    ax, found = figure.subplots(), _cases(problems)
    for name in WAYS[:-1]:
        over = sorted(ratios(found, name))
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
