"""Versions and gradient levels planned together, with efficiencies that were measured.

    python scripts/pact_joint_measured.py                # records, from a profile
    python scripts/pact_joint_measured.py --report       # table and figure

The problem is that of configs/pact_fashion_joint.py with its profile; nothing is
trained.
A record for each rate of the links, with all targets; those that exist are not planned
again.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pact_driver
import pact_joint
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags
from pact_driver import Record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, pact, report, results  # noqa: E402
from gcjax.pact import profiling  # noqa: E402
from gcjax.pact.joint import JOINT, WAYS  # noqa: E402


def problems(config: ConfigDict) -> Iterator[tuple[float, pact.Problem]]:
    """Factors of the links' rates, and problems whose deadline is still to be set."""
    profile = results.read(Path(config.profile))
    whole = [
        r for r in profile["runs"] if r["version"] == profile["versions"][0]["name"]
    ]
    start = float(np.mean([run["first_loss"] for run in whole]))
    histograms = np.array(profile["histograms"])
    problem = profiling.problem(config, profile, histograms, start)
    problem = problem.with_target(deadline_s=1e6)
    for rate in config.link_rates:
        links = (replace(x, bits_per_s=rate * x.bits_per_s) for x in problem.links)
        yield rate, replace(problem, links=tuple(links))


def targets(config: ConfigDict, problem: pact.Problem) -> Iterator[tuple]:
    """The problem with each loss and deadline, and what to call it."""
    for _, fastest in pact_driver.targets(problem, config.losses, (0.0,)):
        for times in config.deadlines:
            aimed = fastest.with_target(deadline_s=times * fastest.deadline_s)
            yield f"loss {aimed.max_loss:g}, deadline {times:g}", aimed


def run(config: ConfigDict, runs: Path) -> None:
    """Makes the records that are missing."""
    for rate, problem in problems(config):
        path = runs / STUDY.folder / f"rate_{rate:g}.json"
        if path.exists():
            continue
        begun = time.process_time()
        record = results.provenance() | {"rate": rate, "profile": config.profile}
        record["cases"] = {
            what: pact_joint.tuned(aimed) for what, aimed in targets(config, problem)
        }
        record["cpu_seconds"] = time.process_time() - begun
        results.write_json(record, path)
        print(f"{path}: {record['cpu_seconds']:.0f} CPU s", flush=True)


def text(records: list[Record]) -> list[str]:
    """Paragraphs of the table's file."""
    table = [
        ["links' rate", "target loss", "deadline, s", *WAYS, "levels of joint plan"]
    ]
    for record in sorted(records, key=lambda r: -r["rate"]):
        for case in record["cases"].values():
            line = [f"{record['rate']:g}", f"{case['max_loss']:g}"]
            line.append(f"{case['deadline_s']:.1f}")
            for way in WAYS:
                joules = case["plans"][way]["joules"]
                line.append(f"{joules:.1f}" if joules else "no plan")
            table.append([*line, _levels(case["plans"][JOINT])])
    cases = [case for record in records for case in record["cases"].values()]
    return [
        "# PACT: versions and gradient levels together, measured efficiencies",
        "Joules of each plan. Curves, jumps, efficiencies and bits are those of "
        f"`{records[0]['profile']}`; nothing was trained for this table. Model, then "
        "gradients: versions and clusters are those of the model-only plan, while "
        "levels and the numbers of epochs are planned anew. Gradients, then model: "
        "levels are those of the gradients-only plan. Deadlines are multiples of a "
        f"fast plan's time. {pact_joint.proofs(cases)}",
        report.markdown(table),
        "## Over all cases",
        report.markdown(pact_joint.compared(cases)),
    ]


def _levels(plan: Record) -> str:
    """Epochs at each level, in words."""
    if not plan["joules"]:
        return "-"
    used = dict(plan["levels"])
    alone = plan["epochs"] - sum(used.values())
    used |= {"alone": alone} if alone else {}
    return ", ".join(f"{count} x {name}" for name, count in used.items())


def _energies(figure: Figure, records: list[Record]) -> None:
    """Energy over the joint plan's against the links' rate, for each way."""
    ax = figure.subplots()
    for i, way in enumerate(WAYS[:-1]):
        for record in records:
            over = pact_joint.ratios(record["cases"].values(), way)
            at = [record["rate"] * (1 + 0.06 * (i - 2))] * len(over)
            label = way if record is records[0] else None
            ax.plot(at, over, "o", color=f"C{i}", markersize=4, label=label)
    ax.set(xscale="log", yscale="log", xlabel="factor of the links' rates")
    ax.set(ylabel="energy over that of the joint plan")
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


STUDY = pact_driver.Study(
    "pact_joint_measured", run, text, {"pact_joint_measured": _energies}
)


def main() -> None:
    """Plans what is missing, and writes table and figure."""
    out = Path(flags.FLAGS.out)
    if not flags.FLAGS.report:
        run(CONFIG.value, out / "runs")
    for path in pact_driver.write_report(STUDY, out / "runs", out):
        print(path)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", "configs/pact_fashion_joint.py", "The problem."
    )
    flags.DEFINE_string("out", "results", "Folder of results.")
    flags.DEFINE_bool("report", False, "Only write table and figure from records.")
    command.run(main)
