"""Times compressors against one copy of the gradient, and compilation against layers.

Question: what do encoding, decoding and the new error cost, in copies of the gradient?
Command: python scripts/bench_codecs.py
Expected: 4 bits at most 3 copies without and 4 with the error, 5 where levels change;
top-k 1 % at most 6. What was measured is in results/tables/bench_codecs.md.
Time: about five minutes on 2 cores.

Every part is compiled by itself, as the collective between them does, and writes into
buffers that it is given, so that no time goes into fresh pages of memory; for the
temporaries the program sets glibc's variables for itself and starts again.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

TUNED = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}
if __name__ == "__main__" and os.environ.keys().isdisjoint(TUNED):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

# Modules lie beside this folder, wherever the command is given.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gcjax  # noqa: E402
from gcjax import command, experiment, results  # noqa: E402
from gcjax.base import Keys, Layout, level_index  # noqa: E402

# Compressor, the level that is timed, and what the table says of it.
CASES = {
    "4 bits, nearest": ("qsgd(4, rounding='nearest')", 4),
    "4 bits": ("qsgd(4)", 4),
    "8 bits": ("qsgd(8)", 8),
    "4 bits, levels that change": ("qsgd((2, 3, 4, 5, 6, 7, 8))", 4),
    "bf16": ("cast()", 16),
    "signs": ("sign(1024)", 1),
    "natural": ("natural()", 9),
    "top-k 1 %, within 2 %": ("top_k(0.01, tolerance=0.02)", 0.01),
    "top-k 1 %, exact": ("top_k(0.01)", 0.01),
    # Of normal numbers as many reach it as top-k keeps.
    "threshold 1 %": ("threshold(2.5758)", 0.01),
    "random-k 1 %": ("random_k(0.01)", 0.01),
}
ADAPTIVE = {
    "qsgd": ("compressed_mean(qsgd())", "lgreco(default=4)"),
    "top_k": ("compressed_mean(top_k(tolerance=0.02))", "lgreco(default=0.01)"),
    "power_sgd": ("power_sgd((1, 2, 4, 8))", "lgreco(default=4)"),
}


def median_ms(fn: Callable, args: list, into: dict[int, int]) -> tuple[float, float]:
    """Median and quartile range in ms of a compiled function.

    Args:
      fn: Function of arrays that returns a tuple.
      args: Its arguments.
      into: Output number -> number of the argument whose buffer it takes over.
    """
    compiled = jax.jit(fn, donate_argnums=tuple(into.values()), keep_unused=True)
    args, times = list(args), []
    for _ in range(flags.FLAGS.repeats + 2):
        begun = time.perf_counter()
        out = jax.block_until_ready(compiled(*args))
        times.append(1e3 * (time.perf_counter() - begun))
        for result, arg in into.items():
            args[arg] = out[result]
    low, middle, high = np.percentile(times[2:], [25, 50, 75])
    return float(middle), float(high - low)


def copies(size: int) -> dict[str, float]:
    """One copy of the gradient, in ms: by XLA, and by one thread of the host."""
    x = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    # A barrier, lest the copy become an alias.
    copy = lambda x, out: (lax.optimization_barrier(x) * 1,)
    by_xla, _ = median_ms(copy, [x, jnp.zeros_like(x)], {0: 1})
    source, target, times = np.asarray(x), np.empty(size, np.float32), []
    for _ in range(flags.FLAGS.repeats):
        begun = time.perf_counter()
        np.copyto(target, source)
        times.append(1e3 * (time.perf_counter() - begun))
    return {"xla": by_xla, "memcpy": float(np.median(times))}


def layout_of(compressor: gcjax.Compressor, size: int, layers: int) -> Layout:
    """A gradient of `size` elements in layers of equal size."""
    shapes = ((size // layers,),) * layers
    return Layout(tuple(map(str, range(layers))), shapes, compressor.row)


def time_codec(text: str, level: object) -> dict[str, float]:
    """Encoding, with and without the new error, and decoding of one or four, in ms."""
    c = experiment.call(text, experiment.COMPRESSORS, "compressor")
    layout = layout_of(c, flags.FLAGS.size, flags.FLAGS.layers)
    at = np.full(layout.num_layers, level_index(c.levels, level))
    capacity = int(c.words(layout)[np.arange(at.size), at].sum())
    levels = jnp.asarray(at, jnp.int32)
    rng = np.random.default_rng(0)
    x = layout.flatten(
        [jnp.asarray(rng.normal(size=s), jnp.float32) for s in layout.shapes]
    )
    keys = Keys(*jax.random.split(jax.random.key(0)))

    # Levels are data, as in training: constants would be folded into the program.
    def encode(x, levels, state, message, error):
        del message, error
        units, sent, new = c.encode(layout, x, levels, keys, state)
        message, shared = c.pack(layout, units, levels, capacity)
        return message, x - sent, new, shared

    def only_encode(x, levels, state, message):
        message, _, new, shared = encode(x, levels, state, message, None)
        return message, new, shared

    def decode(messages, levels, shared, mean):
        del mean
        return (c.decode(layout, messages, levels, shared),)

    state = c.init(layout)
    for _ in range(2):  # a state of later steps
        message, error, state, shared = jax.jit(encode)(x, levels, state, None, None)
    sent = int(jnp.sum(x != error))
    spare = lambda: jnp.zeros_like(message)
    decoder = lambda count: [
        jnp.stack([message] * count),
        levels,
        shared,
        jnp.zeros_like(x),
    ]
    out = {
        "encode": median_ms(only_encode, [x, levels, state, spare()], {0: 3}),
        "encode and error": median_ms(
            encode, [x, levels, state, spare(), x + 0], {0: 3, 1: 4}
        ),
        "decode": median_ms(decode, decoder(1), {0: 3}),
    }
    if not c.linear:
        out["decode mean of 4"] = median_ms(decode, decoder(4), {0: 3})
    return {k: v[0] for k, v in out.items()} | {
        "spread": max(v[1] for v in out.values()),
        "message_words": capacity,
        "entries_changed": sent,
    }


def library_top_k() -> float:
    """`jax.lax.top_k` of the magnitudes, 1 %, in ms: what thresholds stand for."""
    x = jax.random.normal(jax.random.key(0), (flags.FLAGS.size,), jnp.float32)
    top = lambda x: lax.top_k(jnp.abs(x), flags.FLAGS.size // 100)
    return median_ms(top, [x], {})[0]


def compile_seconds(aggregator: str, selector: str, layers: int) -> float:
    """Tracing and compiling one adaptive step of 2 workers, 2 M elements in all."""
    aggregator = experiment.call(aggregator, experiment.AGGREGATORS, "aggregator")
    aggregator = gcjax.adapt(
        aggregator, experiment.call(selector, experiment.SELECTORS, "method")
    )
    side = int(np.sqrt(2e6 / layers))
    params = {str(i): jnp.zeros((side, side)) for i in range(layers)}
    specs = gcjax.state_specs(jax.eval_shape(aggregator.init, params))
    across = dict(num_workers=2)
    init = gcjax.over_workers(aggregator.init, (P(),), specs, **across)
    state = jax.eval_shape(init, params)
    grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct((2, *p.shape), p.dtype), params)
    step = lambda state, grads: aggregator.update(grads, state)
    step = gcjax.over_workers(step, (specs, P("workers")), (P(), specs), **across)
    begun = time.perf_counter()
    jax.jit(step).lower(state, grads).compile()
    return time.perf_counter() - begun


def measure() -> dict:
    """The record of all measurements."""
    record = {
        "schema": 1,
        "size": flags.FLAGS.size,
        "layers": flags.FLAGS.layers,
        "repeats": flags.FLAGS.repeats,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "copy_ms": copies(flags.FLAGS.size),
        "codecs": {},
        "compile_seconds": {},
    }
    for name, case in CASES.items():
        record["codecs"][name] = time_codec(*case)
        print(f"{name}: {record['codecs'][name]}", flush=True)
    record["lax_top_k_ms"] = library_top_k()
    record["copy_ms_after"] = copies(flags.FLAGS.size)
    for family, case in ADAPTIVE.items():
        of_layers = {n: compile_seconds(*case, int(n)) for n in flags.FLAGS.compile}
        record["compile_seconds"][family] = of_layers
        print(f"{family}: compiled in {of_layers} s", flush=True)
    return record


def table(record: dict) -> str:
    """The record as Markdown."""
    before, after = record["copy_ms"], record["copy_ms_after"]
    unit = (before["memcpy"] + after["memcpy"]) / 2
    bandwidth = 8e-6 * record["size"] / np.mean([before["xla"], after["xla"]])
    lines = [
        "# Codecs against one copy of the gradient",
        "",
        f"{record['size']:,} float32 in {record['layers']} layers, {record['device']}, "
        f"{record['cores']} cores, jax {record['jax']}; medians of {record['repeats']} "
        "runs, in units of one `memcpy` of the gradient by one thread "
        f"({before['memcpy']:.1f} ms before, {after['memcpy']:.1f} ms after). A copy "
        f"by XLA with all threads took {before['xla']:.1f} and {after['xla']:.1f} ms, "
        f"{bandwidth:.1f} GB/s read and written; the last column is in units of that. "
        "Command: `python scripts/bench_codecs.py`.",
        "",
        "| codec | encode | with new error | decode | decode of 4 | encode + decode | "
        "with error | spread | with error, XLA copies |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_xla = np.mean([before["xla"], after["xla"]])
    for name, ms in record["codecs"].items():
        total = ms["encode and error"] + ms["decode"]
        cells = [
            ms["encode"],
            ms["encode and error"],
            ms["decode"],
            ms.get("decode mean of 4"),
            ms["encode"] + ms["decode"],
            total,
            ms["spread"],
        ]
        text = ["" if c is None else f"{c / unit:.2f}" for c in cells]
        lines.append(f"| {name} | {' | '.join(text)} | {total / by_xla:.1f} |")
    top = record["lax_top_k_ms"] / unit
    lines += [
        "",
        f"`jax.lax.top_k` alone, of the magnitudes, 1 %: {top:.1f} copies.",
        *_threshold(record["codecs"]),
        "",
        "Entries that were sent, of 1 % wanted: "
        + ", ".join(
            f"{name} {c['entries_changed'] / (0.01 * record['size']):.3f}"
            for name, c in record["codecs"].items()
            if "1 %" in name
        )
        + ".",
        "",
        "Seconds to trace and compile one adaptive step (2 simulated workers, 2 M "
        "elements), by number of layers:",
        "",
        "| family | "
        + " | ".join(next(iter(record["compile_seconds"].values())))
        + " |",
        "|---|" + "---|" * len(next(iter(record["compile_seconds"].values()))),
    ]
    for family, seconds in record["compile_seconds"].items():
        cells = " | ".join(f"{s:.1f}" for s in seconds.values())
        lines.append(f"| {family} | {cells} |")
    return "\n".join(lines) + "\n"


def _threshold(codecs: dict[str, dict[str, float]]) -> list[str]:
    """What it saves to choose by a given threshold, if that was measured."""
    if "threshold 1 %" not in codecs:
        return []
    encode = lambda name: codecs[name]["encode"]
    names = [name for name in codecs if name.startswith("top-k 1 %")]
    ratios = [encode(name) / encode("threshold 1 %") for name in names]
    text = ", ".join(f"{n} {r:.1f}" for n, r in zip(names, ratios, strict=True))
    return ["", f"Encoding takes, in units of encoding by a given threshold: {text}."]


def write_report(runs: Path, out: Path) -> list[Path]:
    """Writes `tables/bench_codecs_<device>.md` for every record; returns paths."""
    written = []
    for path in sorted((runs / "bench_codecs").glob("*.json")):
        written.append(out / "tables" / f"bench_codecs_{path.stem}.md")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(table(json.loads(path.read_text())))
    return written


def main() -> None:
    """Measures, and writes record and table."""
    runs = Path(flags.FLAGS.out) / "runs"
    if not flags.FLAGS.report:
        record = measure()
        path = runs / "bench_codecs" / f"{jax.devices()[0].platform}.json"
        results.write_json(record, path)
    for path in write_report(runs, Path(flags.FLAGS.out)):
        print(path.read_text())


if __name__ == "__main__":
    flags.DEFINE_integer("size", 10_000_000, "Elements of the gradient.")
    flags.DEFINE_integer("layers", 60, "Layers that they are in.")
    flags.DEFINE_integer("repeats", 21, "Runs of each part; medians are shown.")
    flags.DEFINE_list("compile", ["20", "60", "200"], "Layers to compile for.")
    flags.DEFINE_string("out", "results", "Folder of results.")
    flags.DEFINE_bool("report", False, "Only write the table from the record.")
    command.run(main)
