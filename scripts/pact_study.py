"""Plans a family of synthetic problems with every solver and baseline.

    python scripts/pact_study.py --config=configs/pact_study.py    # records
    python scripts/pact_study.py --report                          # table and figures

A record for each problem, with all of its targets; those that exist are not planned
again.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, pact, report, results  # noqa: E402
from gcjax.pact import graph  # noqa: E402

FOLDER = "bench_pact_study"
SOLVERS = ("bucket", "grid", "cost_scaled", "labels")
BINS = (64, 512, 4096)


def targets(
    problem: pact.Problem, losses: tuple[float, ...], deadlines: tuple[float, ...]
) -> Iterator[tuple[str, pact.Problem]]:
    """The problem with each loss and deadline.

    Args:
      problem: Whose deadline is loose.
      losses: Targets.
      deadlines: In the logarithm between the time of the fastest of a few plans (0)
        and that of the most frugal one (1), which takes 1.5 times as long at least.
    """
    for loss in losses:
        eased = problem.with_target(max_loss=loss)
        found = graph.build(eased)
        plans = [
            pact.replay(eased, choices, found.tables)
            for choices in graph.rollouts(found, graph.estimate(found))
        ]
        fastest = min(plans, key=lambda p: p.seconds).seconds
        frugal = max(min(plans, key=lambda p: p.joules).seconds, 1.5 * fastest)
        for share in deadlines:
            deadline = fastest * (frugal / fastest) ** share
            name = f"loss {loss:g}, deadline {share:g}"
            yield name, eased.with_target(deadline_s=float(deadline))


def measure(problem: pact.Problem, config, slow: tuple[str, ...]) -> dict[str, Any]:
    """Plans with bucket, labels, all rules and the slow solvers that are named."""
    record: dict[str, Any] = {
        "max_loss": problem.max_loss,
        "deadline_s": problem.deadline_s,
        "plans": {},
    }
    for solver in SOLVERS:
        if solver in ("bucket", "labels", *slow):
            limit = config.labels_s if solver == "labels" else 60.0
            record["plans"][solver], best = planned(problem, solver, limit)
    # Again, with programs compiled: what a planner that runs for longer takes.
    begun = time.process_time()
    pact.plan(problem)
    record["plans"]["bucket"]["cpu_again_s"] = time.process_time() - begun
    record["switches"] = switches(problem, best)
    record["runs"] = runs_of(best)
    for name, rule in pact.BASELINES.items():
        begun = time.process_time()
        found = rule(problem)
        record["plans"][name] = numbers(found) | {"cpu_s": time.process_time() - begun}
    return record


def planned(
    problem: pact.Problem, solver: str = "bucket", limit_s: float = 60.0, at=None
) -> tuple[dict[str, Any], pact.Plan | None]:
    """What is recorded of a plan, and the plan."""
    begun = time.process_time()
    try:
        found = pact.plan(problem, solver, at, limit_s=limit_s)
    except (pact.InfeasibleError, pact.NoneFoundError) as error:
        found, why = None, {"why": str(error)}
    else:
        why = {}
    return numbers(found) | why | {"cpu_s": time.process_time() - begun}, found


def numbers(found: pact.Plan | None) -> dict[str, Any]:
    """What is recorded of a plan."""
    if found is None:
        return {"joules": None}
    return {
        "joules": found.joules,
        "seconds": found.seconds,
        "loss": found.loss,
        "epochs": len(found.steps),
        "labels": found.labels,
        "lower_bound_j": found.lower_bound_j,
    }


def switches(problem: pact.Problem, plan: pact.Plan) -> dict[str, Any]:
    """Whether the model is compressed before the first epoch, and how often later."""
    trained = [step.version for step in plan.steps]
    return {
        "at_start": trained[0] != problem.start_version,
        "later": sum(a != b for a, b in itertools.pairwise(trained)),
        "clusters": len({step.cluster for step in plan.steps}),
    }


def runs_of(plan: pact.Plan) -> list[list]:
    """Equal epochs together: what, how many, and loss, seconds and joules after."""
    found = []
    for what, same in itertools.groupby(plan.steps, key=lambda s: s[:4]):
        group = list(same)
        found.append([*what, len(group), *group[-1][4:]])
    return found


def mistaken(problem: pact.Problem, config, best_j: float) -> list[dict[str, Any]]:
    """Plans made with wrong predictors for tightened targets, and what they lead to."""
    tables, found = pact.tabulate(problem), []
    cases = itertools.product(config.errors, config.margins, config.error_seeds)
    for error, margin, seed in cases:
        if not error and seed != config.error_seeds[0]:
            continue
        believed = pact.perturbed(problem, error, seed)
        tightened = believed.with_target(max_loss=problem.max_loss * (1 - margin))
        case = {"error": error, "margin": margin, "seed": seed, "loss": None}
        _, made = planned(tightened)
        if made is not None:
            choices = choices_of(problem, tables, made)
            real = pact.replay(problem, choices, tables)
            case |= {"loss": real.loss, "ratio": real.joules / best_j}
        found.append(case)
    return found


def choices_of(problem, tables, plan: pact.Plan) -> list[tuple[int, int]]:
    """Versions and actions of a plan's steps."""
    versions = [v.name for v in problem.versions]
    clusters = [c.name for c in problem.clusters]
    names = [g.name for g in problem.gradient_levels] or ["none"]
    found = []
    for step in plan.steps:
        same = tables.destination == clusters.index(step.cluster)
        same &= tables.fraction == step.fraction
        if step.level in names:
            same &= tables.level == names.index(step.level)
        found.append((versions.index(step.version), int(np.flatnonzero(same)[0])))
    return found


def run(config, runs: Path) -> None:
    """Writes the records that are missing."""
    named = zip(config.sizes, config.seeds, strict=True)
    sized = [(size, seed) for size, seeds in named for seed in seeds]
    for (size, seed), kind in itertools.product(sized, config.kinds):
        name = "-".join([results.slug(kind), *map(str, size), f"s{seed}"])
        path = runs / FOLDER / f"{name}.json"
        if path.exists():
            continue
        problem = pact.scenario(kind, *size, seed)
        record = {"kind": kind, "size": list(size), "seed": seed, "cases": {}}
        for target, aimed in targets(problem, config.losses, config.deadlines):
            deep = size == config.sizes[0] and seed == config.deep_seed
            first = deep and not record["cases"]
            case = measure(aimed, config, config.slow_solvers if first else ())
            if deep:
                case["resolution"] = {
                    bins: planned(aimed, at=(bins, 4))[0]["joules"] for bins in BINS
                }
            if deep and target.endswith(f" {config.deadlines[0]:g}"):
                best_j = case["plans"]["labels"]["joules"]
                case["mistaken"] = mistaken(aimed, config, best_j)
            record["cases"][target] = case
            print(name, target, case["plans"]["bucket"], case["switches"], flush=True)
        if tuple(config.frontier) == (kind, *size, seed):
            record["frontier"] = _surface(problem, config)
        results.write_json(record, path)


def _surface(problem: pact.Problem, config) -> dict[str, Any]:
    """The frontier that one run of the bucket gives, thinned out."""
    begun = time.process_time()
    corner = [*targets(problem, (min(config.losses),), (1.0,))][0][1]
    losses, deadlines, joules = pact.frontier(corner, resolution=(64, 64))
    return {
        "cpu_s": time.process_time() - begun,
        "losses": losses[16::4].tolist(),
        "deadlines": deadlines[1::2].tolist(),
        "joules": joules[16::4, 1::2].tolist(),
    }


def write_report(runs: Path, out: Path) -> list[Path]:
    """Writes tables/pact_study.md and figures/pact_study_*.png; returns paths."""
    paths = sorted((runs / FOLDER).glob("*.json"))
    if not paths:
        return []
    problems = [json.loads(p.read_text()) for p in paths]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    table = out / "tables" / "pact_study.md"
    table.write_text(_report(problems))
    written = [table]
    for name, draw, size in (
        ("resolution", _gaps, (6, 4)),
        ("plan", _gantt, (9, 5)),
        ("frontier", _frontier, (6, 4)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, problems)
        written.append(out / "figures" / f"pact_study_{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _cases(problems: list[dict]) -> list[dict]:
    return [
        case | {k: p[k] for k in ("kind", "size", "seed")}
        for p in problems
        for case in p["cases"].values()
    ]


def reference(plans: dict[str, dict]) -> tuple[float, bool]:
    """The least energy, and whether it is the optimum rather than a lower bound."""
    labels = plans["labels"]
    if labels["joules"] and labels["joules"] <= labels["lower_bound_j"] * (1 + 1e-6):
        return labels["joules"], True
    return max(p.get("lower_bound_j", 0.0) for p in plans.values()), False


def _report(problems: list[dict]) -> str:
    cases = _cases(problems)
    proved = [c for c in cases if reference(c["plans"])[1]]
    large = [c for c in cases if c["size"][0] >= 4 and c["size"][1] >= 12]
    solved = [
        [
            "solver or rule",
            "feasible",
            "mean excess",
            "max",
            "mean excess over the bound",
            "max",
            "median CPU s",
            "max",
        ]
    ]
    solved += [
        _row(name, cases)
        for name in (*SOLVERS, *pact.BASELINES)
        if any(name in c["plans"] for c in cases)
    ]
    parts = [
        f"<!-- Generated by `python scripts/report.py` from {len(problems)} records in "
        f"results/runs/{FOLDER}; do not edit. -->",
        "# PACT: solvers and baselines",
        f"{len(cases)} cases (problem, target), {len(large)} of them with at least 4 "
        "versions and 12 clusters. Excess is energy above the optimum, in the "
        f"{len(proved)} cases where exact labels proved it in time; elsewhere, in the "
        "next two columns, above the proved lower bound, so that the truth is lower. "
        "Times are processor seconds of one core, with compilation, or its cache on "
        "disk, where it occurs.",
        report.markdown(solved),
        "## Time of bucket once compiled",
        report.markdown(_times(cases)),
        "## Do plans switch versions?",
        "Best plans known, the optimum where it was proved. Compressed at the start: "
        "before the first epoch. Switched: between two epochs, at least once.",
        report.markdown(_switching(cases)),
        "## Wrong predictors",
        "Curves and jumps off by factors drawn from 1 +- the error, plans for a loss "
        "target lowered by the margin, replayed with the right curves. Deadlines are "
        "met always, as times do not depend on losses. Energy is over that of the best "
        "plan with the right predictor; below 1 where the loss is missed.",
        report.markdown(_mistakes(cases)),
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, cases: list[dict]) -> list[str]:
    cases = [c["plans"] for c in cases if name in c["plans"]]
    found = [plans for plans in cases if plans[name]["joules"] is not None]
    row = [name, f"{len(found)}/{len(cases)}"]
    for proved in (True, False):
        gaps = [
            plans[name]["joules"] / reference(plans)[0] - 1
            for plans in found
            if reference(plans)[1] == proved
        ]
        row += [_percent(np.mean(gaps)), _percent(max(gaps))] if gaps else ["", ""]
    times = [plans[name]["cpu_s"] for plans in cases]
    return row + [f"{np.median(times):.2f}", f"{max(times):.2f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _times(cases: list[dict]) -> list[list[str]]:
    table = [["versions x clusters x epochs", "cases", "median CPU s", "max"]]
    by_size = lambda c: c["size"]
    for size, same in itertools.groupby(sorted(cases, key=by_size), by_size):
        times = [c["plans"]["bucket"]["cpu_again_s"] for c in same]
        row = [" x ".join(map(str, size)), str(len(times))]
        table.append([*row, f"{np.median(times):.2f}", f"{max(times):.2f}"])
    return table


def _switching(cases: list[dict]) -> list[list[str]]:
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


def _mistakes(cases: list[dict]) -> list[list[str]]:
    table = [
        [
            "error",
            "margin",
            "plans",
            "planned",
            "loss met",
            "worst overshoot of the loss",
            "mean energy, those that met",
            "all",
        ]
    ]
    rows = [(c["max_loss"], m) for c in cases for m in c.get("mistaken", [])]
    key = lambda row: (row[1]["error"], row[1]["margin"])
    for (error, margin), same in itertools.groupby(sorted(rows, key=key), key):
        same = list(same)
        made = [(loss, m) for loss, m in same if m["loss"] is not None]
        met = [m["ratio"] for loss, m in made if m["loss"] <= loss * (1 + 1e-8)]
        over = max([0.0, *(m["loss"] / loss - 1 for loss, m in made)])
        table.append(
            [
                f"{100 * error:g} %",
                f"{100 * margin:g} %",
                str(len(same)),
                str(len(made)),
                f"{len(met)} ({100 * len(met) / len(same):.0f} %)",
                _percent(over),
                f"{np.mean(met):.3f}" if met else "",
                f"{np.mean([m['ratio'] for _, m in made]):.3f}" if made else "",
            ]
        )
    return table


def _gaps(figure: Figure, problems: list[dict]) -> None:
    ax = figure.subplots()
    gaps: dict[int, list[float]] = {}
    for case in _cases(problems):
        least, proved = reference(case["plans"])
        for bins, joules in case.get("resolution", {}).items():
            if proved and joules:
                gaps.setdefault(int(bins), []).append(100 * (joules / least - 1))
    bins = sorted(gaps)
    ax.plot(bins, [np.mean(gaps[b]) for b in bins], "o-", label="mean")
    ax.plot(bins, [np.max(gaps[b]) for b in bins], "s--", label="max")
    for b in bins:
        ax.annotate(f"{len(gaps[b])} found", (b, np.max(gaps[b])), fontsize=7)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="bins of progress", ylabel="excess energy over the optimum, %")
    ax.set_title("bucket at a fixed resolution", fontsize="medium")
    ax.grid(alpha=0.3)
    ax.legend()


def _gantt(figure: Figure, problems: list[dict]) -> None:
    """The plan with the most versions and clusters over time, and the loss."""
    case = max(
        _cases(problems),
        key=lambda c: c["switches"]["later"] + c["switches"]["clusters"],
    )
    runs = case["runs"]
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    clusters = [*dict.fromkeys(r[1] for r in runs)]
    versions = [*dict.fromkeys(r[0] for r in runs)]
    begun, drawn = 0.0, set()
    for version, cluster, _, _, _, _, seconds, _ in runs:
        label = version if version not in drawn else None
        drawn.add(version)
        top.barh(
            clusters.index(cluster),
            seconds - begun,
            left=begun,
            color=f"C{versions.index(version)}",
            edgecolor="white",
            linewidth=0.3,
            label=label,
        )
        begun = seconds
    top.set_yticks(range(len(clusters)), clusters)
    top.legend(title="version", fontsize="small")
    top.set_title(
        f"{case['kind']}, {' x '.join(map(str, case['size']))}, loss "
        f"{case['max_loss']:g} in {case['deadline_s']:.3g} s",
        fontsize="medium",
    )
    below.plot([r[6] for r in runs], [r[5] for r in runs], ".-")
    below.set(xlabel="time, s", ylabel="predicted loss")
    below.grid(alpha=0.3)


def _frontier(figure: Figure, problems: list[dict]) -> None:
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
    size = " x ".join(map(str, problem["size"]))
    ax.set_title(
        f"{problem['kind']}, {size}: one run; dots: plans of their own for the "
        "lowest loss",
        fontsize="small",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def main() -> None:
    """Measures what is missing, and writes table and figures."""
    out = Path(flags.FLAGS.out)
    if not flags.FLAGS.report:
        run(CONFIG.value, out / "runs")
    for path in write_report(out / "runs", out):
        print(path)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", "configs/pact_study.py", "The family of problems."
    )
    flags.DEFINE_string("out", "results", "Folder of results.")
    flags.DEFINE_bool("report", False, "Only write table and figures from records.")
    command.run(main)
