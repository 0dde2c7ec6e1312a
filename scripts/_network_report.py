"""Table and figure of bench_network.py, from the records alone."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _network_measure import METHODS, MODELS, RATES, SCRIPTS  # noqa: E402

from gcjax import network, report  # noqa: E402


class Row(NamedTuple):
    """A method of one side in a record."""

    steps: int
    step: np.ndarray  # quartiles of a step, ms, [3]
    exchange: np.ndarray  # the same less the median step without exchange
    sent: float
    declared: float


def rows_of(record: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """The rows of a record, by (side, method)."""
    quartiles = {
        (r["side"], r["method"]): np.percentile(r["ms"], (25, 50, 75))
        for r in record["rows"]
    }
    found = {}
    for r in record["rows"]:
        key = r["side"], r["method"]
        base = quartiles.get((r["side"], "none"), np.full(3, np.nan))[1]
        found[key] = Row(
            len(r["ms"]),
            quartiles[key],
            quartiles[key] - base,
            r["interface_bytes"],
            r["declared_bytes"],
        )
    return found


def fit(declared: np.ndarray, sent: np.ndarray) -> tuple[float, float]:
    """Least squares of sent = a + b * declared, weighted by 1 / declared.

    The weights keep the few kB of the smallest messages visible beside megabytes.
    """
    b, a = np.polyfit(declared, sent, 1, w=1 / declared)
    return a, b


def write_report(runs: Path, out: Path) -> list[Path]:
    """Writes table and figure from the records of results/runs/bench_network."""
    records = [json.loads(p.read_text()) for p in (runs / "bench_network").glob("*")]
    order = lambda r: (MODELS.index(r["model"]), RATES.index(r["rate"]))
    records.sort(key=order)
    if not records:
        return []
    table = out / "tables" / "bench_network.md"
    figure = out / "figures" / "bench_network.png"
    table.parent.mkdir(parents=True, exist_ok=True)
    figure.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(_table(records))
    _figure(records).savefig(figure, dpi=120)
    return [table, figure]


_EXPLAINED = """\
Four workers, one process each. Step: median wall clock of a step in ms, over all timed
steps of the median over ranks, with quartiles. Exchange: the step less the median step
without exchange ("none") of the same side. gcjax/torch: ratio of the exchanges of the
same method; gcjax's bf16 also stands against PyTorch's fp16, of the same size. vs f32,
vs bf16: how many times faster gcjax's exchange is than its own dense ones. "-": nothing
to compare with, or an exchange that drowns in the spread of the step without one.
Adaptive methods select their levels at every 20th step.
PyTorch's PowerSGD compresses all matrices (`min_compression_rate=1`) in one bucket: in
trials with its default buckets over gloo it hung or crashed, maybe because collectives
start in callbacks whose order can differ between ranks."""
_BYTES = """\
Bytes of a rank and step. Declared: what the side says it sends: for gcjax
`results.wire_bits`, for PyTorch the buffers that are handed to all-reduces, times
2 (N - 1) / N. Interface: what the network interface counts, TCP, IP and Ethernet
headers and acknowledgements included; mean over ranks and rates."""

_MODEL = """\
Steps of gcjax in ms as `gcjax.network` predicts them from the step without a limit
(computation, codec and the latency of collectives) and the declared bytes, as that
step + bytes x `find_link(rate).seconds_per_byte`, headers included; and the measured
ones."""


def _predictions(records: list[dict[str, Any]]) -> list[list[str]]:
    """Predicted and measured steps of every method at every limited rate."""
    lines = [["model", "rate", "method", "measured", "predicted", "error"]]
    for free in (r for r in records if r["rate"] == "unlimited"):
        base = rows_of(free)
        for record in records:
            if record["model"] != free["model"] or record["rate"] == "unlimited":
                continue
            link, rows = network.find_link(record["rate"]), rows_of(record)
            for name in METHODS:
                key = "gcjax", name
                if name == "none" or key not in rows or key not in base:
                    continue
                measured = rows[key].step[1]
                wire = 1e3 * rows[key].declared * link.seconds_per_byte
                predicted = base[key].step[1] + wire
                error = f"{100 * (predicted / measured - 1):+.0f}%"
                cells = [record["model"], record["rate"], name]
                lines.append([*cells, _ms(measured), _ms(predicted), error])
    return lines


def _table(records: list[dict[str, Any]]) -> str:
    first = records[0]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    settings = ", ".join(f"`{k}={v}`" for k, v in first["settings"].items())
    parts = [
        "<!-- Generated by `python scripts/bench_network.py --report` from "
        f"{len(records)} records in results/runs/bench_network; do not edit. -->",
        "# Exchange over slow links, beside PyTorch DDP",
        f"Measured {first['started'][:10]} on {first['device']} ({first['network']}); "
        f"{versions}.\nBoth sides with {settings}; `torch.set_num_threads(1)`.",
        _EXPLAINED,
    ]
    for record in records:
        parts.append(f"## {_TITLE[record['model']]}, {record['rate']}")
        parts.append(report.markdown(_times(rows_of(record))))
    parts.append("## Bytes")
    parts.append(_BYTES)
    for model in dict.fromkeys(r["model"] for r in records):
        own = [rows_of(r) for r in records if r["model"] == model]
        parts.append(f"### {_TITLE[model]}")
        parts.append(report.markdown(_sizes(own)))
        parts.append("\n".join(_fits(own)))
    predicted = _predictions(records)
    if len(predicted) > 1:
        errors = [abs(float(line[-1].rstrip("%"))) for line in predicted[1:]]
        parts.append("## The cost model")
        parts.append(_MODEL)
        parts.append(report.markdown(predicted))
        parts.append(
            f"Absolute error: median {np.median(errors):.0f} %, largest "
            f"{max(errors):.0f} %, within 15 % in {sum(e <= 15 for e in errors)} of "
            f"{len(errors)} cases."
        )
    parts.append("## Methods")
    lines = [["method", "gcjax", "PyTorch"]]
    for name in METHODS:
        lines.append([name, *(_call(records, side, name) for side in SCRIPTS)])
    parts.append(report.markdown(lines))
    return "\n\n".join(parts) + "\n"


_TITLE = {"mlp": "MLP, 2.4 M parameters", "cnn": "CNN, 0.6 M parameters"}


def _call(records: list[dict[str, Any]], side: str, name: str) -> str:
    for record in records:
        for r in record["rows"]:
            if (r["side"], r["method"]) == (side, name):
                return f"`{r['call']}`"
    return "-"


def _times(rows: dict[tuple[str, str], Row]) -> list[list[str]]:
    head = ["method", "gcjax step", "gcjax exchange", "PyTorch step"]
    head += ["PyTorch exchange", "gcjax/torch", "vs f32", "vs bf16", "steps"]
    lines = [head]
    for name in METHODS:
        pair = [rows.get((side, name)) for side in SCRIPTS]
        if not any(pair):
            continue
        cells = [name]
        for row in pair:
            cells += [_spread(row.step) if row else "-"]
            cells += [_ms(row.exchange[1]) if row and name != "none" else "-"]
        ours = rows.get(("gcjax", "bf16" if name == "fp16" else name))
        cells.append(_ratio(ours, pair[1]) if name != "none" else "-")
        for dense in ("dense f32", "bf16"):
            base = rows.get(("gcjax", dense))
            cells.append(_ratio(base, pair[0]) if name != "none" else "-")
        cells.append("/".join(str(row.steps) for row in pair if row))
        lines.append(cells)
    return lines


def _spread(quartiles: np.ndarray) -> str:
    low, middle, high = map(_ms, quartiles)
    return f"{middle} ({low}-{high})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _ratio(above: Row | None, below: Row | None) -> str:
    """Ratio of two exchanges that are not lost in the spread."""
    for row in (above, below):
        if row is None or not row.exchange[0] > 0:
            return "-"
    return f"{above.exchange[1] / below.exchange[1]:.2f}"


def _sizes(own: list[dict[tuple[str, str], Row]]) -> list[list[str]]:
    lines = [["method"]]
    for side in ("gcjax", "PyTorch"):
        lines[0] += [f"{side} declared", "interface"]
    for name in METHODS:
        cells = [name]
        for side in SCRIPTS:
            found = [rows[side, name] for rows in own if (side, name) in rows]
            for field in ("declared", "sent"):
                values = [getattr(row, field) for row in found]
                cells.append(f"{np.mean(values):,.0f}" if values else "-")
        if cells[1:] != ["-"] * 4:
            lines.append(cells)
    return lines


def _fits(own: list[dict[tuple[str, str], Row]]) -> list[str]:
    """A line for each side that has four sizes or more."""
    lines = []
    for side in SCRIPTS:
        rows = [r for rows in own for (s, _), r in rows.items() if s == side]
        points = [(r.declared, r.sent) for r in rows if r.declared]
        if len({declared for declared, _ in points}) < 4:
            continue
        a, b = fit(*np.array(points).T)
        lines.append(
            f"- {side}: interface = {a:,.0f} B + {b:.4f} x declared, from {len(points)}"
            f" blocks of {len({d for d, _ in points})} sizes."
        )
    return lines


# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = dict(zip(RATES, ("#009E73", "#56B4E9", "#E69F00", "#D55E00"), strict=True))


def _figure(records: list[dict[str, Any]]) -> Figure:
    """Step time by method and rate; gcjax filled, PyTorch hollow."""
    models = [m for m in MODELS if any(r["model"] == m for r in records)]
    figure = Figure(figsize=(10, 1.2 + 3.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 1, squeeze=False, sharex=True)[:, 0]
    shown = {r["method"] for record in records for r in record["rows"]}
    names = [name for name in METHODS if name in shown]
    for ax, model in zip(axes, models, strict=True):
        for record in (r for r in records if r["model"] == model):
            for (side, name), row in rows_of(record).items():
                low, middle, high = row.step
                colour = _COLOURS[record["rate"]]
                ax.errorbar(
                    names.index(name) + (-0.12 if side == "gcjax" else 0.12),
                    middle,
                    yerr=[[middle - low], [high - middle]],
                    fmt="o" if side == "gcjax" else "s",
                    mfc=colour if side == "gcjax" else "white",
                    color=colour,
                    ms=6,
                )
        ax.set(yscale="log", ylabel="ms per step", title=_TITLE[model])
        ax.grid(axis="y", alpha=0.3)
    axes[-1].set_xticks(range(len(names)), names, rotation=35, ha="right")
    marks = [
        Line2D([], [], ls="", marker="o", color="black", label="gcjax"),
        Line2D([], [], ls="", marker="s", mfc="white", color="black", label="PyTorch"),
    ]
    rates = [rate for rate in RATES if any(r["rate"] == rate for r in records)]
    marks += [Line2D([], [], lw=4, color=_COLOURS[r], label=r) for r in rates]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    return figure
