"""The training loop of an experiment: one run of one method, and its record."""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from gcjax import (
    checkpoint,
    cluster,
    collectives,
    experiment,
    results,
    splits,
    tasks,
    workers,
)
from gcjax.base import Aggregator, Words
from gcjax.experiment import AXIS


class RunState(NamedTuple):
    """All that a run carries from step to step; what a checkpoint holds."""

    params: Any
    opt_state: Any
    model_state: Any
    step: jax.Array  # int32


class StepMetrics(NamedTuple):
    """What one step reports; equal on all workers."""

    loss: jax.Array  # float32, mean over workers
    levels: jax.Array  # int32[L]
    words: Words  # one worker's part in collectives, model state included
    dense: jax.Array  # bool
    skipped: jax.Array  # int32, so far


def worker_step(
    task: tasks.Task,
    tx: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    weights: tuple[float, ...] | None,
    state: RunState,
    batch: Any,
) -> tuple[RunState, StepMetrics]:
    """One step of one worker; the same function under every mapping."""
    local, local_model = workers.as_local((state.params, state.model_state), AXIS)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    key = jax.random.fold_in(key, lax.axis_index(AXIS))
    gradient = jax.value_and_grad(task.loss, has_aux=True)

    # Accumulate before the one update, which communicates: gradients of equal weights,
    # or the change of the weights, whose negative stands in the gradient's place.
    parts = config.local_steps or config.micro_batches
    chunks = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    scale = config.local_learning_rate if config.local_steps else 1 / parts
    at, loss, grads, model_state = local, 0.0, None, local_model
    for i in range(parts):
        part = jax.tree.map(lambda x, i=i: x[i], chunks)
        (value, model_state), more = gradient(
            at, model_state, part, jax.random.fold_in(key, i)
        )
        loss += value / parts
        more = jax.tree.map(lambda g: g * scale, more)
        grads = more if grads is None else jax.tree.map(jnp.add, grads, more)
        if config.local_steps:
            at = jax.tree.map(jnp.subtract, local, grads)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    info = optax.tree.get(opt_state, "info")
    words = info.words
    if jax.tree.leaves(model_state):
        # Batch statistics differ from worker to worker; their mean is shared.
        means = jax.tree.map(
            lambda x: collectives.all_reduce(x, AXIS, "model_state"), model_state
        )
        is_pair = lambda x: isinstance(x, tuple)
        model_state = jax.tree.map(lambda p: p[0], means, is_leaf=is_pair)
        for pair in jax.tree.leaves(means, is_leaf=is_pair):
            words += pair[1]
    if weights is not None:  # a server comes after the workers, its loss is ignored
        positions = lax.axis_size(AXIS)
        share = np.zeros(positions, np.float32)
        share[: len(weights)] = np.array(weights) * positions
        loss *= jnp.asarray(share)[lax.axis_index(AXIS)]
    loss, more = collectives.all_reduce(loss, AXIS, "loss")
    words += more
    new = RunState(
        optax.apply_updates(state.params, updates),
        opt_state,
        model_state,
        state.step + 1,
    )
    return new, StepMetrics(loss, info.levels, words, info.dense, info.skipped)


class Run(NamedTuple):
    """A run that is ready to step."""

    task: tasks.Task
    aggregator: Aggregator
    state: RunState
    specs: Any  # which part of the state belongs to each worker
    step: Callable  # (state, batch) -> (state, StepMetrics), jitted
    place: Callable  # batch of NumPy arrays -> arrays where the step wants them
    batches: Callable  # step -> batch


def device_mesh(config: ml_collections.ConfigDict, server: bool = False) -> Mesh | None:
    """The devices of a config's workers and server; None if workers are simulated."""
    n, count = config.num_workers + server, jax.device_count()
    if config.mapping == "simulated":
        return None
    each = "one for each worker" + " and one for the server" * server
    if config.mapping == "processes" and count != n:
        raise ValueError(
            f"config.num_workers = {config.num_workers} but the {jax.process_count()} "
            f"processes have {count} devices, {each}; set config.num_workers to "
            f"{count - server}"
        )
    if count < n:
        raise ValueError(
            f"config.num_workers = {config.num_workers} but JAX sees {count} devices, "
            f"{each}; lower it or set config.mapping to 'simulated'"
        )
    devices = jax.devices()[:n]
    return jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def build(config: ml_collections.ConfigDict, method: str) -> Run:
    """Builds and initialises a run.

    Raises:
      ValueError: for a config that makes no sense; the text names the field.
    """
    n = config.num_workers
    if config.mapping not in ("simulated", "devices", "processes"):
        raise ValueError(
            "config.mapping must be 'simulated', 'devices' or 'processes', got "
            f"{config.mapping!r}"
        )
    if n < 1 or config.steps < 1 or config.batch_size_per_worker < 1:
        raise ValueError(
            "config.num_workers, steps and batch_size_per_worker must be >= 1"
        )
    if config.local_steps and config.micro_batches > 1:
        raise ValueError("config.local_steps goes with config.micro_batches = 1 only")
    for name in ("micro_batches", "local_steps"):
        if config[name] and config.batch_size_per_worker % config[name]:
            raise ValueError(
                f"config.{name} = {config[name]} does not divide "
                f"batch_size_per_worker = {config.batch_size_per_worker}"
            )
    task = experiment.build_task(config)
    p = experiment.weights(config, task)
    made = experiment.build_aggregator(config, method, p)
    weighted, with_server = made.exchange.weights, made.exchange.server
    mesh = device_mesh(config, with_server)
    tx = optax.chain(made, experiment.build_optimizer(config))
    across = dict(axis_name=AXIS, num_workers=n, mesh=mesh, check_vma=not weighted)

    def init(key: jax.Array) -> RunState:
        params, model_state = task.init(key)
        return RunState(params, tx.init(params), model_state, jnp.int32(0))

    key = jax.random.key(config.seed)
    specs = workers.state_specs(jax.eval_shape(init, key), AXIS)
    where = (
        jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        if mesh is not None
        else None
    )
    make = workers.over_workers(init, (P(),), specs, **across)
    step = functools.partial(worker_step, task, tx, config, weighted)
    step = workers.over_workers(step, (specs, P(AXIS)), (specs, P()), **across)
    place = jax.device_put
    if mesh is not None:
        place = functools.partial(cluster.place, shardings=NamedSharding(mesh, P(AXIS)))
    batches = task.batches(config.seed, n, config.batch_size_per_worker)
    if with_server and mesh is not None:  # its batch is anybody's
        of_server = lambda x: np.concatenate([x, x[:1]])
        of_workers = batches
        batches = lambda step: jax.tree.map(of_server, of_workers(step))
    return Run(
        task,
        made,
        jax.jit(make, out_shardings=where)(key),
        specs,
        jax.jit(step, donate_argnums=0),
        place,
        batches,
    )


def train(
    config: ml_collections.ConfigDict,
    method: str,
    workdir: Path,
    body: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Trains one method and writes `record.json` and `metrics.jsonl` into `workdir`.

    Of several processes all call it, and the first one evaluates and writes. With
    checkpoints, `resume` continues to the result of a run that was not interrupted, bit
    for bit.

    Returns:
      The record. Its status is "done", "diverged" (a loss that is not finite, from
      then on) or, in the file alone, "failed" (an exception, which is raised).
    """
    workdir.mkdir(parents=True, exist_ok=True)
    record = results.new_record(config, method)
    begun = time.perf_counter()
    try:
        (body or _train)(config, method, workdir, record)
    except BaseException as error:
        record["status"] = "failed"
        record["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        record["wall_seconds"] = time.perf_counter() - begun
        if _first():
            results.write(record, workdir / "record.json")
    return record


def _first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def _train(config, method: str, workdir: Path, record: dict[str, Any]) -> None:
    run = build(config, method)
    describe(run, config, record)
    state, log = run.state, Log(config, record)
    saver = checkpoint.Saver(workdir / "checkpoints", log.identity())
    if config.resume and (found := saver.restore(state, run.specs)):
        state, (log.totals, record["series"]) = found
    first = int(state.step)
    lines = _lines(workdir / "metrics.jsonl" if _first() else Path(os.devnull), first)
    bar = tqdm(
        total=config.steps,
        initial=first,
        desc=record["label"],
        unit="step",
        disable=not _first(),
    )
    # With many steps in flight XLA's collectives on CPU sometimes hang.
    in_flight = 1 if jax.default_backend() == "cpu" else 2
    with lines, bar:
        for step in range(first, config.steps):
            batch = run.place(run.batches(step))
            log.wait(in_flight)
            state, metrics = run.step(state, batch)
            log.add(step, metrics)
            bar.update()
            done = step + 1
            due = lambda every, done=done: every > 0 and done % every == 0
            evaluate = due(config.eval_every) or done == config.steps
            if not (evaluate or due(config.checkpoint_every) or due(config.log_every)):
                continue
            line = log.flush()
            if evaluate and _first():
                line |= log.evaluate(run.task, state)
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
            if not np.isfinite(line["loss"]):
                record["status"] = "diverged"
                break
            if due(config.checkpoint_every):
                saver.save(done, state, (log.totals, record["series"]))
    saver.close()
    log.finish()
    if record["status"] == "running":
        record["status"] = "done"


def _lines(path: Path, first: int) -> Any:
    """Opens the metrics file, without lines of steps that will be done again."""
    kept = []
    if first and path.exists():
        old = path.read_text().splitlines(keepends=True)
        kept = [x for x in old if x.endswith("\n") and json.loads(x)["step"] <= first]
    path.write_text("".join(kept))
    return open(path, "a")


def describe(run: Run, config, record: dict[str, Any]) -> None:
    """Adds to a record what the run consists of."""
    made = run.aggregator
    layout = made.layout(run.state.params)
    if made.exchange.weights is not None:
        record["weights"] = list(made.exchange.weights)
    if run.task.shards is not None:  # samples of each worker and label
        shards = run.task.shards(config.seed, config.num_workers)
        record["profile"] = splits.profile(shards, run.task.labels).tolist()
    record["layers"] = list(layout.paths)
    record["layer_sizes"] = layout.sizes.tolist()
    record["ladder"] = list(made.exchange.levels)
    record["num_params"] = sum(x.size for x in jax.tree.leaves(run.state.params))
    record["metric"] = run.task.metric


class Log:
    """Collects metrics on the device and brings them to the host now and then."""

    def __init__(self, config: ml_collections.ConfigDict, record: dict[str, Any]):
        self.config, self.record = config, record
        self.pending: list[tuple[int, StepMetrics]] = []
        # Exact sums over all steps, of one worker.
        self.totals = {"steps": 0, "payload_bits": 0, "wire_bits": 0.0, "skipped": 0}
        # Wall clock of training, without compilation and evaluation.
        self.totals |= {"seconds": 0.0, "eval_seconds": []}
        # With a parameter server: what each worker sent it, and got from it.
        self.totals |= {"upload_bits": [], "download_bits": 0}
        self.since: float | None = None
        names = ("step", "loss", "total_bits", "levels", "levels_step")
        for name in (*names, "eval_step", "eval_bits"):
            record["series"][name] = []

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "method": self.record["method"],
            "aggregator": self.config.aggregator,
            "ladder": self.record["ladder"],
            "layers": self.record["layers"],
            "num_params": self.record["num_params"],
            "num_workers": self.config.num_workers,
            "weights": self.record.get("weights"),
        }

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes note of a step without waiting for it."""
        if self.since is None:  # the first step: it is compiled, and not yet done
            self.since = time.perf_counter()
        self.pending.append((step, metrics))

    def wait(self, in_flight: int) -> None:
        """Waits until fewer than `in_flight` steps are running."""
        if len(self.pending) >= in_flight:
            jax.block_until_ready(self.pending[-in_flight][1])

    def flush(self) -> dict[str, Any]:
        """Fetches what is pending; returns a line for metrics.jsonl."""
        series, totals = self.record["series"], self.totals
        fetched = jax.device_get(self.pending)
        now = time.perf_counter()
        totals["seconds"], self.since = totals["seconds"] + now - self.since, now
        for step, metrics in fetched:
            totals["steps"] += 1
            totals["payload_bits"] += results.payload_bits(metrics.words)
            totals["wire_bits"] += results.wire_bits(
                metrics.words, self.config.num_workers
            )
            uploads = 32 * np.atleast_1d(metrics.words.uploaded)
            totals["upload_bits"] = (uploads + (totals["upload_bits"] or 0)).tolist()
            totals["download_bits"] += 32 * int(metrics.words.downloaded)
            levels = [-1] * len(metrics.levels) if metrics.dense else metrics.levels
            levels = [int(v) for v in levels]
            if not series["levels"] or series["levels"][-1] != levels:
                series["levels"].append(levels)
                series["levels_step"].append(step)
        totals["skipped"] = int(fetched[-1][1].skipped)
        line = {
            "step": fetched[-1][0] + 1,
            "loss": float(np.mean([m.loss for _, m in fetched])),
            "total_bits": totals["wire_bits"],
            "skipped": totals["skipped"],
        }
        for name in ("step", "loss", "total_bits"):
            series[name].append(line[name])
        self.pending = []
        return line

    def evaluate(self, task: tasks.Task, state: RunState) -> dict[str, float]:
        """Evaluates on held-out data; returns fields for metrics.jsonl."""
        metrics = task.evaluate(*cluster.local((state.params, state.model_state)))
        series = self.record["series"]
        series["eval_step"].append(self.totals["steps"])
        series["eval_bits"].append(self.totals["wire_bits"])
        if any(self.totals["upload_bits"]):  # of each worker so far
            series.setdefault("uploaded", []).append(self.totals["upload_bits"])
        self.totals["eval_seconds"].append(round(self.totals["seconds"], 3))
        for name, value in metrics.items():
            series.setdefault(f"eval_{name}", []).append(value)
        self.since = time.perf_counter()
        return {f"eval_{k}": v for k, v in metrics.items()}

    def finish(self) -> None:
        """Fills in the record's `final`."""
        totals, series, n = self.totals, self.record["series"], self.config.num_workers
        steps, size = totals["steps"], self.record["num_params"]
        # Not among the series: those are the same whenever a run is done again.
        self.record["eval_seconds"] = totals["eval_seconds"]
        dense = 32 * 2 * (n - 1) / n * size * steps
        final = {
            k.removeprefix("eval_"): v[-1]
            for k, v in series.items()
            if k.startswith("eval_") and k not in ("eval_step", "eval_bits") and v
        }
        ratio = lambda bits: bits / totals["wire_bits"] if totals["wire_bits"] else None
        self.record["final"] = final | {
            "steps": steps,
            "skipped_steps": totals["skipped"],
            "payload_bits": totals["payload_bits"],
            "wire_bits": totals["wire_bits"],
            "total_bits": totals["wire_bits"],
            "bits_per_step": totals["wire_bits"] / steps,
            "compression_ratio": ratio(dense),
            "compression_ratio_bf16": ratio(dense / 2),
        }
        if totals["download_bits"] or any(totals["upload_bits"]):
            self.record["final"] |= {
                name: totals[name] for name in ("upload_bits", "download_bits")
            }
