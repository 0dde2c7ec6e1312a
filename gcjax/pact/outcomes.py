"""Tables and figures of profiles and of plans that were carried out.

All from their records alone: a profile from `gcjax.pact.profiling`, runs from
`gcjax.pact.execution`.
"""

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from gcjax import report
from gcjax.pact.joint import JOINT
from gcjax.pact.predictor import Exponential, Jump, PowerLaw, next_loss
from gcjax.pact.problem import Problem
from gcjax.pact.profiling import prediction_errors, version_name
from gcjax.pact.schedule import Step

Record = dict[str, Any]
PROFILES = "bench_pact_profile"
# Points ahead at which predictions are judged; None is the last point of a run.
_AHEAD = (1, 5, None)
_CURVES = {"power": PowerLaw, "exponential": Exponential}


def write_report(runs: Path, out: Path) -> list[Path]:
    """Writes tables and figures of all profiles and carried-out plans.

    Args:
      runs: Folder of records, one folder for each experiment.
      out: Folder of tables/ and figures/.

    Returns:
      Paths of what was written.
    """
    written = []
    for path in sorted((runs / PROFILES).glob("*.json")):
        name, record = f"{path.stem}_profile", json.loads(path.read_text())
        written.append(_write(out / "tables" / f"{name}.md", profile_table(record)))
        written.append(_draw(out / "figures" / f"{name}.png", profile_figure(record)))
    for folder in sorted(p for p in runs.glob("bench_pact_*") if p.is_dir()):
        records = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
        records = [r for r in records if "epochs" in r]
        if not records:
            continue
        records.sort(key=lambda r: (_order(r), r["seed"]))
        name = folder.name.removeprefix("bench_")
        text = table(folder.name, records)
        written.append(_write(out / "tables" / f"{name}.md", text))
        for label, group in itertools.groupby(records, key=lambda r: r["label"]):
            first = next((r for r in group if r["epochs"]), None)
            if first and first["method"] in ("plan", JOINT):
                path = out / "figures" / f"{name}_{label.replace(' ', '_')}.png"
                written.append(_draw(path, gantt(first)))
    return written


def _order(record: Record) -> tuple:
    kind = record["method"] != "plan", record["replan"], record["margin"] > 0
    return *kind, record["label"]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _draw(path: Path, figure: Figure) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def summary(records: Iterable[Record]) -> str:
    """Runs in a few lines each, for the terminal."""
    return "\n".join(_told(record) for record in records)


def _told(record: Record) -> str:
    final, planned = record["final"], record["final"]["planned"]
    if planned is None:
        return f"{record['label']}, seed {record['seed']}: no plan meets the target"
    lines = [f"{record['label']}, seed {record['seed']}:"]
    for (version, cluster), group in itertools.groupby(
        record["epochs"], key=lambda e: (e["version"], e["cluster"])
    ):
        epochs = list(group)
        lines.append(
            f"  {len(epochs):>2} epochs  {version:>5} on {cluster}, to loss "
            f"{epochs[-1]['loss']:.4f} at {epochs[-1]['seconds']:.1f} s, "
            f"{epochs[-1]['joules']:.0f} J"
        )
    for what, found in (("planned", planned), ("realised", final)):
        lines.append(
            f"  {what}: loss {found['loss']:.4f}, {found['seconds']:.1f} s, "
            f"{found['joules']:.0f} J, {found['epochs']} epochs"
        )
    target = f"{final['max_loss']:g} within {final['deadline_s']:g} s"
    lines.append(f"  target {target}: {'met' if final['met_in_time'] else 'missed'}")
    return "\n".join(lines)


# --- Plans that were carried out. -----------------------------------------------------


def table(experiment: str, records: list[Record]) -> str:
    """What was planned, and what became of it, in Markdown."""
    first = records[0]
    devices = ", ".join(sorted({r["device"] for r in records}))
    commits = ", ".join(sorted({str(r["git"]["commit"]) for r in records}))
    rows = [
        ["method", "seed", "target", "loss", "planned", "aimed at", "s", "planned"]
        + ["J", "planned", "epochs", "planned", "J when first met", "fall-backs"]
    ]
    rows += [_row(record) for record in records]
    means = [
        [
            "method",
            "met",
            "at the end",
            "J",
            "J / planned J",
            "s / planned s",
            "loss - planned",
        ]
    ]
    means[0] += ["median error of the next loss", "J when first met"]
    for _, group in itertools.groupby(records, key=lambda r: r["label"]):
        means.append(_means(list(group)))
    config = first["config"]
    parts = [
        f"<!-- Generated by `python scripts/report.py` from {len(records)} records in "
        f"results/runs/{experiment}; do not edit. -->",
        f"# {experiment.removeprefix('bench_')}: plans that were carried out",
        f"`{config['task']}`, `{config['split']}`; target loss "
        f"{first['final']['max_loss']:g} on held-out samples within "
        f"{first['final']['deadline_s']:g} s. Training, FLOPs and bits are real; the "
        f"nodes' rates and energies are made up. Made on {devices}; commits {commits}.",
        "## Every run",
        report.markdown(rows),
        "Planned: what the first plan, made before any training, promises for the end; "
        f"aimed at: the loss that it was made for.{_margins(records)} "
        "Without re-planning the whole plan is carried out; with it training stops as "
        "soon as the target is met, which noise of the loss makes a little easier. "
        "Target: whether the measured loss came down to it in time, after any epoch, "
        "and whether it is there at the end. Fall-backs: epochs before which no plan "
        "was found any more.",
        "## Over seeds",
        report.markdown(means),
        "Means over runs that had a plan. The next loss is predicted from the one "
        "measured before, or without re-planning by the plan, from its own prediction.",
    ]
    return "\n\n".join(parts) + "\n"


def _margins(records: list[Record]) -> str:
    """What the margins of a table's runs are."""
    found = {(r["config"]["margin"], r["margin"]) for r in records if r["margin"]}
    return "".join(
        f" A margin is {count:g} x the deviation of the profile's late losses, "
        f"{100 * share:.1f} % of the target, or what of it leaves a plan."
        for count, share in sorted(found)
    )


def _row(record: Record) -> list[str]:
    final, planned = record["final"], record["final"]["planned"]
    start = [record["label"], str(record["seed"])]
    if planned is None:
        return [*start, "no plan", *["-"] * 11]
    met = final["first_met"]
    return [
        *start,
        _became(final),
        *(f"{x['loss']:.4f}" for x in (final, planned)),
        f"{final['aimed_loss']:.4f}",
        *(f"{x['seconds']:.1f}" for x in (final, planned)),
        *(f"{x['joules']:.0f}" for x in (final, planned)),
        *(str(x["epochs"]) for x in (final, planned)),
        f"{met['joules']:.0f}" if met else "-",
        str(sum(e["how"] == "fall-back" for e in record["epochs"])),
    ]


def _became(final: Record) -> str:
    """Whether the target was met, and kept until the end."""
    if not final["met_in_time"]:
        return "missed"
    return "met" if final["loss"] <= final["max_loss"] else "met, then lost"


def _means(records: list[Record]) -> list[str]:
    label, count = records[0]["label"], len(records)
    done = [r for r in records if r["final"]["planned"]]
    if not done:
        return [label, *[f"0 of {count}"] * 2, *["-"] * 6]
    mean = lambda of: statistics.fmean(
        of(r["final"], r["final"]["planned"]) for r in done
    )
    met = [r["final"]["first_met"]["joules"] for r in done if r["final"]["first_met"]]
    errors = [abs(e["predicted_loss"] - e["loss"]) for r in done for e in r["epochs"]]
    return [
        label,
        f"{sum(r['final']['met_in_time'] for r in done)} of {count}",
        f"{sum(_became(r['final']) == 'met' for r in done)} of {count}",
        f"{mean(lambda f, p: f['joules']):.0f}",
        f"{mean(lambda f, p: f['joules'] / p['joules']):.3f}",
        f"{mean(lambda f, p: f['seconds'] / p['seconds']):.3f}",
        f"{mean(lambda f, p: f['loss'] - p['loss']):+.4f}",
        f"{statistics.median(errors):.4f}",
        f"{statistics.fmean(met):.0f} ({len(met)} runs)" if met else "-",
    ]


def gantt(record: Record) -> Figure:
    """Nodes over time, coloured by version, and the loss below."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    nodes = [node["name"] for node in record["config"]["nodes"]]
    versions = [version_name(share) for share in record["config"]["shares"]]
    members = {c["name"]: c["members"] for c in record["config"]["clusters"]}
    epochs = [
        (e["version"], members[e["cluster"]], e["seconds"]) for e in record["epochs"]
    ]
    draw_epochs(top, nodes, versions, epochs)
    top.set_title(f"{record['label']}, seed {record['seed']}", fontsize="medium")
    start = [(0.0, record["start_loss"])]
    planned = start + [(step[5], step[4]) for step in record["plan"]]
    below.plot(*zip(*planned, strict=True), "--", color="grey", label="first plan")
    if record["replan"]:
        ahead = [(e["seconds"], e["predicted_loss"]) for e in record["epochs"]]
        below.plot(*zip(*ahead, strict=True), "x", color="C3", label="one epoch ahead")
    real = start + [(e["seconds"], e["loss"]) for e in record["epochs"]]
    below.plot(*zip(*real, strict=True), ".-", color="black", label="measured")
    final = record["final"]
    below.axhline(final["max_loss"], color="C2", linewidth=0.8, label="target")
    below.axvline(final["deadline_s"], color="C3", linewidth=0.8, label="deadline")
    below.set(xlabel="time on the modelled nodes, s", ylabel="held-out loss")
    # The start of training, and what a switch leaves at once, are off the scale.
    below.set_ylim(top=1.1 * max(e["loss"] for e in record["epochs"]))
    below.grid(alpha=0.3)
    below.legend(fontsize="small")
    return figure


def draw_epochs(
    axes: Axes,
    rows: list[str],
    versions: list[str],
    epochs: Iterable[tuple[str, Iterable[str], float]],
) -> None:
    """Draws who trains when: bars over time, coloured by version.

    Args:
      axes: To draw on.
      rows: What trains, from top to bottom.
      versions: Whose colours are taken in turn.
      epochs: Version, the rows that train it, and the time of its end; in order.
    """
    begun, drawn = 0.0, set()
    for version, busy, seconds in epochs:
        for row in busy:
            axes.barh(
                rows.index(row),
                seconds - begun,
                left=begun,
                color=f"C{versions.index(version)}",
                edgecolor="white",
                linewidth=0.5,
                label=None if version in drawn else version,
            )
            drawn.add(version)
        begun = seconds
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.legend(title="version", fontsize="small")


def draw_plan(figure: Figure, problem: Problem, steps: Sequence[Step]) -> None:
    """Draws a plan: nodes over time, coloured by version, and the loss below.

    Args:
      figure: To draw on.
      problem: What was planned.
      steps: Of the plan, or of every run of equal epochs the last one.
    """
    figure.set_size_inches(9, 5)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    members = {c.name: c.members for c in problem.clusters}
    used = {node for step in steps for node in members[step.cluster]}
    # Runs of equal epochs are one bar.
    same = itertools.groupby(steps, key=lambda s: (s.version, s.cluster))
    draw_epochs(
        top,
        [node.name for node in problem.nodes if node.name in used],
        [version.name for version in problem.versions],
        [(v, members[c], [*run][-1].seconds) for (v, c), run in same],
    )
    at = [(0.0, problem.start_loss)] + [(step.seconds, step.loss) for step in steps]
    below.plot(*zip(*at, strict=True), ".-", color="black")
    below.axhline(problem.max_loss, color="C2", linewidth=0.8, label="target")
    below.axvline(problem.deadline_s, color="C3", linewidth=0.8, label="deadline")
    below.set(xlabel="time, s", ylabel="predicted loss")
    below.grid(alpha=0.3)
    below.legend(fontsize="small")


# --- Profiles. ------------------------------------------------------------------------


def _curve(version: Record) -> PowerLaw | Exponential:
    fields = dict(version["curve"])
    return _CURVES[fields.pop("kind")](**fields)


def profile_table(record: Record) -> str:
    """What was measured, and how well it predicts runs that were not fitted to."""
    curves = {v["name"]: _curve(v) for v in record["versions"]}
    costs = [["version", "parameters", "FLOP / sample", "kB", "training MB"]]
    costs[0] += ["floor", "exponent or rate", "residual", "late"]
    for v in record["versions"]:
        shape = v["curve"].get("exponent", v["curve"].get("rate"))
        costs.append(
            [
                v["name"],
                f"{v['parameters']:,}",
                f"{v['flops_per_sample']:.3g}",
                f"{v['parameter_bytes'] / 1e3:.1f}",
                f"{v['training_bytes'] / 1e6:.2f}",
                f"{v['curve']['floor']:.3f}",
                f"{shape:.3g}",
                f"{v['residual']:.4f}",
                f"{v['late_residual']:.4f}",
            ]
        )
    errors = [["version", "seeds", "final losses", "final accuracy"]]
    ahead = ["last point" if n is None else f"{n} ahead" for n in _AHEAD]
    errors[0] += [f"{a}: median (max)" for a in ahead]
    for name, curve in curves.items():
        errors += _predicted(record, name, curve)
    jumps = [["switch", "loss before", "at once", "effective", "fitted"]]
    for s in record["switches"]:
        jump = Jump(**s["jump"])
        for values in zip(s["before"], s["at_once"], s["effective"], strict=True):
            line = [f"{s['source']} to {s['target']}"]
            after = float(jump.after(values[0]))
            jumps.append(line + [f"{x:.4f}" for x in (*values, after)])
    exchanges = [["cluster or level", *curves, "up", "down"]]
    for x in (*record["clusters"], *record["gradient_levels"]):
        both = zip(x["efficiency"], x["error"], strict=True)
        line = [
            x["name"],
            *(f"{share:.3f} ± {float(error):.3f}" for share, error in both),
        ]
        for sent in ("up_fraction", "down_fraction"):
            line.append(", ".join(f"{v:.4f}" for v in x.get(sent, ())) or "-")
        exchanges.append(line)
    seeds = record["config"]["profile_seeds"], record["config"]["test_seeds"]
    fitted, unseen = (", ".join(map(str, each)) for each in seeds)
    parts = [
        "<!-- Generated by `python scripts/report.py` from a record in results/runs/"
        f"{PROFILES}; do not edit. -->",
        f"# Profile of {record['experiment'].removeprefix('bench_')}",
        f"`{record['config']['task']}`, compressor `{record['config']['compressor']}`; "
        f"made on {record['device']}, commit {record['git']['commit']}, in "
        f"{record['wall_seconds']:.0f} s. The loss is that of held-out samples. Fitted "
        f"to seeds {fitted}; runs with {unseen} are only predicted.",
        "## Versions",
        report.markdown(costs),
        "FLOPs of a training step as XLA counts them; memory of a compiled step. "
        "Residual: root mean square of log(fitted loss / measured loss) at "
        "all points of the runs that were fitted to; late: at the later half.",
        "## Predictions",
        report.markdown(errors),
        "Absolute error of the loss that is predicted from a measured one, so many "
        "points of the (geometric) series of samples ahead, over all of the runs.",
        "## Switches",
        report.markdown(jumps),
        "At once: without training. Effective: from where the target's curve leads to "
        "the loss that was measured after some training; the jump is fitted to that.",
        "## Clusters and gradients",
        report.markdown(exchanges),
        "Of each version: effective samples per sample, at most 1, with the standard "
        "error; of levels relative to uncompressed gradients. Where a cluster cannot "
        "hold a version the next smaller one's stands. Up, down: bits sent per bit of "
        "the model, for each version.",
    ]
    return "\n\n".join(parts) + "\n"


def _predicted(record: Record, version: str, curve: PowerLaw | Exponential):
    """Rows of a table: how well one version's runs are predicted."""
    for name in ("profile_seeds", "test_seeds"):
        seeds = record["config"][name]
        mine = [r for r in record["runs"] if r["version"] == version]
        mine = [r for r in mine if r["seed"] in seeds]
        if not mine:
            continue
        losses = ", ".join(f"{run['losses'][-1]:.4f}" for run in mine)
        accuracy = 100 * np.mean([run["accuracy"][-1] for run in mine])
        what = "fitted" if name == "profile_seeds" else "unseen"
        line = [version, f"{', '.join(map(str, seeds))} ({what})", losses]
        line.append(f"{accuracy:.2f} %")
        for points in _AHEAD:
            off = [
                prediction_errors(curve, run["samples"], run["losses"], points)
                for run in mine
            ]
            off = np.abs(np.concatenate(off))
            line.append(f"{np.median(off):.4f} ({off.max():.4f})")
        yield line


def profile_figure(record: Record) -> Figure:
    """Measured losses and the fitted curves; and jumps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, record)
    for i, s in enumerate(record["switches"]):
        jump = Jump(**s["jump"])
        at = np.linspace(min(s["before"]), record["top_loss"], 200)
        name = f"{s['source']} to {s['target']}"
        right.plot(at, jump.after(at) - at, color=f"C{i}", label=name)
        before = np.array(s["before"])
        rise = np.array([s["at_once"], s["effective"]]) - before
        right.plot(before, rise[1], "o", color=f"C{i}")
        right.plot(before, rise[0], "x", color=f"C{i}", alpha=0.5)
    right.set(xlabel="loss before the switch", ylabel="rise of the loss")
    right.set_title("jumps: at once (x), effective (o), fitted", fontsize="medium")
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    return figure


def _losses(axes: Axes, record: Record) -> None:
    curves = {v["name"]: _curve(v) for v in record["versions"]}
    fitted = record["config"]["profile_seeds"]
    for run in record["runs"]:
        colour = f"C{[*curves].index(run['version'])}"
        x, y = np.array(run["samples"], float), run["losses"]
        if run["seed"] in fitted:
            label = run["version"] if run["seed"] == fitted[0] else None
            axes.plot(x, y, "o", color=colour, markersize=4, label=label)
            continue
        axes.plot(x, y, "o", color=colour, markerfacecolor="none")
        at = np.geomspace(x[0], x[-1], 200)
        later = [float(next_loss(curves[run["version"]], y[0], n - x[0])) for n in at]
        axes.plot(at, later, "-", color=colour, linewidth=0.8)
    axes.set(xscale="log", xlabel="samples", ylabel="held-out loss")
    axes.xaxis.set_minor_formatter(NullFormatter())
    title = "filled: fitted to; others, and what is predicted of them"
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(title="version", fontsize="small")
