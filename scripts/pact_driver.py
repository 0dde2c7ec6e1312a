"""What the studies of plans share: problems and targets, records, reports, flags.

A study plans a family of synthetic problems, given by the `kinds`, `sizes` and `seeds`
of its config, and makes a record of each; those that exist are not made again. Tables
and figures come from the records alone.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, pact, results  # noqa: E402
from gcjax.pact import graph  # noqa: E402

Record = dict[str, Any]


class Study(NamedTuple):
    """A study, as its script describes it."""

    name: str  # of its config, its table and, where they begin, its figures
    measure: Callable[[ConfigDict, Record], Record]  # from a problem's identity
    text: Callable[[list[Record]], list[str]]  # paragraphs of the table's file
    figures: dict[str, Callable[[Figure, list[Record]], None]]  # by file name

    @property
    def folder(self) -> str:
        """Of the records."""
        return f"bench_{self.name}"


def identities(config: ConfigDict) -> Iterator[Record]:
    """Kind, size and seed of each problem; every size has its own seeds."""
    for size, seeds in zip(config.sizes, config.seeds, strict=True):
        for seed, kind in itertools.product(seeds, config.kinds):
            yield {"kind": kind, "size": list(size), "seed": seed}


def problem_of(identity: Record) -> pact.Problem:
    """The problem with a loose target."""
    return pact.scenario(identity["kind"], *identity["size"], identity["seed"])


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


def planned(
    problem: pact.Problem, solver: str = "bucket", at=None, **limits
) -> tuple[Record, pact.Plan | None]:
    """What is recorded of a plan, and the plan."""
    begun, why = time.process_time(), {}
    try:
        found = pact.plan(problem, solver, at, **limits)
    except (pact.InfeasibleError, pact.NoneFoundError) as error:
        found = None
        why = {"why": str(error), "gave_up": isinstance(error, pact.NoneFoundError)}
    return numbers(found) | why | {"cpu_s": time.process_time() - begun}, found


def at_bins(problem: pact.Problem, bins: int) -> float | None:
    """Joules of bucket's plan at so many bins of progress, and a 64th of time."""
    return planned(problem, at=(bins, max(bins // 64, 1)), limit_s=60.0)[0]["joules"]


def numbers(found: pact.Plan | None) -> Record:
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
        "solver": found.solver,
    }


def switches(problem: pact.Problem, plan: pact.Plan) -> Record:
    """Whether the model is compressed before the first epoch, and how often later."""
    trained = [step.version for step in plan.steps]
    return {
        "at_start": trained[0] != problem.start_version,
        "later": sum(a != b for a, b in itertools.pairwise(trained)),
        "clusters": len({step.cluster for step in plan.steps}),
    }


def reference(plans: dict[str, Record]) -> tuple[float, bool]:
    """The least energy, and whether it is the optimum rather than a lower bound."""
    labels = plans["labels"]
    if labels["joules"] and labels["joules"] <= labels["lower_bound_j"] * (1 + 1e-6):
        return labels["joules"], True
    return max(p.get("lower_bound_j", 0.0) for p in plans.values()), False


def size_of(record: Record) -> str:
    """The size in words."""
    return " x ".join(map(str, record["size"]))


def run(study: Study, config: ConfigDict, runs: Path) -> None:
    """Makes the records that are missing."""
    for identity in identities(config):
        parts = results.slug(identity["kind"]), *map(str, identity["size"])
        name = "-".join([*parts, f"s{identity['seed']}"])
        path = runs / study.folder / f"{name}.json"
        if path.exists():
            continue
        begun = time.process_time()
        record = results.provenance() | identity
        record |= study.measure(config, identity)
        record["cpu_seconds"] = time.process_time() - begun
        results.write_json(record, path)
        print(f"{path}: {record['cpu_seconds']:.0f} CPU s", flush=True)


def write_report(study: Study, runs: Path, out: Path) -> list[Path]:
    """Writes the table's file and the figures of a study; returns paths."""
    paths = sorted((runs / study.folder).glob("*.json"))
    if not paths:
        return []
    records = [json.loads(p.read_text()) for p in paths]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    first = (
        f"<!-- Generated by `python scripts/report.py` from {len(records)} records in "
        f"results/runs/{study.folder}; do not edit. -->"
    )
    table = out / "tables" / f"{study.name}.md"
    table.write_text(
        "\n\n".join([first, *study.text(records), made_on(records)]) + "\n"
    )
    written = [table]
    for name, draw in study.figures.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        draw(figure, records)
        written.append(out / "figures" / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def made_on(records: list[Record]) -> str:
    """Devices and commits, as far as records tell."""
    told = [r for r in records if "git" in r]
    parts = []
    if told:
        devices = ", ".join(sorted({r["device"] for r in told}))
        commits = ", ".join(sorted({str(r["git"]["commit"]) for r in told}))
        parts.append(f"Made on {devices}; commits {commits}.")
        again = {r["bucket_git"]["commit"] for r in told if "bucket_git" in r}
        if again:
            parts.append(f"Bucket was measured again: commit {', '.join(again)}.")
    if len(told) < len(records):
        parts.append(
            f"{len(records) - len(told)} of {len(records)} records are older and do "
            "not tell."
        )
    return " ".join(parts)


def start(study: Study) -> None:
    """The command line of a study."""
    config = config_flags.DEFINE_config_file(
        "config", f"configs/{study.name}.py", "The family of problems."
    )
    flags.DEFINE_string("out", "results", "Folder of results.")
    flags.DEFINE_bool("report", False, "Only write table and figures from records.")

    def main() -> None:
        out = Path(flags.FLAGS.out)
        if not flags.FLAGS.report:
            run(study, config.value, out / "runs")
        for path in write_report(study, out / "runs", out):
            print(path)

    command.run(main)
