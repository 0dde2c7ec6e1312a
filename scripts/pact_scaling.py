"""Time and proved gap of the default planner against the size of the problem.

    python scripts/pact_scaling.py --config=configs/pact_scaling.py    # records
    python scripts/pact_scaling.py --report                            # table, figure

A record for each problem; those that exist are not planned again.
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pact_driver
from matplotlib.figure import Figure
from pact_driver import Record, planned

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import pact, report  # noqa: E402
from gcjax.pact import graph, proof  # noqa: E402


def aimed(identity: Record, config) -> pact.Problem:
    """A problem with the study's one target."""
    problem = pact_driver.problem_of(identity)
    losses, deadlines = (config.loss,), (config.deadline,)
    ((_, found),) = pact_driver.targets(problem, losses, deadlines)
    return found


def measure(config, identity: Record) -> Record:
    """Plans twice, so that the second time nothing is compiled; and proves bounds."""
    problem = aimed(identity, config)
    planned(problem)
    found, plan = planned(problem)
    labels, _ = planned(problem, "labels", limit_s=config.labels_s)
    record = {
        "max_loss": problem.max_loss,
        "deadline_s": problem.deadline_s,
        "plans": {"bucket": found, "labels": labels},
        "switches": pact_driver.switches(problem, plan),
        "resolution": {},
        "bounds": {},
    }
    size = tuple(identity["size"])
    if size == tuple(config.batch_size) and identity["seed"] == config.batch_seeds[0]:
        record["batch"] = together(identity, config)
    if len(problem.clusters) > config.resolution_clusters:
        return record
    expanded = graph.build(problem)
    for bins in config.bound_bins:
        estimated = graph.estimate(expanded, bins)
        record["bounds"][bins] = proof.least_joules(expanded, estimated)
    for bins in config.bins:
        record["resolution"][bins] = pact_driver.at_bins(problem, bins)
    return record


def together(identity: Record, config) -> Record:
    """Plans of several seeds in one batch, and one by one, all once compiled."""
    problems = [aimed(identity | {"seed": s}, config) for s in config.batch_seeds]
    times, joules = {}, {}
    for name, plans in (
        ("batch", pact.plan_batch),
        ("single", lambda problems: [pact.plan(p) for p in problems]),
    ):
        plans(problems)  # compiles
        begun = time.process_time()
        joules[name] = [plan and plan.joules for plan in plans(problems)]
        times[name] = time.process_time() - begun
    return {"problems": len(problems), "cpu_s": times, "joules": joules}


def _gap(record: Record, joules: float) -> float:
    """Excess in per cent over the optimum, or over the best bound that was proved."""
    plans = record["plans"]
    proved = [*record["bounds"].values(), *(p["lower_bound_j"] for p in plans.values())]
    return 100 * (joules / max(proved) - 1)


def text(records: list[Record]) -> list[str]:
    """Paragraphs of the table's file."""
    return [
        "# PACT: time and gap of the default planner against size",
        "One target for each problem. Processor seconds of one core, once compiled. "
        "Gap: excess energy over the highest bound that was proved, which is the "
        "optimum where exact labels ended in time.",
        report.markdown(_by_size(records)),
        "## Each problem",
        report.markdown(_each(records)),
        "## Batches",
        "Problems of one kind, seed after seed, planned in one call of `plan_batch` "
        "and one by one, both once compiled.",
        report.markdown(_batches(records)),
        "## Resolution",
        "Plans at a fixed number of bins of progress (and a 64th of time), and the "
        "bound that is proved from an estimate on as many points of progress.",
        report.markdown(_resolutions(records)),
    ]


def _by_size(records: list[Record]) -> list[list[str]]:
    table = [
        [
            "versions x clusters x epochs",
            "problems",
            "optimum proved",
            "mean gap, %",
            "max",
            "median CPU s",
            "max",
        ]
    ]
    for size, same in _grouped(records):
        plans = [r["plans"]["bucket"] for r in same]
        gaps = [_gap(r, p["joules"]) for r, p in zip(same, plans, strict=True)]
        times = [p["cpu_s"] for p in plans]
        table.append(
            [
                pact_driver.size_of({"size": size}),
                str(len(same)),
                str(sum(_proved(r) for r in same)),
                f"{np.mean(gaps):.2f}",
                f"{max(gaps):.2f}",
                f"{np.median(times):.2f}",
                f"{max(times):.2f}",
            ]
        )
    return table


def _proved(record: Record) -> bool:
    return pact_driver.reference(record["plans"])[1]


def _grouped(records: list[Record]):
    key = lambda r: (np.prod(r["size"]), r["size"])
    for (_, size), same in itertools.groupby(sorted(records, key=key), key):
        yield size, list(same)


def _each(records: list[Record]) -> list[list[str]]:
    table = [
        [
            "versions x clusters x epochs",
            "kind",
            "seed",
            "epochs",
            "versions switched",
            "optimum proved",
            "gap, %",
            "CPU s",
            "labels",
        ]
    ]
    for r in itertools.chain(*(same for _, same in _grouped(records))):
        plan = r["plans"]["bucket"]
        table.append(
            [
                pact_driver.size_of(r),
                r["kind"],
                str(r["seed"]),
                str(plan["epochs"]),
                str(r["switches"]["at_start"] + r["switches"]["later"]),
                "yes" if _proved(r) else "no",
                f"{_gap(r, plan['joules']):.2f}",
                f"{plan['cpu_s']:.2f}",
                str(plan["labels"]),
            ]
        )
    return table


def _batches(records: list[Record]) -> list[list[str]]:
    table = [
        [
            "versions x clusters x epochs",
            "kind",
            "problems",
            "batch, CPU s",
            "one by one",
            "batch over one by one",
            "plans found",
            "energy over one by one, mean",
            "max",
        ]
    ]
    for r in (r for r in records if "batch" in r):
        batch, single = (r["batch"]["cpu_s"][k] for k in ("batch", "single"))
        joules = r["batch"]["joules"]
        pairs = zip(joules["batch"], joules["single"], strict=True)
        over = [a / b for a, b in pairs if a]
        table.append(
            [
                pact_driver.size_of(r),
                r["kind"],
                str(r["batch"]["problems"]),
                f"{batch:.2f}",
                f"{single:.2f}",
                f"{batch / single:.2f}",
                str(len(over)),
                f"{np.mean(over):.4f}",
                f"{max(over):.4f}",
            ]
        )
    return table


def _resolutions(records: list[Record]) -> list[list[str]]:
    bins = sorted({int(b) for r in records for b in (*r["resolution"], *r["bounds"])})
    table = [
        [
            "bins",
            "plans found",
            "mean gap, %",
            "max",
            "bound below the best, mean %",
            "max",
        ]
    ]
    for b in map(str, bins):
        found = [(r, r["resolution"][b]) for r in records if r["resolution"].get(b)]
        gaps = [_gap(r, joules) for r, joules in found]
        best = [
            100 * (1 - r["bounds"][b] / r["plans"]["bucket"]["joules"])
            for r in records
            if b in r["bounds"]
        ]
        table.append(
            [b, str(len(found)) if found else ""]
            + ([f"{np.mean(gaps):.2f}", f"{max(gaps):.2f}"] if gaps else ["", ""])
            + ([f"{np.mean(best):.2f}", f"{max(best):.2f}"] if best else ["", ""])
        )
    return table


def _draw(figure: Figure, records: list[Record]) -> None:
    """Time and gap against versions x clusters x epochs; gap against resolution."""
    figure.set_size_inches(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    for kind in dict.fromkeys(r["kind"] for r in records):
        same = [r for r in records if r["kind"] == kind]
        sizes = [np.prod(r["size"]) for r in same]
        plans = [r["plans"]["bucket"] for r in same]
        left.plot(sizes, [p["cpu_s"] for p in plans], "o", label=kind, alpha=0.7)
        gaps = [_gap(r, p["joules"]) for r, p in zip(same, plans, strict=True)]
        middle.plot(sizes, gaps, "o", alpha=0.7)
    size = "versions x clusters x epochs"
    left.set(xscale="log", yscale="log", xlabel=size, ylabel="CPU s, compiled")
    left.axhline(10, color="grey", linewidth=0.8)
    left.legend(fontsize="small")
    middle.set(xscale="log", xlabel=size, ylabel="proved gap, %")
    for part, label in (("resolution", "plan"), ("bounds", "proved bound")):
        points: dict[int, list[float]] = {}
        for r in records:
            for bins, joules in r[part].items():
                if joules:
                    best = r["plans"]["bucket"]["joules"]
                    gap = _gap(r, joules) if part == "resolution" else 1 - joules / best
                    points.setdefault(int(bins), []).append(
                        gap if part == "resolution" else 100 * gap
                    )
        at = sorted(points)
        right.plot(at, [np.mean(points[b]) for b in at], "o-", label=f"{label}, mean")
        right.plot(at, [max(points[b]) for b in at], "s--", label=f"{label}, max")
    right.set(xscale="log", xlabel="bins of progress", ylabel="gap, %")
    right.legend(fontsize="small")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)


STUDY = pact_driver.Study("pact_scaling", measure, text, {"pact_scaling": _draw})


if __name__ == "__main__":
    pact_driver.start(STUDY)
