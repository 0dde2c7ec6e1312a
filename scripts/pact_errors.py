"""Plans made with wrong predictors, and what makes up for the error.

    python scripts/pact_errors.py --config=configs/pact_errors.py    # records
    python scripts/pact_errors.py --report                           # table and figure

A record for each problem, with all of its targets; those that exist are not planned
again.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pact_driver
from matplotlib.figure import Figure
from pact_driver import Record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import pact, report  # noqa: E402
from gcjax.pact import horizon  # noqa: E402

# In the order of the table.
REMEDIES = (
    "none",
    "loss target lowered",
    "margin from the error",
    "the same, stopped when met",
    "re-planned each epoch",
    "re-fitted and re-planned",
    "margin from the error, re-planned",
)
_PROOF_S = 1.0  # processor time to look for the fastest plan where none was found
_NOISE = 0.01  # relative, that re-fitting reckons with in a measured loss


def measure(config, identity: Record) -> Record:
    """All targets and errors of a problem; factors are drawn with its seed."""
    problem = pact_driver.problem_of(identity)
    record: Record = {"cases": {}}
    for target, real in pact_driver.targets(problem, config.losses, config.deadlines):
        found, best = pact_driver.planned(real)
        case = {"max_loss": real.max_loss, "deadline_s": real.deadline_s}
        case |= {"right": found, "wrong": []}
        for error in config.errors:
            believed = pact.perturbed(real, error, identity["seed"])
            done = remedied(real, believed, error, config.margin)
            case["wrong"] += [
                {"error": error, "remedy": name} | outcome(real, plan, best.joules)
                for name, plan in done.items()
            ]
        record["cases"][target] = case
    return record


def outcome(real: pact.Problem, done: pact.Plan | None, best_j: float) -> Record:
    """What became of the target, and at what price."""
    if done is None:
        return {"loss": None, "met": False}
    met = pact.feasible(real, done)
    return {"loss": done.loss, "met": met, "ratio": done.joules / best_j}


def remedied(
    real: pact.Problem, believed: pact.Problem, error: float, margin: float
) -> dict[str, pact.Plan | None]:
    """What is really done with each remedy; None where there was no plan to begin with.

    Args:
      real: The problem with the curves that training follows.
      believed: The same with those that plans are made with.
      error: That the predictor is known to have, relative.
      margin: By which the loss target is lowered, relative, in the second row.
    """
    lowered = believed.with_target(max_loss=believed.max_loss * (1 - margin))
    careful, withstood = pact.widest(believed, error, _PROOF_S)
    sure = pact.cautious(believed, withstood)
    noise = {v.name: _NOISE for v in real.versions}
    once = {
        "none": pact.attempt(believed, _PROOF_S),
        "loss target lowered": pact.attempt(lowered, _PROOF_S),
        "margin from the error": careful,
    }
    ahead = {
        "re-planned each epoch": lambda _: [believed],
        "re-fitted and re-planned": lambda seen: [
            horizon.refitted(believed, seen, noise),
            believed,
        ],
        "margin from the error, re-planned": lambda _: [sure, believed],
    }
    done = {
        name: plan and horizon.carried_out(real, plan) for name, plan in once.items()
    }
    done["the same, stopped when met"] = careful and pact.until_met(real, careful)
    for name, candidates in ahead.items():
        done[name] = pact.follow(real, candidates, _PROOF_S)[0]
    return done


def text(problems: list[Record]) -> list[str]:
    """Paragraphs of the table's file."""
    cases = [case for p in problems for case in p["cases"].values()]
    return [
        "# PACT: predictors that err",
        f"{len(cases)} cases (problem, target). Curves and jumps are off by factors "
        "drawn from 1 +- the error with the problem's seed, so that problems with the "
        "same seed share them. Plans are carried out with the right ones, in "
        "simulation. Deadlines are met always, as times do not depend on losses. "
        "Energy is over that of the default planner's plan with the right predictor; "
        "it can be below only where the loss is missed, or within the planner's own "
        "gap.",
        "Remedies: the loss target lowered by 5 %; a margin from the error, that is "
        "curves at the unfavourable end of what the error allows, or as near to it as "
        "the target leaves a plan; planning anew from the measured loss after every "
        "epoch, with the curves as they were, fitted again to what was seen, or with "
        "that margin. Stopped when met, and re-planned: training ends as soon as the "
        "loss is down at the target.",
        report.markdown(_table(cases)),
    ]


def _rows(cases: list[Record], error: float, remedy: str) -> list[Record]:
    wrong = [w | {"goal": c["max_loss"]} for c in cases for w in c["wrong"]]
    return [w for w in wrong if (w["error"], w["remedy"]) == (error, remedy)]


def _errors(cases: list[Record]) -> list[float]:
    return sorted({w["error"] for c in cases for w in c["wrong"]})


def _table(cases: list[Record]) -> list[list[str]]:
    table = [
        [
            "error",
            "remedy",
            "no plan",
            "target met",
            "worst overshoot of the loss",
            "excess energy, mean of those that met",
            "max",
            "mean of all",
        ]
    ]
    for error, remedy in itertools.product(_errors(cases), REMEDIES):
        rows = _rows(cases, error, remedy)
        made = [w for w in rows if w["loss"] is not None]
        met = [100 * (w["ratio"] - 1) for w in made if w["met"]]
        every = [100 * (w["ratio"] - 1) for w in made]
        over = max([0.0, *(100 * (w["loss"] / w["goal"] - 1) for w in made)])
        table.append(
            [
                f"{100 * error:g} %",
                remedy,
                str(len(rows) - len(made)),
                f"{len(met)}/{len(rows)} ({100 * len(met) / len(rows):.0f} %)",
                f"{over:.2f} %",
                f"{np.mean(met):.1f} %" if met else "",
                f"{max(met):.1f} %" if met else "",
                f"{np.mean(every):.1f} %" if every else "",
            ]
        )
    return table


def _draw(figure: Figure, problems: list[Record]) -> None:
    """How often the target is met, and what it costs, against the error."""
    figure.set_size_inches(10, 4)
    cases = [case for p in problems for case in p["cases"].values()]
    left, right = figure.subplots(1, 2)
    errors = _errors(cases)
    at = [100 * error for error in errors]
    for remedy in REMEDIES:
        rows = [_rows(cases, error, remedy) for error in errors]
        met = [100 * np.mean([w["met"] for w in same]) for same in rows]
        left.plot(at, met, "o-", label=remedy, alpha=0.8)
        made = [[w["ratio"] for w in same if w["loss"] is not None] for same in rows]
        excess = [100 * (np.mean(same) - 1) if same else np.nan for same in made]
        right.plot(at, excess, "o-", alpha=0.8)
    left.set(xlabel="error of the predictor, %", ylabel="target met, % of cases")
    right.set(xlabel="error of the predictor, %", ylabel="mean excess energy, %")
    left.legend(fontsize="x-small")
    for ax in (left, right):
        ax.grid(alpha=0.3)


STUDY = pact_driver.Study("pact_errors", measure, text, {"pact_errors": _draw})


if __name__ == "__main__":
    pact_driver.start(STUDY)
