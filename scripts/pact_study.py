"""Plans a family of synthetic problems with every solver and baseline.

    python scripts/pact_study.py --config=configs/pact_study.py    # records
    python scripts/pact_study.py --report                          # table and figures

A record for each problem and target; those that exist are not planned again.
"""

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

from gcjax import command, pact, results  # noqa: E402
from gcjax.pact import graph, planning  # noqa: E402

FOLDER = "bench_pact_study"
SOLVERS = ("bucket", "grid", "labels")


def targets(problem: pact.Problem, config) -> Iterator[tuple[str, pact.Problem]]:
    """The problem with each loss and deadline that the config asks for."""
    for loss in config.losses:
        eased = problem.with_target(max_loss=loss)
        found = graph.build(eased)
        bound = graph.estimate(found)
        plans = [
            pact.replay(eased, choices, found.tables)
            for choices in graph.rollouts(found, bound)
        ]
        fastest = min(plans, key=lambda p: p.seconds).seconds
        frugal = max(min(plans, key=lambda p: p.joules).seconds, 1.5 * fastest)
        for share in config.deadlines:
            deadline = fastest * (frugal / fastest) ** share
            name = f"loss{loss:g}-deadline{share:g}"
            yield name, eased.with_target(deadline_s=float(deadline))


def measure(problem: pact.Problem, config, errors: tuple[float, ...]) -> dict[str, Any]:
    """Plans with all solvers, rules and wrong predictors."""
    record: dict[str, Any] = {
        "max_loss": problem.max_loss,
        "deadline_s": problem.deadline_s,
        "max_epochs": problem.max_epochs,
        "plans": {},
    }
    for solver in SOLVERS:
        if solver == "grid" and len(problem.clusters) > config.grid_clusters:
            continue
        limit = config.labels_s if solver == "labels" else 60.0
        record["plans"][solver] = _planned(problem, solver, limit)
    # Again, with programs compiled: what a planner that runs for longer takes.
    begun = time.process_time()
    best = pact.plan(problem)
    record["plans"]["bucket"]["cpu_again_s"] = time.process_time() - begun
    record["steps"] = [list(step) for step in best.steps]
    record["lower_bound_j"] = max(
        pact.lower_bound(problem), record["plans"]["labels"].get("lower_bound_j", 0.0)
    )
    for bins in (64, 256, 1024, 4096):
        found = planning._bucket(graph.build(problem), (bins, 4))
        record.setdefault("resolution", {})[bins] = found.joules if found else None
    for name, rule in pact.BASELINES.items():
        begun = time.process_time()
        found = rule(problem)
        record["plans"][name] = _numbers(found, time.process_time() - begun)
    for relative in errors:
        record.setdefault("errors", {})[f"{relative:g}"] = _mistaken(problem, relative)
    return record


def _planned(problem: pact.Problem, solver: str, limit_s: float) -> dict[str, Any]:
    begun = time.process_time()
    try:
        found = pact.plan(problem, solver, limit_s=limit_s)
    except (pact.InfeasibleError, pact.NoneFoundError) as error:
        return {"joules": None, "why": str(error)}
    return _numbers(found, time.process_time() - begun)


def _numbers(found: pact.Plan | None, cpu_s: float) -> dict[str, Any]:
    if found is None:
        return {"joules": None, "cpu_s": cpu_s}
    return {
        "joules": found.joules,
        "seconds": found.seconds,
        "loss": found.loss,
        "epochs": len(found.steps),
        "switches": sum(
            a.version != b.version
            for a, b in zip(found.steps, found.steps[1:], strict=False)
        ),
        "cpu_s": cpu_s,
        "labels": found.labels,
        "lower_bound_j": found.lower_bound_j,
        "resolution": found.resolution,
    }


def _mistaken(problem: pact.Problem, relative: float) -> dict[str, Any]:
    """A plan made with a wrong predictor, replayed with the right one."""
    believed = pact.perturbed(problem, relative, seed=1)
    try:
        made = pact.plan(believed)
    except (pact.InfeasibleError, pact.NoneFoundError) as error:
        return {"joules": None, "why": str(error)}
    tables = pact.tabulate(problem)
    choices = choices_of(problem, tables, made)
    real = pact.replay(problem, choices, tables)
    return _numbers(real, 0.0) | {"meets_loss": real.loss <= problem.max_loss}


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
    for seed in config.seeds:
        for size in config.sizes:
            for kind in config.kinds:
                problem = pact.scenario(kind, *size, seed)
                name = "-".join([results.slug(kind), *map(str, size), f"s{seed}"])
                for target, aimed in targets(problem, config):
                    path = runs / FOLDER / f"{name}-{target}.json"
                    if path.exists():
                        continue
                    middle = config.deadlines[len(config.deadlines) // 2]
                    errors = config.errors if target.endswith(f"e{middle:g}") else ()
                    record = measure(aimed, config, errors)
                    record |= {"kind": kind, "size": list(size), "seed": seed}
                    results.write_json(record, path)
                    print(path.stem, record["plans"]["bucket"], flush=True)


def write_report(runs: Path, out: Path) -> list[Path]:
    """Writes tables/pact_study.md and figures/pact_study_*.png; returns paths."""
    paths = sorted((runs / FOLDER).glob("*.json"))
    if not paths:
        return []
    records = [json.loads(p.read_text()) for p in paths]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    table = out / "tables" / "pact_study.md"
    table.write_text(_table(records))
    written = [table]
    for name, draw, size in (
        ("resolution", _gaps, (6, 4)),
        ("plan", _gantt, (9, 5)),
        ("frontier", _frontier, (6, 4)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, records)
        written.append(out / "figures" / f"pact_study_{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _reference(record) -> tuple[float, bool]:
    """The least energy, and whether it is the optimum rather than a lower bound."""
    labels = record["plans"]["labels"]
    if labels["joules"] and labels["joules"] <= labels["lower_bound_j"] * (1 + 1e-6):
        return labels["joules"], True
    return record["lower_bound_j"], False


def _table(records: list[dict]) -> str:
    proved = [r for r in records if _reference(r)[1]]
    large = [r for r in records if r["size"][0] >= 4 and r["size"][1] >= 12]
    lines = [
        f"<!-- Generated by `python scripts/report.py` from {len(records)} records in "
        f"results/runs/{FOLDER}; do not edit. -->",
        "# PACT: solvers and baselines",
        "",
        f"{len(records)} cases (problem, target), {len(large)} of them with at least 4 "
        f"versions and 12 clusters. Excess is over the optimum in the {len(proved)} "
        "cases where exact labels proved it in time; elsewhere, in the last two "
        "columns, over the proved lower bound, so that the truth is lower. Times are "
        "processor seconds of one core, compilation included where it occurs.",
        "",
        "| solver or rule | feasible | mean excess | max excess | mean excess of the "
        "bound | max | median CPU s | max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (*SOLVERS, *pact.BASELINES):
        lines.append(_row(name, records))
    lines += ["", "## Time of bucket once compiled", ""]
    lines += ["| versions x clusters x max_epochs | cases | median CPU s | max |"]
    lines += ["|---|---|---|---|"]
    sizes = sorted({(*r["size"][:2], r["max_epochs"]) for r in records})
    for size in sizes:
        times = [
            r["plans"]["bucket"]["cpu_again_s"]
            for r in records
            if (*r["size"][:2], r["max_epochs"]) == size
        ]
        lines.append(
            f"| {size[0]} x {size[1]} x {size[2]} | {len(times)} | "
            f"{np.median(times):.2f} | {max(times):.2f} |"
        )
    lines += _mistakes(records)
    return "\n".join(lines) + "\n"


def _row(name: str, records: list[dict]) -> str:
    exact_, bounded, times, found = [], [], [], 0
    records = [r for r in records if name in r["plans"]]
    for r in records:
        plan = r["plans"][name]
        times.append(plan.get("cpu_s", np.nan))
        if plan["joules"] is None:
            continue
        found += 1
        least, proved = _reference(r)
        (exact_ if proved else bounded).append(plan["joules"] / least - 1)
    cells = [name, f"{found}/{len(records)}"]
    for gaps in (exact_, bounded):
        cells += [_percent(np.mean(gaps)), _percent(max(gaps))] if gaps else ["", ""]
    cells += [f"{np.nanmedian(times):.2f}", f"{np.nanmax(times):.2f}"]
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _mistakes(records: list[dict]) -> list[str]:
    chosen = [r for r in records if "errors" in r]
    if not chosen:
        return []
    lines = ["", "## Wrong predictors", ""]
    lines += [
        "Curves and jumps that are off by factors drawn from 1 +- the error; plans are "
        "replayed with the right ones. One seed of mistakes.",
        "",
        "| error | cases | planned | loss met | worst overshoot of the loss | mean "
        "energy against the right plan |",
        "|---|---|---|---|---|---|",
    ]
    for name in chosen[0]["errors"]:
        rows = [(r, r["errors"][name]) for r in chosen]
        planned = [(r, e) for r, e in rows if e["joules"] is not None]
        over = [e["loss"] / r["max_loss"] - 1 for r, e in planned]
        ratio = [e["joules"] / r["plans"]["bucket"]["joules"] for r, e in planned]
        lines.append(
            f"| {100 * float(name):g} % | {len(rows)} | {len(planned)} | "
            f"{sum(e['meets_loss'] for _, e in planned)} | {_percent(max(over))} | "
            f"{np.mean(ratio):.3f} |"
        )
    return lines


def _gaps(figure: Figure, records: list[dict]) -> None:
    ax = figure.subplots()
    gaps: dict[int, list[float]] = {}
    for r in records:
        least, proved = _reference(r)
        if not proved:
            continue
        for bins, joules in r["resolution"].items():
            if joules:
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


def _gantt(figure: Figure, records: list[dict]) -> None:
    """The plan with the most versions: clusters over time, and the loss."""
    steps = max(
        (r["steps"] for r in records),
        key=lambda s: (len({x[0] for x in s}) + len({x[1] for x in s}), -len(s)),
    )
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    clusters = [*dict.fromkeys(s[1] for s in steps)]
    versions = [*dict.fromkeys(s[0] for s in steps)]
    begun, drawn = 0.0, set()
    for version, cluster, _, _, _, seconds, _ in steps:
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
    below.plot([s[5] for s in steps], [s[4] for s in steps], ".-")
    below.set(xlabel="time, s", ylabel="predicted loss")
    below.grid(alpha=0.3)


def _frontier(figure: Figure, records: list[dict]) -> None:
    """Energy against the deadline, for each loss, of the first problem."""
    ax: Axes = figure.subplots()
    first = records[0]
    same = [r for r in records if all(r[k] == first[k] for k in ("kind", "size"))]
    for loss in sorted({r["max_loss"] for r in same}):
        rows = [r for r in same if r["max_loss"] == loss]
        rows = sorted((r["deadline_s"], r["plans"]["bucket"]["joules"]) for r in rows)
        ax.plot(*zip(*rows, strict=True), "o-", label=f"loss {loss:g}")
    ax.set(xlabel="deadline, s", ylabel="energy of the plan, J", xscale="log")
    ax.set_yscale("log")
    ax.set_title(f"{first['kind']}, {first['size']}", fontsize="medium")
    ax.grid(alpha=0.3)
    ax.legend()


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
