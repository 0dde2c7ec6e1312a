"""A parameter server over real links of different rates: bytes and seconds of a round.

Question: does each worker's interface send what its own upload has, and no more; and
does a round take as long as the slowest worker's model says?
Command: python scripts/bench_uploads.py (Linux, root)
Expected: bytes on each interface = a + b * declared with b in 1.00-1.05; what was
measured is in results/tables/bench_uploads.md.
Time: about three minutes on 2 cores.

Four workers and a server, each a process in a network namespace of its own, train an
MLP of 2.4 M parameters. Every method does one step to compile and 20 that count.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
from absl import flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _jax_worker  # noqa: E402
import _network_worker as shared  # noqa: E402

import gcjax  # noqa: E402
from gcjax import cluster, command, experiment, results  # noqa: E402
from gcjax.network import rounds  # noqa: E402
from gcjax.selectors import workers as rules  # noqa: E402

AXIS = "workers"
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
MBITS = (40, 20, 10, 5)  # of the workers' links; the server's is not limited
LATENCY_S = 3e-4
STEPS = 20
DOWNLOAD = "top_k(0.01)"  # what the server sends, so that uploads decide
BITS = 48 * 2.4e6  # of an upload of all entries, for BCRS
METHODS = (
    "uniform(0.002)",
    "uniform(0.01)",
    "uniform(0.05)",
    "bcrs(0.01)",
    "steered(0.01, max_ratio=0.05)",
)


def allocations():
    """What METHODS may name."""
    speeds = 1e6 * np.array(MBITS)
    bcrs = rules.bcrs(speeds, np.full(len(speeds), LATENCY_S), BITS, 0.01)
    return experiment.allocations(WEIGHTS) | {"bcrs": lambda ratio: gcjax.ratios(bcrs)}


# --- A worker, or the server. ---------------------------------------------------------


def work(rank: int, processes: int, address: str, folder: Path) -> None:
    """Does all methods' steps and writes what this process saw."""
    jax.distributed.initialize(address, processes, rank)
    mesh = jax.make_mesh((processes,), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere, own = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    one_each = lambda x: jax.make_array_from_process_local_data(own, x[None])
    same = lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda i: x[i])
    batches = jax.tree.map(one_each, shared.batches("mlp", rank))
    start = shared.init("mlp")
    seen = {}
    for method in METHODS:
        print(method, flush=True)
        seen[method] = measure(method, mesh, jax.tree.map(same, start), batches)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    jax.distributed.shutdown()


def measure(method: str, mesh, params, batches) -> dict:
    """Seconds and bytes of this process's steps."""
    made = gcjax.parameter_server(
        experiment.call(method, allocations(), "method"),
        WEIGHTS,
        AXIS,
        download=experiment.call(DOWNLOAD, experiment.COMPRESSORS, "download"),
    )
    tx = optax.chain(made, optax.sgd(shared.LEARNING_RATE))
    specs = gcjax.state_specs(jax.eval_shape(tx.init, params), AXIS)
    over = dict(mesh=mesh, check_vma=False)
    state = jax.jit(gcjax.over_workers(tx.init, (P(),), specs, **over))(params)

    def worker_step(params, state, batch):
        grads = jax.grad(_jax_worker.loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        words = optax.tree.get(state, "info").words
        return optax.apply_updates(params, updates), state, words

    step = jax.jit(
        gcjax.over_workers(
            worker_step, (P(), specs, P(AXIS)), (P(), specs, P()), **over
        )
    )
    seen = {"seconds": [], "sent": [], "uploaded": [], "downloaded": [], "gathered": []}
    for i in range(1 + STEPS):
        before, begun = cluster.sent_bytes(), time.perf_counter()
        params, state, words = jax.block_until_ready(
            step(params, state, batches[i % len(batches)])
        )
        if not i:
            continue
        seen["seconds"].append(time.perf_counter() - begun)
        seen["sent"].append(cluster.sent_bytes() - before)
        for name in ("uploaded", "downloaded", "gathered"):
            seen[name].append(np.asarray(getattr(words, name)).tolist())
    return seen


# --- The run of all. ------------------------------------------------------------------


def run() -> dict:
    """Launches workers and server, and returns the record."""
    count = len(MBITS)
    rates = [*(f"{m}mbit" for m in MBITS), "unlimited"]
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster.Network(count + 1, rates) as network,
    ):
        common = [
            sys.executable,
            __file__,
            f"--processes={count + 1}",
            f"--address={network.address(0)}:29500",
            f"--folder={folder}",
        ]
        commands = [
            network.command(rank, [*common, f"--rank={rank}"])
            for rank in range(count + 1)
        ]
        status = cluster.run(commands)
        if status:
            raise subprocess.CalledProcessError(status, common)
        seen = [
            json.loads((Path(folder) / f"{rank}.json").read_text())
            for rank in range(count + 1)
        ]
    return {
        "mbits": MBITS,
        "weights": WEIGHTS.tolist(),
        "steps": STEPS,
        "download": DOWNLOAD,
        "jax": jax.__version__,
        "methods": {method: [one[method] for one in seen] for method in METHODS},
    }


# --- The table. -----------------------------------------------------------------------


def write_report(runs_dir: Path, out: Path) -> list[Path]:
    """Writes the table from the record, if there is one; returns its path."""
    path = runs_dir / "bench_uploads" / "uploads.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    written = out / "tables" / "bench_uploads.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(table(record))
    return [written]


def table(record: dict) -> str:
    """The record in Markdown."""
    count = len(record["mbits"])
    links = rounds.constant(1e6 * np.array(record["mbits"]), LATENCY_S)
    rows, declared, sent = [], [], []
    for method, seen in record["methods"].items():
        words = np.mean(seen[0]["uploaded"], axis=0)
        others = count * np.mean(seen[0]["gathered"])  # counts, to each
        kilobytes = [np.mean(one["sent"]) / 1e3 for one in seen]
        declared += (4 * (words + others)).tolist()
        sent += [1e3 * k for k in kilobytes[:count]]
        down = 32 * np.mean(seen[0]["downloaded"])
        seconds = np.median(seen[0]["seconds"])
        model = rounds.round_seconds(links, 32 * words, down, 0.0)
        each = rounds.upload_seconds(links, 32 * words)
        in_turn = model + each.sum() - each.max()
        sizes = 4 * words / 1e3, kilobytes, down / 8e3
        rows.append((method, *sizes, seconds, model, in_turn))
    slope, constant = np.polyfit(declared, sent, 1)
    compute = min(row[4] - row[5] for row in rows)
    lines = [
        "<!-- Generated by `python scripts/report.py` from "
        "results/runs/bench_uploads/uploads.json; do not edit. -->",
        "",
        "# Uploads of their own size, over links of their own rate",
        "",
        f"{count} workers with links of {', '.join(map(str, record['mbits']))} Mbit/s "
        f"and weights {', '.join(map(str, record['weights']))}, and a server without a "
        f"limit: {count + 1} processes in network namespaces. MLP of 2.4 M weights; "
        f"the server sends `{record['download']}` of its sum. Medians of "
        f"{record['steps']} steps; JAX {record['jax']}, gloo, one machine, 2 cores. "
        "Interfaces count headers of all layers, acknowledgements of the download and "
        "the coordinator's heartbeats.",
        "",
        f"Bytes on a worker's interface and step = {constant / 1e3:.1f} kB + "
        f"{slope:.4f} x declared, over {len(sent)} workers and methods. The model of a "
        f"round (slowest upload + slowest download) leaves {compute:.3f} s for "
        "computing where that was least; it is added to all. XLA on CPUs does the "
        "uploads of a program one after the other, which the last column takes into "
        "account: their sum in place of the slowest.",
        "",
        "| method | declared upload, kB | on the interface, kB | download, kB "
        "| round, s | model, s | model, in turn, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, up, kilobytes, down, seconds, model, in_turn in rows:
        lines.append(
            f"| `{method}` | {', '.join(f'{u:.1f}' for u in up)} | "
            f"{', '.join(f'{k:.1f}' for k in kilobytes[:count])} | {down:.1f} | "
            f"{seconds:.3f} | {model + compute:.3f} | {in_turn + compute:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The whole, or with a rank one process of it."""
    asked = flags.FLAGS
    if asked.rank is not None:
        work(asked.rank, asked.processes, asked.address, Path(asked.folder))
        return
    out = Path(asked.out)
    path = out / "runs" / "bench_uploads" / "uploads.json"
    results.write_json(run(), path)
    for written in write_report(out / "runs", out):
        print(written)


if __name__ == "__main__":
    flags.DEFINE_integer("rank", None, "Of one process; set by the script itself.")
    flags.DEFINE_integer("processes", None, "How many; set by the script itself.")
    flags.DEFINE_string("address", None, "host:port of rank 0; set by the script.")
    flags.DEFINE_string("folder", None, "For what processes saw; set by the script.")
    flags.DEFINE_string("out", "results", "Folder of results.")
    command.run(main)
