"""Which aggregators pay for a model: their codecs measured, their steps predicted."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gcjax import exchange, experiment, network, results, tasks
from gcjax.base import Aggregator
from gcjax.compressors import quantize, sparsify

BASELINES = ("dense bf16", "dense f32")
# What every model is tried with: quantisers in the form that does not grow with N.
FAMILIES: dict[str, Callable[[], Aggregator]] = {
    "dense f32": lambda: exchange.compressed_mean(quantize.identity()),
    "dense bf16": lambda: scattered(quantize.cast()),
    "8 bits": lambda: scattered(quantize.qsgd(8)),
    "4 bits": lambda: scattered(quantize.qsgd(4)),
    "top-k 1 %": lambda: exchange.compressed_mean(sparsify.top_k(0.01)),
    "PowerSGD r1": lambda: exchange.power_sgd(1),
    "PowerSGD r2": lambda: exchange.power_sgd(2),
    "PowerSGD r4": lambda: exchange.power_sgd(4),
}


def scattered(compressor: Any) -> Aggregator:
    """Mean of compressed gradients by reduce-scatter."""
    return exchange.compressed_mean(compressor, collective="reduce_scatter")


def aggregators(
    config: ml_collections.ConfigDict, task: tasks.Task
) -> dict[str, Aggregator]:
    """All families, and the config's own methods.

    Raises:
      ValueError: for a parameter server, whose workers are not alike.
    """
    made = {name: make() for name, make in FAMILIES.items()}
    p = experiment.weights(config, task)
    for method in config.methods:
        if method != "dense":
            own = experiment.build_aggregator(config, method, p)
            if own.exchange.weights is not None:
                raise ValueError(
                    f"config.aggregator = {config.aggregator!r}: only exchanges among "
                    "equal workers are surveyed; of uploads see gcjax.network.rounds"
                )
            made[results.label(config, method)] = own
    return made


def compute_seconds(config: ml_collections.ConfigDict, task: tasks.Task) -> float:
    """Measures loss and gradient of one worker's batch: the median of five steps."""
    params, model_state = task.init(jax.random.key(config.seed))
    batch = task.batches(config.seed, 1, config.batch_size_per_worker)(0)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    step = jax.jit(jax.grad(task.loss, has_aux=True))
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(step(params, model_state, batch, jax.random.key(0)))
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


def table(
    codecs: dict[str, network.Codec],
    num_workers: int,
    links: dict[str, network.Link],
    compute: float,
) -> str:
    """Bits, times and break-even bandwidths, one line for each aggregator.

    Args:
      codecs: By name; the baselines must be among them.
      num_workers: N.
      links: By name. Of a single one, latency and overhead also count where an
        aggregator breaks even with a baseline; of several, those of "1gbit".
      compute: Seconds of a step without exchange.
    """
    copying = np.median([codec.copy_seconds for codec in codecs.values()])
    at = next(iter(links.values())) if len(links) == 1 else network.LINKS["1gbit"]
    lines = [("", "Mbit/step", "codec ms", "copies", *(f"{k} ms" for k in links))]
    lines[0] += tuple(f"beats {name} below" for name in BASELINES)
    for name, codec in codecs.items():
        line = [name, f"{network.sent_bits(codec, num_workers) / 1e6:.3f}"]
        line += [f"{1e3 * codec.seconds:.1f}"]
        line += [f"{codec.seconds / copying:.1f}"]
        for link in links.values():
            own, other = (
                network.step_seconds(c, num_workers, link, compute)
                for c in (codec, codecs[BASELINES[0]])
            )
            text = f"{1e3 * own:.4g}"
            line.append(f"({text})" if own > other else text)
        for other in BASELINES:
            pays = network.break_even(codec, codecs[other], num_workers, at)
            line.append("-" if name == other else _bandwidth(pays))
        lines.append(tuple(line))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _bandwidth(bits_per_s: float) -> str:
    if not bits_per_s:
        return "does not pay"
    if np.isinf(bits_per_s):
        return "any"
    return f"{bits_per_s / 1e6:,.4g} Mbit/s"
