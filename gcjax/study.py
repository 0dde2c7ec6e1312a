"""What allocations to a parameter server do: iterations and seconds to a target.

Tables and figures of experiments whose records have weights, from the records alone.
A *group* holds runs of one setting: task, split, number of workers and learning rate.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from gcjax import experiment, report, splits
from gcjax.network import rounds
from gcjax.selectors import workers as rules

Record = dict[str, Any]
Group = dict[str, list[Record]]  # method -> its records, by seed
SHARE_OF_UNIFORM = 0.98  # of its final accuracy, that is the target
_MEDIAN_OF = 5  # evaluations, for the running median
ORDERS = ("with", "across", "against")  # of links and weights
COMPUTE_S = 0.01  # of a round
_RESAMPLES = 2000  # of the seeds, for an interval
# Fields of a config that tell settings apart, and how a title names them.
_SETTING = {
    "task": "{}",
    "split": "{}",
    "num_workers": "{} workers",
    "local_steps": "{} local steps",
    "learning_rate": "learning rate {:g}",
}


# --- One run. -------------------------------------------------------------------------


def iterations(record: Record, target: float) -> int | None:
    """First step whose running median of the accuracy reaches a target; None: never."""
    at = _first(record, target)
    return None if at is None else record["series"]["eval_step"][at]


def megabytes(record: Record, target: float) -> float | None:
    """What all workers have uploaded until then, MB."""
    at = _first(record, target)
    return None if at is None else sum(record["series"]["uploaded"][at]) / 8e6


def seconds(record: Record, target: float, order: str) -> float | None:
    """Modelled seconds until then over uneven links, downloads and computing counted.

    Uploads between two evaluations are taken as equal: exact where ratios are fixed.
    """
    at = _first(record, target)
    if at is None:
        return None
    links = rounds.uneven(record["weights"], order)
    steps = np.diff([0, *record["series"]["eval_step"][: at + 1]])
    sent = np.array(record["series"]["uploaded"][: at + 1], float)
    each = np.diff(sent, axis=0, prepend=0) / steps[:, None]
    down = record["final"]["download_bits"] / record["final"]["steps"]
    return sum(
        count * rounds.round_seconds(links, bits, down, COMPUTE_S)
        for count, bits in zip(steps.tolist(), each, strict=True)
    )


def _first(record: Record, target: float) -> int | None:
    accuracy = np.array(record["series"]["eval_accuracy"])
    for end in range(_MEDIAN_OF, len(accuracy) + 1):
        if np.median(accuracy[end - _MEDIAN_OF : end]) >= target:
            return end - 1
    return None


def final(record: Record) -> float:
    """Accuracy at the end: the running median there."""
    return float(np.median(record["series"]["eval_accuracy"][-_MEDIAN_OF:]))


def upload_bits(record: Record) -> float:
    """Bits uploaded per worker and round, of all workers together."""
    return sum(record["final"]["upload_bits"]) / (
        record["final"]["steps"] * len(record["weights"])
    )


def _seed(record: Record) -> int:
    return record["seed"]


# --- Runs that belong together. -------------------------------------------------------


def groups(records: Iterable[Record]) -> dict[str, Group]:
    """Settings, named by what differs -> methods, with options -> records by seed."""
    records = sorted((r for r in records if r["status"] == "done"), key=_seed)
    values = lambda field: {r["config"].get(field) for r in records}
    varied = [field for field in _SETTING if len(values(field)) > 1] or ["split"]
    found: dict[str, Group] = defaultdict(lambda: defaultdict(list))
    for record in records:
        parts = [_SETTING[f].format(record["config"][f]) for f in varied]
        method = " ".join([record["method"], _options(record)]).strip()
        found[", ".join(parts)][method].append(record)
    natural = lambda text: [
        float(x) if i % 2 else x
        for i, x in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))
    ]
    return {name: found[name] for name in sorted(found, key=natural)}


def _options(record: Record) -> str:
    text = record["config"]["aggregator"].removeprefix("parameter_server(")
    return text.removesuffix(")")


def target_of(group: Group, mean_ratio: float) -> float | None:
    """Share of the mean final accuracy of uniform top-k at a mean ratio."""
    runs = group.get(f"uniform({mean_ratio})")
    return SHARE_OF_UNIFORM * statistics.fmean(map(final, runs)) if runs else None


def _pairs(runs: list[Record], others: list[Record], value: Callable) -> list[tuple]:
    """Values of runs and of others at the same seeds."""
    by_seed = {r["seed"]: r for r in others}
    both = [(r, by_seed[r["seed"]]) for r in runs if r["seed"] in by_seed]
    return [(value(a), value(b)) for a, b in both]


def paired(
    runs: list[Record], others: list[Record], value: Callable
) -> tuple[float, float] | None:
    """Mean difference at one seed, and its standard error; None below two pairs."""
    values = _pairs(runs, others, value)
    gaps = [a - b for a, b in values if a is not None and b is not None]
    if len(gaps) < 2 or len(gaps) < len(values):
        return None
    return statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5


def interval(
    runs: list[Record], others: list[Record], value: Callable, scale: float = 1
) -> str:
    """Where 95 % of the mean differences lie when pairs are drawn again and again."""
    values = _pairs(runs, others, value)
    if len(values) < 3 or any(None in v for v in values):
        return "-"
    gaps = scale * np.array([a - b for a, b in values])
    if not np.ptp(gaps):
        return f"[{gaps[0]:+.1f}, {gaps[0]:+.1f}]"
    found = scipy.stats.bootstrap(
        (gaps,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return f"[{found.low:+.1f}, {found.high:+.1f}]"


def verdict(gap: tuple[float, float] | None, scale: float = 1) -> str:
    """A difference, or "tie" where it is within two standard errors."""
    if gap is None:
        return "-"
    mean, error = gap
    text = f"{scale * mean:+.2f} ± {scale * error:.2f}"
    return f"{text} (tie)" if abs(mean) <= 2 * error else text


def _mean(values: list[float | None], otherwise: str) -> str:
    """A mean, or something else with how many runs never got there."""
    if None in values:
        missing = sum(v is None for v in values)
        return f"{otherwise} ({missing} of {len(values)})"
    text = f"{statistics.fmean(values):,.0f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):,.0f}"
    return text


def _scale(uniform: list[Record], runs: list[Record], count: Callable) -> float:
    """Per cent for one of uniform's steps, at the seeds of others; 1 without any."""
    base = [n for n, _ in _pairs(uniform, runs, count) if n is not None]
    return 100 / statistics.fmean(base) if base else 1


def _more_than(record: Record) -> str:
    return f"> {record['config']['steps']:,}"


# --- Tables. --------------------------------------------------------------------------


def table(
    experiment: str,
    records: list[Record],
    mean_ratio: float,
    paper: dict,
    targets: Sequence[float] = (),
) -> str:
    """The report of an experiment, in Markdown.

    Args:
      experiment: Its name.
      records: Of all its runs.
      mean_ratio: Whose uniform runs set the target.
      paper: (setting, method) -> accuracy in % that was published.
      targets: Accuracies, in [0, 1], to which steps are counted besides.
    """
    lines = [
        f"<!-- Generated by `python scripts/report.py` from {len(records)} records in "
        f"results/runs/{experiment}; do not edit. -->",
        f"# {experiment}",
        _setting(records, mean_ratio),
    ]
    for name, group in groups(records).items():
        target = target_of(group, mean_ratio)
        lines += [f"## {name}", _results(name, group, target, mean_ratio, paper)]
        if targets:
            lines += ["Steps to accuracies, and what is saved against uniform:"]
            lines += [_targets(group, targets, mean_ratio)]
        if target is not None:
            lines += ["Modelled seconds to the target, by links:"]
            lines += [_seconds(group, target)]
            found = correlations(group, target, mean_ratio)
            if found:
                lines += [_correlations(*found)]
    bad = [r for r in records if r["status"] != "done"]
    if bad:
        ends = [f"- {r['label']}, seed {r['seed']}: {r['status']}" for r in bad]
        lines += ["## Failed and diverged runs", "\n".join(ends)]
    return "\n\n".join(lines) + "\n"


def _setting(records: list[Record], mean_ratio: float) -> str:
    config = records[0]["config"]
    several = lambda field: len({r["config"][field] for r in records}) > 1
    shown = lambda field: "several" if several(field) else f"{config[field]:,}"
    task = "Several tasks" if several("task") else f"`{config['task']}`"
    return (
        f"{task}; {shown('num_workers')} workers x "
        f"{shown('batch_size_per_worker')} samples; {shown('steps')} steps, "
        f"learning rate {shown('learning_rate')}; {records[0]['num_params']:,} "
        f"weights. Target: {SHARE_OF_UNIFORM:.0%} of the mean final accuracy of "
        f"`uniform({mean_ratio})` of the same setting; accuracies are medians of "
        f"{_MEDIAN_OF} evaluations, one every {config['eval_every']} steps. ± is the "
        "standard deviation over seeds, in differences at the same seed the standard "
        "error; differences within two of them are ties; intervals are of "
        f"{_RESAMPLES:,} bootstrap samples of the pairs. Uploads are mean bits per "
        "worker and round, places, padding and flags included; the largest worker's "
        "beside; MB are all workers' until the target. Links: log-normal bandwidths of "
        f"mean 8.4 Mbit/s and spread 1, latency 20 ms, computing {1e3 * COMPUTE_S:.0f} "
        "ms a round; dealt out with, across or against the workers' weights."
    )


def _targets(group: Group, targets: Sequence[float], mean_ratio: float) -> str:
    uniform = group.get(f"uniform({mean_ratio})", [])
    rows = [["method", *(f"to {t:.0%}" for t in targets)]]
    for method, runs in group.items():
        cells = []
        for target in targets:
            count = lambda r, target=target: iterations(r, target)
            text = _mean([count(r) for r in runs], _more_than(runs[0]))
            gap = paired(uniform, runs, count)
            if gap is not None and method != f"uniform({mean_ratio})":
                text += f"; {verdict(gap, _scale(uniform, runs, count))} %"
            cells.append(text)
        rows.append([f"`{method}`", *cells])
    return report.markdown(rows)


def _results(name: str, group: Group, target, mean_ratio: float, paper: dict) -> str:
    uniform = group.get(f"uniform({mean_ratio})", [])
    rows = [
        ["method", "accuracy, %", "published", "less uniform's, points", "upload, bits"]
        + ["largest", "steps to target", "saved, %", "95 %", "MB to target"]
    ]
    for method, runs in group.items():
        accuracy = [100 * final(r) for r in runs]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""
        upload = statistics.fmean(map(upload_bits, runs))
        largest = statistics.fmean(
            max(r["final"]["upload_bits"]) / r["final"]["steps"] for r in runs
        )
        published = paper.get((name, method))
        row = [
            f"`{method}`" + f" (seeds: {len(runs)})" * (len(runs) != len(uniform)),
            f"{statistics.fmean(accuracy):.2f}{spread}",
            "" if published is None else f"{published:.2f}",
            verdict(paired(runs, uniform, final), 100),
            f"{upload:,.0f}",
            f"{largest:,.0f}",
        ]
        if target is None:
            rows.append([*row, *["-"] * 4])
            continue
        count = lambda r: iterations(r, target)
        need = [count(r) for r in runs]
        gap = paired(uniform, runs, count)
        scale = _scale(uniform, runs, count)
        row += [_mean(need, _more_than(runs[0])), verdict(gap, scale)]
        row += [interval(uniform, runs, count, scale)]
        sent = [megabytes(r, target) for r in runs]
        rows.append([*row, "-" if None in sent else f"{statistics.fmean(sent):,.2f}"])
    return report.markdown(rows)


def _seconds(group: Group, target: float) -> str:
    rows = [["method", *(f"links {order} weights" for order in ORDERS)]]
    for method, runs in group.items():
        cells = []
        for order in ORDERS:
            made_for = re.search(r"'(with|across|against)'", method)
            if made_for and made_for.group(1) != order:
                cells.append("")  # its ratios are for other links
                continue
            values = [seconds(r, target, order) for r in runs]
            cells.append(_mean(values, "never"))
        rows.append([f"`{method}`", *cells])
    return report.markdown(rows)


def correlations(group: Group, target: float, mean_ratio: float):
    """How criteria rank allocations of one mean ratio, against their iterations.

    Returns:
      {criterion: Spearman's rank correlation}, and the number of allocations; None
      below four allocations, or where all take as long.
    """
    points = []
    for method, runs in group.items():
        fixed = rf"(uniform|dagc_r|power_rule)\({mean_ratio}\b.*\)"
        # Entries that are chosen in each layer are another compressor's.
        is_fixed = re.fullmatch(fixed, method) and "per_layer" not in method
        if not is_fixed or _options(runs[0]):
            continue
        need = [iterations(r, target) for r in runs]
        p = np.array(runs[0]["weights"])
        rules_of_p = experiment.ratio_rules(p)
        granted = np.asarray(experiment.call(method, rules_of_p, "method"))
        values = [float(f(p, granted)) for f in (rules.phi, rules.psi, rules.omega)]
        # What never gets there is worst of all.
        worst = runs[0]["config"]["steps"] * 1.01
        points.append(
            (statistics.fmean(worst if n is None else n for n in need), values)
        )
    if len(points) < 4 or len({need for need, _ in points}) == 1:
        return None
    need, values = [n for n, _ in points], np.array([v for _, v in points])
    rank = lambda v: float(scipy.stats.spearmanr(v, need).statistic)
    names = ("phi", "psi", "omega")
    return {n: rank(v) for n, v in zip(names, values.T, strict=True)}, len(points)


def _correlations(found: dict[str, float], count: int) -> str:
    text = ", ".join(f"{name} {value:+.2f}" for name, value in found.items())
    return (
        f"Rank correlation (Spearman) of criteria with mean steps to the target, over "
        f"{count} allocations of the same mean ratio: {text}."
    )


# --- Figures. -------------------------------------------------------------------------


def figure(records: list[Record]) -> Figure:
    """Accuracy against steps and against bits sent, a panel pair for each split.

    Only of methods that every split has.
    """
    found = groups(records)
    common = set.intersection(*(set(group) for group in found.values()))
    drawing = Figure(figsize=(11, 3.2 * len(found)), layout="constrained")
    axes = drawing.subplots(len(found), 2, squeeze=False)
    for row, (name, group) in zip(axes, found.items(), strict=True):
        for method, runs in group.items():
            if method not in common:
                continue
            curves = np.array([r["series"]["eval_accuracy"] for r in runs])
            steps = runs[0]["series"]["eval_step"]
            line = row[0].plot(steps, 100 * curves.mean(0), lw=1, label=method)
            color = line[0].get_color()
            mean, spread = 100 * curves.mean(0), 100 * curves.std(0)
            row[0].fill_between(
                steps, mean - spread, mean + spread, color=color, alpha=0.15
            )
            sent = np.array([np.sum(r["series"]["uploaded"], axis=1) for r in runs])
            row[1].plot(sent.mean(0) / 8e6, mean, lw=1, color=color)
        top = max(c[-1] for c in (line.get_ydata() for line in row[0].lines))
        row[0].set(title=name, xlabel="step", ylabel="test accuracy, %")
        row[0].set_ylim(top - 15, top + 1)
        row[1].set(xlabel="uploaded by all, MB", xscale="log", ylim=(top - 15, top + 1))
    axes[0, 0].legend(fontsize=6)
    return drawing


def pareto(records: list[Record], mean_ratio: float) -> Figure | None:
    """Time and traffic to the target, of the setting with most methods.

    A panel for each order of links and weights. Methods that no other one beats in both
    are named; None where none reaches the target.
    """
    group = max(groups(records).values(), key=len)
    target = target_of(group, mean_ratio)
    if target is None or len(group) < 5:
        return None
    drawing = Figure(figsize=(13, 4.6), layout="constrained")
    axes = drawing.subplots(1, len(ORDERS), sharey=True)
    for ax, order in zip(axes, ORDERS, strict=True):
        points = {}
        for method, runs in group.items():
            if re.search(r"'(with|across|against)'", method) and order not in method:
                continue
            each = [(megabytes(r, target), seconds(r, target, order)) for r in runs]
            if all(x is not None for x, _ in each):
                points[method] = np.mean(each, axis=0)
        ax.set(title=f"links {order} weights", xscale="log", yscale="log")
        ax.set_xlabel("uploaded by all until the target, MB")
        ax.grid(alpha=0.3, which="both")
        for i, (method, at) in enumerate(sorted(points.items(), key=lambda x: x[1][0])):
            others = np.array([v for name, v in points.items() if name != method])
            beaten = (
                len(others) and ((others <= at).all(1) & (others < at).any(1)).any()
            )
            known = method == f"uniform({mean_ratio})" or not beaten
            ax.plot(*at, "o" if not beaten else "x", ms=6 if known else 4,
                    color=f"C{i % 10}" if known else "0.7",
                    label=method if known else None)  # fmt: skip
        ax.legend(fontsize=6)
    axes[0].set_ylabel("modelled seconds to the target")
    return drawing


def write_report(runs_dir: Path, out: Path) -> list[Path]:
    """Writes table and figures of every experiment whose records have weights.

    Its config file says which mean ratio sets the target, `TARGET_RATIO`, what was
    published, `PAPER`: {(setting, method): accuracy in %}, and further `TARGETS`.
    """
    written = []
    for name, records in report.experiments(runs_dir, weighted=True):
        module = report.load_config_file(report.CONFIGS / f"{name}.py")
        targets = getattr(module, "TARGETS", ())
        text = table(name, records, module.TARGET_RATIO, module.PAPER, targets)
        paths = [out / f"tables/{name}.md", out / f"figures/{name}.png"]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        paths[0].write_bytes(text.encode())
        figure(records).savefig(paths[1], dpi=90)
        front = pareto(records, module.TARGET_RATIO)
        if front is not None:
            paths.append(out / f"figures/{name}_pareto.png")
            front.savefig(paths[-1], dpi=90)
        settings = ("task", "split", "num_workers")
        drawn = {}  # of the first seed, once for each division of the data
        for record in sorted(records, key=_seed):
            drawn.setdefault(tuple(record["config"][f] for f in settings), record)
        for number, record in enumerate(drawn.values()):
            title = f"{record['config']['split']}, seed {record['seed']}"
            paths.append(out / f"figures/{name}_split{number}.png")
            counts = np.array(record["profile"])
            splits.figure(counts, title).savefig(paths[-1], dpi=90)
        written += paths
    return written
