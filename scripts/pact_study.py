"""Plans a family of synthetic problems with every solver and baseline.

    python scripts/pact_study.py --config=configs/pact_study.py    # records
    python scripts/pact_study.py --report                          # table and figures

A record for each problem, with all of its targets; those that exist are not planned
again.
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pact_driver
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pact_driver import Record, planned

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import pact, report  # noqa: E402
from gcjax.pact import outcomes  # noqa: E402

BINS = (64, 512, 4096)


def measure(config, identity: Record) -> Record:
    """All targets of a problem, with every solver and rule."""
    problem = pact_driver.problem_of(identity)
    record: Record = {"cases": {}}
    size, seed = tuple(identity["size"]), identity["seed"]
    deep = size == tuple(config.sizes[0]) and seed == config.deep_seed
    for target, aimed in pact_driver.targets(problem, config.losses, config.deadlines):
        case = planned_by_all(aimed, config)
        if deep:
            case["resolution"] = {b: pact_driver.at_bins(aimed, b) for b in BINS}
        record["cases"][target] = case
    if tuple(config.frontier) == (identity["kind"], *size, seed):
        record["frontier"] = _surface(problem, config)
    return record


def planned_by_all(problem: pact.Problem, config) -> Record:
    """Plans with every solver and all rules."""
    record: Record = {
        "max_loss": problem.max_loss,
        "deadline_s": problem.deadline_s,
        "plans": {},
    }
    for solver in config.solvers:
        limit = config.labels_s if solver == "labels" else 60.0
        limits = dict(limit_s=limit, limit_labels=config.limit_labels)
        record["plans"][solver], best = planned(problem, solver, **limits)
    # Again, with programs compiled: what a planner that runs for longer takes.
    begun = time.process_time()
    pact.plan(problem)
    record["plans"]["bucket"]["cpu_again_s"] = time.process_time() - begun
    record["switches"] = pact_driver.switches(problem, best)
    record["runs"] = runs_of(best)
    for name, rule in pact.BASELINES.items():
        begun = time.process_time()
        found = pact_driver.numbers(rule(problem))
        record["plans"][name] = found | {"cpu_s": time.process_time() - begun}
    return record


def runs_of(plan: pact.Plan) -> list[list]:
    """Equal epochs together: what, how many, and loss, seconds and joules after."""
    found = []
    for what, same in itertools.groupby(plan.steps, key=lambda s: s[:4]):
        group = list(same)
        found.append([*what, len(group), *group[-1][4:]])
    return found


def _surface(problem: pact.Problem, config) -> Record:
    """The frontier that one run of the bucket gives, thinned out."""
    begun = time.process_time()
    corner = [*pact_driver.targets(problem, (min(config.losses),), (1.0,))][0][1]
    losses, deadlines, joules = pact.frontier(corner, resolution=(64, 64))
    return {
        "cpu_s": time.process_time() - begun,
        "losses": losses[16::4].tolist(),
        "deadlines": deadlines[1::2].tolist(),
        "joules": joules[16::4, 1::2].tolist(),
    }


def _cases(problems: list[Record]) -> list[Record]:
    return [
        case | {k: p[k] for k in ("kind", "size", "seed")}
        for p in problems
        for case in p["cases"].values()
    ]


def text(problems: list[Record]) -> list[str]:
    """Paragraphs of the table's file."""
    cases = _cases(problems)
    proved = [c for c in cases if pact_driver.reference(c["plans"])[1]]
    large = [c for c in cases if c["size"][0] >= 4 and c["size"][1] >= 12]
    return [
        "# PACT: solvers and baselines",
        f"{len(cases)} cases (problem, target), {len(large)} of them with at least 4 "
        "versions and 12 clusters. Run: in how many of them; some solvers take long. "
        "Finished: found a plan or proved that there is none, and did not give up. "
        "Excess is energy above the optimum, in the "
        f"{len(proved)} cases where exact labels proved it in time; elsewhere, in the "
        "next two columns, above the proved lower bound, so that the truth is lower. "
        "Times are processor seconds of one core, with compilation, or its cache on "
        "disk, where it occurs.",
        report.markdown(_solvers(cases)),
        *_unfinished(cases),
        "## Bucket, seed by seed",
        report.markdown(_by_seed(proved)),
        "## Time of bucket once compiled",
        report.markdown(_times(cases)),
        "## Do plans switch versions?",
        "Best plans known, the optimum where it was proved. Compressed at the start: "
        "before the first epoch. Switched: between two epochs, at least once.",
        report.markdown(_switching(cases)),
    ]


def _solvers(cases: list[Record]) -> list[list[str]]:
    table = [
        [
            "solver or rule",
            "run",
            "finished",
            "feasible",
            "mean excess",
            "max",
            "mean excess over the bound",
            "max",
            "median CPU s",
            "max",
        ]
    ]
    names = [n for n in pact.SOLVERS if any(n in c["plans"] for c in cases)]
    return table + [_row(name, cases) for name in (*names, *pact.BASELINES)]


def _row(name: str, cases: list[Record]) -> list[str]:
    run = [c["plans"] for c in cases if name in c["plans"]]
    finished = [plans for plans in run if not plans[name].get("gave_up")]
    found = [plans for plans in finished if plans[name]["joules"] is not None]
    row = [name, f"{len(run)} of {len(cases)}", f"{len(finished)} of {len(run)}"]
    row.append(f"{len(found)}/{len(run)}")
    for proved in (True, False):
        gaps = [
            plans[name]["joules"] / pact_driver.reference(plans)[0] - 1
            for plans in found
            if pact_driver.reference(plans)[1] == proved
        ]
        row += [_percent(np.mean(gaps)), _percent(max(gaps))] if gaps else ["", ""]
    times = [plans[name]["cpu_s"] for plans in run]
    return row + [f"{np.median(times):.2f}", f"{max(times):.2f}"]


def _unfinished(cases: list[Record]) -> list[str]:
    """What the solvers that gave up said; and whose plan is not their own."""
    lines = []
    for case, name in itertools.product(cases, pact.SOLVERS):
        plan = case["plans"].get(name, {})
        where = f"{case['kind']}, {pact_driver.size_of(case)}, seed {case['seed']}, "
        where += f"loss {case['max_loss']:g} in {case['deadline_s']:.3g} s"
        if plan.get("gave_up"):
            lines.append(f"* {where}: {plan['why']}")
        elif plan.get("solver", name) not in (name, "bucket"):
            lines.append(f"* {where}: {name} found none, and fell back on the fastest")
    return ["## Gave up, or fell back", "\n".join(lines)] if lines else []


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _times(cases: list[Record]) -> list[list[str]]:
    table = [["versions x clusters x epochs", "cases", "median CPU s", "max"]]
    by_size = lambda c: c["size"]
    for size, same in itertools.groupby(sorted(cases, key=by_size), by_size):
        times = [c["plans"]["bucket"]["cpu_again_s"] for c in same]
        row = [pact_driver.size_of({"size": size}), str(len(times))]
        table.append([*row, f"{np.median(times):.2f}", f"{max(times):.2f}"])
    return table


def _by_seed(cases: list[Record]) -> list[list[str]]:
    table = [["versions x clusters x epochs", "seed", "proved", "mean excess", "max"]]
    key = lambda c: (c["size"], c["seed"])
    for (size, seed), same in itertools.groupby(sorted(cases, key=key), key):
        plans = [c["plans"] for c in same]
        gaps = [
            p["bucket"]["joules"] / pact_driver.reference(p)[0] - 1
            for p in plans
            if p["bucket"]["joules"]
        ]
        row = [pact_driver.size_of({"size": size}), str(seed), str(len(plans))]
        table.append([*row, _percent(np.mean(gaps)), _percent(max(gaps))])
    return table


def _switching(cases: list[Record]) -> list[list[str]]:
    table = [
        [
            "kind",
            "cases",
            "compressed at the start",
            "switched",
            "clusters in a plan, median",
        ]
    ]
    for kind in [*dict.fromkeys(c["kind"] for c in cases), "all"]:
        found = [c["switches"] for c in cases if kind in (c["kind"], "all")]
        table.append(
            [
                kind,
                str(len(found)),
                f"{sum(s['at_start'] for s in found)}",
                f"{sum(s['later'] > 0 for s in found)}",
                f"{np.median([s['clusters'] for s in found]):g}",
            ]
        )
    return table


def _gaps(figure: Figure, problems: list[Record]) -> None:
    ax = figure.subplots()
    gaps: dict[int, list[float]] = {}
    for case in _cases(problems):
        least, proved = pact_driver.reference(case["plans"])
        for bins, joules in case.get("resolution", {}).items():
            if proved and joules:
                gaps.setdefault(int(bins), []).append(100 * (joules / least - 1))
    bins = sorted(gaps)
    ax.plot(bins, [np.mean(gaps[b]) for b in bins], "o-", label="mean")
    ax.plot(bins, [np.max(gaps[b]) for b in bins], "s--", label="max")
    for b in bins:
        ax.annotate(f"{len(gaps[b])} found", (b, np.max(gaps[b])), fontsize=7)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="bins of progress, 64 times those of time")
    ax.set(ylabel="excess energy over the optimum, %")
    ax.set_title("bucket at a fixed resolution", fontsize="medium")
    ax.grid(alpha=0.3)
    ax.legend()


def _gantt(figure: Figure, problems: list[Record]) -> None:
    """The plan with the most versions and clusters over time, and the loss."""
    case = max(
        _cases(problems),
        key=lambda c: c["switches"]["later"] + c["switches"]["clusters"],
    )
    # Records hold what was decided; the rest follows from the problem's seed.
    problem = pact_driver.problem_of(case).with_target(
        max_loss=case["max_loss"], deadline_s=case["deadline_s"]
    )
    steps = [pact.Step(*run[:4], *run[5:]) for run in case["runs"]]
    outcomes.draw_plan(figure, problem, steps)
    figure.suptitle(
        f"{case['kind']}, {pact_driver.size_of(case)}, loss "
        f"{case['max_loss']:g} in {case['deadline_s']:.3g} s",
        fontsize="medium",
    )


def _frontier(figure: Figure, problems: list[Record]) -> None:
    """Energy against deadline and loss from one run, and separate plans as dots."""
    ax: Axes = figure.subplots()
    problem = next((p for p in problems if "frontier" in p), None)
    if problem is None:
        return
    surface = problem["frontier"]
    joules = np.array(surface["joules"], float)
    for row, loss in list(enumerate(surface["losses"]))[::2]:
        finite = np.isfinite(joules[row])
        at = np.array(surface["deadlines"])[finite]
        ax.step(at, joules[row][finite], where="post", label=f"loss {loss:.2f}")
    for case in problem["cases"].values():
        if case["max_loss"] == min(c["max_loss"] for c in problem["cases"].values()):
            joules = case["plans"]["bucket"]["joules"]
            ax.plot(case["deadline_s"], joules, "k.", zorder=3)
    ax.set(xlabel="deadline, s", ylabel="least energy found, J", xscale="log")
    ax.set_yscale("log")
    size = pact_driver.size_of(problem)
    ax.set_title(
        f"{problem['kind']}, {size}: one run; dots: plans of their own for the "
        "lowest loss",
        fontsize="small",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


STUDY = pact_driver.Study(
    "pact_study",
    measure,
    text,
    {
        "pact_study_resolution": _gaps,
        "pact_study_plan": _gantt,
        "pact_study_frontier": _frontier,
    },
)


if __name__ == "__main__":
    pact_driver.start(STUDY)
