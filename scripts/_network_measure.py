"""Measures for bench_network.py: the processes of both sides, and records of steps."""

import contextlib
import json
import os
import platform
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import cluster  # noqa: E402

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
        address = f"{host}:{cluster.free_port()}"
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
