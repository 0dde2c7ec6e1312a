"""Tables and figures from the records of runs; nothing in them is typed by hand.

A *family* is a compressor with its exchange (top_k, power_sgd, ...), a *row* a list of
the records that differ in nothing but their seed; runs that an experiment asks for and
nobody has done are records of status "not run". Runs are compared in pairs: same seed
and batches, different only in how gradients travel.
"""

import ast
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from gcjax import results

Record = dict[str, Any]
Row = list[Record]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Fields of a config that say where and how long, or that a table shows anyway.
_SHOWN = ("experiment", "seed", "methods", "aggregator", "data_dir", "resume")
_SHOWN += ("log_every", "checkpoint_every")
# Okabe and Ito's colours, which the colour-blind can tell apart; dense is black.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_UNITS = dict(top_k="density", random_k="density", qsgd="bits", power_sgd="rank")
_RATIOS = ("compression_ratio", "compression_ratio_bf16")


def family(record: Record) -> str:
    """The compressor's family, "" for dense."""
    return "" if record["method"] == "dense" else record["label"].split(" ")[0]


def quality(record: Record) -> float:
    """The final test metric, an accuracy in percent."""
    value = float(record["final"][record["metric"]])
    return 100 * value if record["metric"] == "accuracy" else value


def total_bits(record: Record) -> float:
    """All bits that one worker sent."""
    return record["final"]["total_bits"]


def after_warmup(record: Record) -> tuple[int, float]:
    """Steps, and bits sent in them, from the log's first line after the warm-up."""
    warmup, final = record["config"]["warmup_steps"], record["final"]
    log = zip(record["series"]["step"], record["series"]["total_bits"], strict=True)
    end = final["steps"], final["total_bits"]
    after = (line for line in log if line[0] >= warmup)
    step, bits = next(after, end) if warmup else (0, 0)
    return end[0] - step, end[1] - bits


_BITS = (total_bits, lambda record: after_warmup(record)[1])


def ratio_after_warmup(record: Record) -> float | None:
    """Compression ratio against dense float32 after the warm-up."""
    final, (steps, bits) = record["final"], after_warmup(record)
    dense = final["compression_ratio"] * final["bits_per_step"]
    return dense * steps / bits if bits else None


def partner(record: Record, records: Iterable[Record], kind: str) -> Record | None:
    """The finished run with the same seed that another one is compared with.

    That is dense training or, for the kind "uniform", the run of the same family whose
    level is the default of the record's method.
    """
    for other in records:
        if other["status"] != "done" or other["seed"] != record["seed"]:
            continue
        same = other["method"] == "dense"
        if kind == "uniform":
            same = (
                other["method"].startswith("uniform(")
                and other["config"]["aggregator"] == record["config"]["aggregator"]
                and _default(other["method"]) == _default(record["method"])
            )
        # How often levels are selected matters to neither of the baselines.
        if same and not _changed(record, other["config"], ("every",)):
            return other
    return None


def gain(record: Record, records: Iterable[Record], bits: Callable) -> float | None:
    """How many times more bits uniform sends than a run with the same seed."""
    base = partner(record, records, "uniform") if family(record) else None
    own, other = bits(record), base and bits(base)
    return other / own if own and other else None


def _default(method: str) -> Any:
    """The default level in a selector's call string, None if it has none."""
    call = ast.parse(method, mode="eval").body
    values = [k.value for k in call.keywords if k.arg == "default"] + call.args
    return ast.literal_eval(values[0]) if values else None


def _changed(record: Record, config: dict, ignored: tuple = ()) -> dict[str, Any]:
    """Fields of a record's config that another config has with another value."""
    ignored += _SHOWN + ("every",) * (record["method"] == "dense")
    fields = record["config"].items()
    return {k: v for k, v in fields if k not in ignored and config.get(k, v) != v}


def load_config_file(path: Path) -> ModuleType:
    """Imports a config file."""
    root = str(path.resolve().parents[1])
    if root not in sys.path:  # configs import each other as `configs.base`
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep_runs(
    config: ml_collections.ConfigDict, module: ModuleType
) -> list[tuple[ml_collections.ConfigDict, str]]:
    """Expands an experiment to its runs: a config and a method each.

    The `sweep(add)` of the config file calls `add(**overrides)` once for each run;
    without a `sweep` there is one run for each of the config's methods.

    Raises:
      ValueError: for a run with several methods.
      KeyError: for an override of a field that does not exist.
    """
    runs = []

    def add(**overrides: Any) -> None:
        one = ml_collections.ConfigDict(config).lock()
        one.update(overrides)
        if len(one.methods) != 1:
            raise ValueError(f"sweep: one method in each run, got {one.methods}")
        runs.append((one, one.methods[0]))

    every_method = lambda add: [add(methods=(m,)) for m in config.methods]
    getattr(module, "sweep", every_method)(add)
    return runs


def rows(records: list[Record], config_file: Path) -> tuple[list[Row], dict]:
    """Rows, the experiment's first and in its order; and its config, {} without one."""
    asked, common = [], {}
    if config_file.exists():
        module = load_config_file(config_file)
        config = module.get_config()
        common = json.loads(config.to_json())
        for one, method in sweep_runs(config, module):
            blank = {"status": "not run", "method": method, "seed": one.seed}
            blank |= {"label": results.label(one, method), "final": {}, "series": {}}
            asked.append(blank | {"config": json.loads(one.to_json())})
    # Of two records of one run, the finished one stays.
    order = lambda r: (r["label"], r["status"] == "done")
    found: list[Row] = []
    for record in asked + sorted(records, key=order):
        row = next((row for row in found if _same_row(row[0], record)), [])
        if not row:
            found.append(row)
        others = [r for r in row if r["seed"] != record["seed"]]
        row[:] = sorted([*others, record], key=lambda r: r["seed"])
    return found, common


def _same_row(a: Record, b: Record) -> bool:
    # Not by the configs' hashes: a field that configs get later changes them all.
    if a["label"] != b["label"] or _changed(a, b["config"]):
        return False
    return not family(a) or a["config"]["aggregator"] == b["config"]["aggregator"]


def _done(row: Row) -> list[Record]:
    return [r for r in row if r["status"] == "done"]


def human_bits(bits: float) -> str:
    """Bits with a decimal prefix, three digits."""
    units = ["bit", "kbit", "Mbit", "Gbit", "Tbit"]
    while bits >= 999.5 and len(units) > 1:
        bits, units = bits / 1000, units[1:]
    return f"{bits:#.3g}".rstrip(".") + " " + units[0]


def _times(values: list[float | None]) -> str:
    """The mean of ratios, "-" where there are none."""
    known = [v for v in values if v is not None]
    return f"{statistics.fmean(known):.2f}x" if known else "-"


def _spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _metric(records: list[Record]) -> str:
    name = next((r["metric"] for r in records if "metric" in r), "metric")
    return "test accuracy, %" if name == "accuracy" else f"test {name}"


def _outcome(record: Record) -> str:
    return f"{quality(record):.2f}" if record["status"] == "done" else record["status"]


def _ending(record: Record) -> str:
    steps, error = record["final"].get("steps"), record.get("error")
    text = f"{record['label']}, seed {record['seed']}: {record['status']}"
    text += f" after {steps} steps" if steps else ""
    return f"{text}; {error.splitlines()[0]}" if error else text


def summary(records: list[Record]) -> str:
    """A table of runs for the terminal; "vs" is how many times more others send."""
    lines = [["run", _metric(records), "sent per step", "vs f32", "vs bf16"]]
    lines[0] += ["vs uniform", "after warm-up"]
    for r in records:
        line = [f"{r['label']}, seed {r['seed']}", _outcome(r)]
        if r["status"] == "done":
            line += [human_bits(r["final"]["bits_per_step"])]
            line += [_times([r["final"][ratio]]) for ratio in _RATIOS]
            line += [_times([gain(r, records, bits)]) for bits in _BITS]
        lines.append(line + ["-"] * (7 - len(line)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text + [_ending(r) for r in records if r["status"] != "done"])


_EXPLAINED = """\
Mean ± standard deviation over finished seeds. Payload: what a worker hands to
collectives. Sent: what it then sends, (N - 1) S for an all-gather of S bits and
2 (N - 1) / N S for an all-reduce; the dense warm-up is included unless the column says
otherwise: then it counts from the log's first line after it. Ratios are of bits sent.
Gain: uniform's bits / the method's, same seed. *: differs from the config (above)."""
_EXPLAINED_PAIRS = """\
Metric of the method less that of the other, same seed and batches. Fewer than three
pairs are inconclusive; with more, the verdict tells on what all pairs agree."""


def experiments(runs_dir: Path, weighted: bool) -> Iterable[tuple[str, list[Record]]]:
    """Experiments whose workers have weights, or those without, and their records."""
    for folder in sorted(p for p in runs_dir.glob("*") if p.is_dir()):
        if folder.name.startswith("bench_"):  # of other scripts
            continue
        records = [results.read(path) for path in sorted(folder.glob("*.json"))]
        if records and ("weights" in records[0]) == weighted:
            yield folder.name, records


def tables(runs_dir: Path, out_dir: Path, configs_dir: Path = CONFIGS) -> list[Path]:
    """Writes `tables/<experiment>.md` for every folder of records; returns paths."""
    folder, written = out_dir / "tables", []
    for experiment, records in experiments(runs_dir, weighted=False):
        text = table(experiment, records, configs_dir / f"{experiment}.py")
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{experiment}.md")
        written[-1].write_bytes(text.encode())
    return written


def table(experiment: str, records: list[Record], config_file: Path) -> str:
    """The report of one experiment, in Markdown."""
    found, common = rows(records, config_file)
    names = [_names(row, found, common) for row in found]
    bad = [r for row in found for r in row if r["status"] not in ("done", "not run")]
    parts = [
        f"<!-- Generated by `python scripts/report.py` from {len(records)} records in "
        f"results/runs/{experiment}; do not edit. -->",
        f"# {experiment}",
        "\n".join(_setting(found, records, common)),
        "## Results",
        markdown(_results(found, names, records)),
        _EXPLAINED,
        "## Differences at the same seed",
        markdown(_paired(found, names, records)),
        _EXPLAINED_PAIRS,
        "## Every seed",
        markdown(_each_seed(found, names)),
        "## Failed and diverged runs",
        "\n".join(f"- {_ending(r)}" for r in bad) or "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _names(row: Row, found: list[Row], common: dict) -> list[str]:
    method = f"`{row[0]['method']}`" + "*" * bool(_note(row, common))
    return [_variant(row, found) or family(row[0]), method]


def _variant(row: Row, found: list[Row]) -> str:
    """The aggregator of a row, where others of its family have another one."""
    name, own = family(row[0]), row[0]["config"]["aggregator"]
    others = {r[0]["config"]["aggregator"] for r in found if family(r[0]) == name}
    return f"`{own}`" if name and len(others) > 1 else ""


def _note(row: Row, common: dict) -> str:
    changed = _changed(row[0], common)
    return ", ".join(f"{k} {v} instead of {common[k]}" for k, v in changed.items())


def _setting(found: list[Row], records: list[Record], common: dict) -> list[str]:
    """What the experiment is, where it ran, and what differs from its config."""
    c = common or records[0]["config"]
    each = {
        family(row[0]): row[0]["config"]["aggregator"]
        for row in found
        if family(row[0]) and not _variant(row, found)
    }
    listed = lambda values: ", ".join(sorted(set(map(str, values))))
    commit = lambda git: f"{git['commit']}{' with changes' * bool(git['dirty'])}"
    lines = [
        f"`{c['task']}`; {c['num_workers']} workers x {c['batch_size_per_worker']} "
        f"samples; {c['steps']} steps of {c['optimizer']} with learning rate "
        f"{c['learning_rate']:g}; the first {c['warmup_steps']} steps are dense, "
        f"levels are selected every {c['every']}.",
        *(f"{name}: `{aggregator}`." for name, aggregator in each.items()),
        f"Made on {listed(r['device'] for r in records)}; JAX "
        f"{listed(r['versions']['jax'] for r in records)}; commits "
        f"{listed(commit(r['git']) for r in records)}.",
    ]
    for row in filter(lambda row: _note(row, common), found):
        name = " ".join(_names(row, found, common)).strip()
        lines.append(f"{name} differs from the config: {_note(row, common)}.")
    missing = sum(r["status"] == "not run" for row in found for r in row)
    if missing:
        lines.append(f"Not run yet: {missing} of the runs that the config asks for.")
    return [f"- {line}" for line in lines]


def _results(found: list[Row], names: list, records: list[Record]) -> list[list[str]]:
    head = ["family", "method", "seeds done", _metric(records), "payload per step"]
    head += ["sent per step", "vs dense f32", "vs dense bf16", "vs f32 after warm-up"]
    head += ["gain over uniform", "gain after warm-up", "steps"]
    body = []
    for row, name in zip(found, names, strict=True):
        done = _done(row)
        cells = [*name, f"{len(done)} of {len(row)}"]
        if not done:
            cells.append(" / ".join(sorted({r["status"] for r in row})))
            body.append(cells + [""] * (len(head) - len(cells)))
            continue
        final = [r["final"] for r in done]
        payload = statistics.fmean(f["payload_bits"] / f["steps"] for f in final)
        sent = statistics.fmean(f["bits_per_step"] for f in final)
        cells += [_spread([quality(r) for r in done])]
        cells += [human_bits(payload), human_bits(sent)]
        cells += [_times([f[ratio] for f in final]) for ratio in _RATIOS]
        cells += [_times([ratio_after_warmup(r) for r in done])]
        cells += [_times([gain(r, records, bits) for r in done]) for bits in _BITS]
        cells += [", ".join(sorted({str(f["steps"]) for f in final}))]
        body.append(cells)
    return [head, *body]


def _paired(found: list[Row], names: list, records: list[Record]) -> list[list[str]]:
    metric = _metric(records)
    head = ["family", "method", "against", "pairs", f"mean difference, {metric}"]
    head += ["[min, max]", "verdict"]
    body = []
    for row, name in zip(found, names, strict=True):
        for kind in ("uniform", "dense"):
            if row[0]["method"].split("(")[0] in ("dense", kind):
                continue
            pairs = [(r, partner(r, records, kind)) for r in _done(row)]
            d = [quality(r) - quality(other) for r, other in pairs if other]
            cells = [*name, kind, str(len(d)), "no pair", "", "inconclusive"]
            if d:
                limits = f"[{min(d):+.2f}, {max(d):+.2f}]"
                cells[4:6] = f"{statistics.fmean(d):+.2f}", limits
            if len(d) >= 3:
                up, down = min(d) > 0, max(d) < 0
                better, worse = (up, down) if "accuracy" in metric else (down, up)
                cells[6] = "better" if better else "worse" if worse else "mixed"
            body.append(cells)
    return [head, *body]


def _each_seed(found: list[Row], names: list) -> list[list[str]]:
    seeds = sorted({r["seed"] for row in found for r in row})
    body = []
    for row, name in zip(found, names, strict=True):
        outcomes = {r["seed"]: _outcome(r) for r in row}
        body.append([*name, *(outcomes.get(s, "") for s in seeds)])
    return [["family", "method", *(f"seed {s}" for s in seeds)], *body]


def markdown(lines: list[list[str]]) -> str:
    """A table of cells, the first line its header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def run_figure(records: list[Record], path: Path) -> None:
    """Draws runs of one seed: metric against bits, and an adaptive run's levels."""
    figure = Figure(figsize=(11, 3.8 + 0.2 * len(records)), layout="constrained")
    adaptive = [r for r in records if _varies(r)]
    axes = figure.subplots(1, 2 if adaptive else 1, squeeze=False)[0]
    _curves(axes[0], [[r] for r in records])
    if adaptive:
        _heat_map(axes[1], adaptive[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def figures(runs_dir: Path, out_dir: Path, configs_dir: Path = CONFIGS) -> list[Path]:
    """Writes figures/<experiment>_metric.png and _levels.png; returns paths.

    Where all records are of one seed and one family, as in the quickstart, one figure
    figures/<experiment>.png holds both.
    """
    written = []
    for experiment, records in experiments(runs_dir, weighted=False):
        found, _ = rows(records, configs_dir / f"{experiment}.py")
        found = [row for row in map(_done, found) if row]
        if not found:
            continue
        families = [*dict.fromkeys(family(r[0]) for r in found if family(r[0]))] or [""]
        if len(families) == 1 and len({r["seed"] for r in records}) == 1:
            written.append(out_dir / "figures" / f"{experiment}.png")
            run_figure([r for row in found for r in row], written[-1])
            continue
        curves = Figure(figsize=(1 + 4 * len(families), 4.6), layout="constrained")
        shared = dict(sharex=True, sharey=True, squeeze=False)
        panels, adaptive = curves.subplots(1, len(families), **shared)[0], []
        for ax, name in zip(panels, families, strict=True):
            shown = [row for row in found if family(row[0]) in ("", name)]
            _curves(ax, shown)
            ax.set(title=name, ylabel=ax.get_ylabel() if ax is panels[0] else "")
            adaptive += [r for row in shown for r in row if _varies(r)][:1]
        drawn = {"metric": curves}
        if adaptive:
            size = (8, sum(2 + 0.2 * len(r["layers"]) for r in adaptive))
            drawn["levels"] = Figure(figsize=size, layout="constrained")
            panels = drawn["levels"].subplots(len(adaptive), 1, squeeze=False)[:, 0]
            for ax, record in zip(panels, adaptive, strict=True):
                _heat_map(ax, record)
        for kind, figure in drawn.items():
            written.append(out_dir / "figures" / f"{experiment}_{kind}.png")
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(written[-1], dpi=120)
    return written


def _varies(record: Record) -> bool:
    """Whether a run has had several assignments of levels, its warm-up aside."""
    levels = record["series"].get("levels", [])
    return len({tuple(v) for v in levels if -1 not in v}) > 1


def _curves(ax: Axes, groups: list[Row]) -> None:
    """Metric against bits: for each row the mean over seeds and their range."""
    several = len({family(row[0]) for row in groups} - {""}) > 1
    colours = iter(COLOURS * len(groups))
    for i, row in enumerate(groups):
        dense = row[0]["method"] == "dense"
        style = {"color": "black" if dense else next(colours)}
        style |= {"ls": "--" if dense else "-", "marker": "xosD^vP"[i % 7], "ms": 4}
        name = row[0]["label" if several else "method"]
        name = _variant(row, groups).strip("`") or name
        runs = _done(row)
        if not runs:
            ax.plot([], [], label=f"{name}: {row[0]['status']}", **style)
            continue
        bits = np.mean([r["series"]["eval_bits"] for r in runs], axis=0)
        y = np.array([r["series"][f"eval_{r['metric']}"] for r in runs], float)
        y *= 100 if runs[0]["metric"] == "accuracy" else 1
        ax.plot(bits, y.mean(0), label=name, **style)
        if len(runs) > 1:
            ax.fill_between(bits, y.min(0), y.max(0), color=style["color"], alpha=0.2)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("bits sent by a worker")
    ax.set_ylabel(_metric([r for row in groups for r in row]))
    ax.grid(alpha=0.3)
    # Below the axes: above them there is no corner without a curve.
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _heat_map(ax: Axes, record: Record) -> None:
    """The level of every layer over time; the dense warm-up is above the highest."""
    ladder, series = record["ladder"], record["series"]
    levels = np.array(series["levels"]).T
    levels = np.where(levels < 0, len(ladder), levels)
    values = [f"{v:g}" for v in ladder]
    colours = [*colormaps["viridis"](np.linspace(0, 1, len(ladder)))]
    if (levels == len(ladder)).any():
        values, colours = [*values, "warm-up"], [*colours, (0.8, 0.8, 0.8, 1)]
    mesh = ax.pcolormesh(
        [*series["levels_step"], series["step"][-1]],
        np.arange(len(levels) + 1) - 0.5,
        levels,
        cmap=ListedColormap(colours),
        norm=BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours)),
    )
    layers = zip(record["layers"], record["layer_sizes"], strict=True)
    names = [f"{name.removesuffix('/kernel')} ({size:,})" for name, size in layers]
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.invert_yaxis()
    ax.set_xlabel("step")
    ax.set_title(f"{record['label']}, seed {record['seed']}", fontsize="medium")
    bar = ax.figure.colorbar(mesh, ax=ax, label=_UNITS.get(family(record), "level"))
    bar.set_ticks(range(len(values)), labels=values, fontsize=7)
    bar.minorticks_off()
