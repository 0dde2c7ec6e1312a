"""Steps of gcjax and of PyTorch's DDP, side by side, over links with limited rates.

    python scripts/bench_network.py                # all; needs root and PyTorch
    python scripts/bench_network.py --quick        # smoke run over loopback, no root
    python scripts/bench_network.py --report       # table and figure from the records

Four processes on each side, one for each worker, in four network namespaces; the other
side's processes wait meanwhile. Same models, parameters, batches and optimizer (SGD);
one compute thread in each process, the same malloc settings. Rates are visited one
after the other, and at each rate all methods in every round, gcjax and PyTorch
alternating. Building, compiling and warming up happen before, without a limit.

A step's time is the wall clock of a rank from the call to the result, without a
barrier, and its median over ranks. The exchange is a step less the median step without
exchange of the same side, model and rate.
"""

import contextlib
import json
import os
import platform
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import cluster, command, network, report  # noqa: E402

PROCESSES = 4
SCHEMA = 1
SCRIPTS = {"gcjax": "_jax_worker.py", "torch": "_ddp_worker.py"}
MODELS = ("mlp", "cnn")
RATES = ("unlimited", "1gbit", "100mbit", "10mbit")


class Method(NamedTuple):
    """A row of the table: what each side calls it, None where it has no such thing."""

    gcjax: str | None
    torch: str | None = None


# Levels are selected at every 20th step, so that one in twenty contains a selection.
_SHARES = "collective='reduce_scatter'"
METHODS = {
    "none": Method("none", "none"),
    "dense f32": Method("compressed_mean(identity())", "ddp"),
    "bf16": Method("compressed_mean(cast(), collective='ring')", "bf16"),
    "fp16": Method(None, "fp16"),
    "8 bits": Method(f"compressed_mean(qsgd(8), {_SHARES})"),
    "4 bits": Method(f"compressed_mean(qsgd(4), {_SHARES})"),
    "top-k 1 %": Method("compressed_mean(top_k(0.01, tolerance=0.02))"),
    "PowerSGD r4": Method("power_sgd(4, error='aggregate')", "power_sgd 4"),
    "PowerSGD r2": Method("power_sgd(2, error='aggregate')", "power_sgd 2"),
    "PowerSGD r1": Method("power_sgd(1, error='aggregate')", "power_sgd 1"),
    "L-GreCo 4 bits": Method(
        f"adapt(compressed_mean(qsgd(), {_SHARES}, spacing=1.2), lgreco(4), 20)"
    ),
    "L-GreCo top-k 1 %": Method(
        "adapt(compressed_mean(top_k(tolerance=0.02), spacing=1.2), lgreco(0.01), 20)"
    ),
    "L-GreCo PowerSGD r4": Method(
        "adapt(power_sgd((1, 2, 3, 4, 5, 6, 8), spacing=1.2), lgreco(4), 20)"
    ),
}
WARM_UP = 5  # steps, past PyTorch's two dense ones; of adaptive methods:
WARM_UP_ADAPTIVE = 22  # past the first selection

# One compute thread in each process, on both sides, and memory that malloc keeps:
# fresh pages for every large buffer would cost more than the computation.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "NPROC": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


# --- Processes. -----------------------------------------------------------------------


class Loopback:
    """Stands in for `cluster.Network` where no root is: no limits, bytes of all."""

    processes = PROCESSES

    def address(self, rank: int) -> str:
        """The host itself."""
        del rank
        return "127.0.0.1"

    def command(self, rank: int, argv: list[str]) -> list[str]:
        """Runs a command as it is."""
        del rank
        return argv

    def set_rate(self, rate: str) -> None:
        """Does nothing; the only rate is unlimited."""
        del rate

    def sent_bytes(self, rank: int) -> float:
        """The mean over ranks."""
        del rank
        return cluster.sent_bytes(interface="lo") / PROCESSES


class Side:
    """The worker processes of one side."""

    def __init__(self, name: str, model: str, network: Any, folder: Path):
        self.name, self.network = name, network
        self.log = folder / f"{name}.log"
        host = network.address(0)
        address = f"{host}:{_free_port()}"
        environment = os.environ | SETTINGS
        if not isinstance(network, Loopback):
            environment |= {"GLOO_SOCKET_IFNAME": "eth0"}  # only PyTorch looks at it
        self.workers = []
        with open(self.log, "w") as log:
            for rank in range(network.processes):
                argv = [sys.executable, str(Path(__file__).parent / SCRIPTS[name])]
                argv += [f"--rank={rank}", f"--processes={network.processes}"]
                argv += [f"--address={address}", f"--model={model}"]
                self.workers.append(
                    subprocess.Popen(
                        network.command(rank, argv),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                        text=True,
                        start_new_session=True,  # Ctrl-C is for us, we end them
                    )
                )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.stdout.close()

    def replies(self, seconds: float = 900) -> list[dict]:
        """One reply of every rank.

        Raises:
          OSError: if a rank ended, or none answered for so many seconds.
        """
        found: dict[int, dict] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, worker in enumerate(self.workers):
                waiting.register(worker.stdout, selectors.EVENT_READ, rank)
            while len(found) < len(self.workers):
                events = waiting.select(seconds)
                if not events:
                    missing = sorted(set(range(len(self.workers))) - set(found))
                    raise OSError(f"{self.name}: no answer of ranks {missing}")
                for key, _ in events:
                    line = key.fileobj.readline()
                    if not line:
                        raise OSError(
                            f"{self.name}: rank {key.data} ended:\n{self._last_lines()}"
                        )
                    found[key.data] = json.loads(line)
                    waiting.unregister(key.fileobj)
        return [found[rank] for rank in range(len(self.workers))]

    def steps(self, method: str, count: int) -> list[dict]:
        """Lets all ranks do steps of a method."""
        request = json.dumps({"method": method, "steps": count}) + "\n"
        for worker in self.workers:
            with contextlib.suppress(BrokenPipeError):  # `replies` tells why
                worker.stdin.write(request)
                worker.stdin.flush()
        return self.replies()

    def sent(self) -> float:
        """Bytes that a rank sent so far, mean over ranks, once all have gone out."""
        time.sleep(0.5)
        ranks = range(self.network.processes)
        return float(np.mean([self.network.sent_bytes(rank) for rank in ranks]))

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-12:])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


# --- Measurement. ---------------------------------------------------------------------


class Block(NamedTuple):
    """Steps of one method of one side at one rate in one round."""

    ms: list[float]  # of each step
    sent: float  # bytes of a rank and step at the interface
    declared: float  # bytes of a rank and step that the side says it sent
    loss: float  # of the last step, mean over ranks


class Plan(NamedTuple):
    """What is to be measured, and how often."""

    sides: list[str]
    methods: list[str]
    rates: list[str]
    rounds: int
    count: int  # steps of a method in a round
    at_least: int  # of them, where they are slow
    seconds: float  # beyond which they are


def measure(side: Side, method: str, plan: Plan) -> Block:
    """Measures a method in one round, after steps that are not counted."""
    one = max(r["seconds"][0] for r in side.steps(method, 1))
    if one < 0.5:  # the first step after a pause is slower
        one = max(r["seconds"][-1] for r in side.steps(method, 2))
    count = min(plan.count, max(plan.at_least, int(plan.seconds / one)))
    before = side.sent()
    replies = side.steps(method, count)
    sent = (side.sent() - before) / count
    ms = 1e3 * np.median([r["seconds"] for r in replies], axis=0)
    declared = float(np.mean([r["declared"] for r in replies]))
    loss = float(np.mean([r["loss"][-1] for r in replies]))
    return Block(ms.tolist(), sent, declared, loss)


def work(plan: Plan, backwards: bool = False) -> Iterator[tuple[str, str, str]]:
    """What there is to measure, sides alternating: (side, name, the side's call)."""
    for name in plan.methods:
        for side in plan.sides[:: -1 if backwards else 1]:
            text = getattr(METHODS[name], side)
            if text is not None:
                yield side, name, text


def bench(model: str, plan: Plan, network: Any, folder: Path) -> Iterator[dict]:
    """Measures a model; yields a record for each rate."""
    with contextlib.ExitStack() as stack:
        start = lambda side: stack.enter_context(Side(side, model, network, folder))
        sides = {name: start(name) for name in plan.sides}
        for side in sides.values():
            side.replies()  # they are ready
        network.set_rate("unlimited")
        warm = warm_up(model, plan, sides)

        def expected(rate: str, side: str, name: str) -> float:
            seconds, declared = warm[side, name]
            one = seconds + 8 * declared / bits_per_second(rate)
            steps = min(plan.count, max(plan.at_least, plan.seconds / one))
            return 1.5 + one * (1 + steps)

        total = sum(expected(rate, *key) for rate in plan.rates for key in warm)
        bar = tqdm(total=round(plan.rounds * total), bar_format=_BAR, desc=model)
        stack.enter_context(bar)
        for rate in plan.rates:
            network.set_rate(rate)
            blocks: dict[tuple[str, str], list[Block]] = {key: [] for key in warm}
            for i in range(plan.rounds):
                for side, name, text in work(plan, backwards=i % 2 > 0):
                    bar.set_postfix_str(f"{rate}, {side} {name}")
                    blocks[side, name].append(measure(sides[side], text, plan))
                    bar.update(expected(rate, side, name))
            yield record_of(model, rate, plan, network, blocks)


def warm_up(model: str, plan: Plan, sides: dict[str, Side]) -> dict:
    """Builds and compiles everything; (seconds, declared bytes) of a step of each.

    Raises:
      ValueError: if the two sides' losses differ where they must not.
    """
    warm, losses = {}, {}
    bar = tqdm(list(work(plan)), desc=f"{model}: warm-up", unit="method")
    for side, name, text in bar:
        count = WARM_UP_ADAPTIVE if text.startswith("adapt(") else WARM_UP
        replies = sides[side].steps(text, count)
        seconds = float(np.median([r["seconds"][2:] for r in replies]))
        warm[side, name] = seconds, replies[0]["declared"][-1]
        losses.setdefault(name, []).append(np.mean([r["loss"] for r in replies], 0))
    for name in ("none", "dense f32"):
        both = losses.get(name, [])
        if len(both) == 2 and not np.allclose(*both, rtol=1e-3):
            raise ValueError(f"{name}: the sides' losses differ: {both[0]}, {both[1]}")
    return warm


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"


def bits_per_second(rate: str) -> float:
    """A rate as a number."""
    units = {"mbit": 1e6, "gbit": 1e9}
    return np.inf if rate == "unlimited" else float(rate[:-4]) * units[rate[-4:]]


def record_of(
    model: str, rate: str, plan: Plan, network: Any, blocks: dict
) -> dict[str, Any]:
    """The record of a model at a rate."""
    rows = []
    for (side, name), rounds in blocks.items():
        rows.append(
            {
                "side": side,
                "method": name,
                "call": getattr(METHODS[name], side),
                "ms": [float(f"{v:.4g}") for b in rounds for v in b.ms],
                "interface_bytes": round(np.mean([b.sent for b in rounds])),
                "declared_bytes": round(np.mean([b.declared for b in rounds])),
                "loss": float(f"{rounds[-1].loss:.4g}"),
            }
        )
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("jax", "jaxlib")}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["torch"] = metadata.version("torch")
    return {
        "schema": SCHEMA,
        "model": model,
        "rate": rate,
        "processes": PROCESSES,
        "rounds": plan.rounds,
        "network": "loopback" if isinstance(network, Loopback) else "namespaces",
        "settings": SETTINGS,
        "versions": versions,
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": rows,
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Writes a record, one line for each row."""
    rows = ",\n".join("  " + json.dumps(row) for row in record["rows"])
    text = json.dumps(record | {"rows": []}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n")


# --- Report. --------------------------------------------------------------------------


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


def chosen(flag: str, allowed: Iterable[str]) -> list[str]:
    """The values of a list flag, in their usual order.

    Raises:
      ValueError: for one that is not allowed.
    """
    given, allowed = flags.FLAGS[flag].value, list(allowed)
    for value in given:
        if value not in allowed:
            raise ValueError(f"--{flag}: {value!r} is none of {', '.join(allowed)}")
    return [value for value in allowed if value in given]


def main() -> None:
    """Measures, then writes table and figure."""
    given = flags.FLAGS
    runs, out = Path(given.runs), Path(given.out)
    per_round = lambda steps: -(-steps // given.rounds)
    models, plan = (
        chosen("models", MODELS),
        Plan(
            sides=chosen("sides", SCRIPTS),
            methods=chosen("methods", METHODS),
            rates=chosen("rates", RATES),
            rounds=given.rounds,
            count=per_round(given.steps),
            at_least=per_round(given.min_steps),
            seconds=given.seconds,
        ),
    )
    if not given.report:
        try:
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if given.quick:
                    network, plan = (
                        Loopback(),
                        plan._replace(rates=["unlimited"], rounds=1, count=4),
                    )
                else:
                    network = stack.enter_context(cluster.Network(PROCESSES))
                for model in models:
                    for record in bench(model, plan, network, folder):
                        name = f"{model}-{record['rate']}.json"
                        write(record, runs / "bench_network" / name)
        except KeyboardInterrupt:
            sys.exit("stopped; rates that were finished have their records")
    for path in write_report(runs, out):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "Few steps over loopback; needs no root.")
    flags.DEFINE_bool("report", False, "Only write table and figure.")
    flags.DEFINE_list("models", list(MODELS), "Models.")
    flags.DEFINE_list("rates", list(RATES), "Rates of the links.")
    flags.DEFINE_list("sides", list(SCRIPTS), "Sides.")
    flags.DEFINE_list("methods", list(METHODS), "Rows of the table.")
    flags.DEFINE_integer("steps", 20, "Timed steps of a method.", lower_bound=1)
    flags.DEFINE_integer("min_steps", 4, "Where they are slow.", lower_bound=1)
    flags.DEFINE_integer("rounds", 2, "In how many rounds.", lower_bound=1)
    flags.DEFINE_float("seconds", 20, "A method's time in a round.", lower_bound=0)
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("out", "results", "Folder of tables/ and figures/.")
    command.run(main)
