"""What a plan needs to know of a model, measured by short real training runs.

`profile` trains every version for a while on samples of all nodes and fits its curve;
compresses checkpoints at several losses and fits the jumps; lets every cluster train
for an epoch to see how much its data and its exchange are worth; and counts what each
version costs. `problem` makes of that, and of a config's nodes and targets, what
`gcjax.pact.plan` plans. The loss is always that of held-out samples.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from gcjax import experiment, results
from gcjax.pact import compressors, training
from gcjax.pact.compressors import ModelCompressor, Params
from gcjax.pact.predictor import Exponential, PowerLaw, fit_curve, fit_jump, next_loss
from gcjax.pact.problem import Problem, from_config
from gcjax.pact.training import Trainer
from gcjax.tasks import Task

Curve = PowerLaw | Exponential
_LEAST = 0.01  # efficiency, where a cluster's epoch gained nothing


class Pilot(NamedTuple):
    """The runs that a profile is made of."""

    config: ml_collections.ConfigDict
    task: Task
    compressor: ModelCompressor
    trainer: Trainer
    whole: Params  # shapes of the whole network
    # Of each version, losses and parameters at the points of its run.
    checkpoints: dict[float, list[tuple[float, Params]]]


def compressor_of(config: ml_collections.ConfigDict) -> ModelCompressor:
    """The compressor that a config names by a call string."""
    factories = (compressors.channels, compressors.low_rank, compressors.entries)
    names = {f.__name__: f for f in factories}
    return experiment.call(config.compressor, names, "compressor")


def version_name(share: float) -> str:
    """What a version is called in plans and records."""
    return f"{100 * share:g} %"


def profile(
    config: ml_collections.ConfigDict, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures and fits all that plans need; a record of one JSON file.

    The first of `config.profile_seeds` is what is fitted to; runs with the others are
    there to see how well that predicts them.

    Args:
      config: As configs/pact_fashion.py has it.
      tell: Is called with a line for each part that is done.

    Raises:
      ValueError: for a config that makes no sense.
    """
    begun = time.perf_counter()
    record = results.new_record(config, "profile") | {"runs": []}
    fitted_to, *unseen = (_pilot(config, seed) for seed in config.profile_seeds)
    for pilot in (fitted_to, *unseen):
        for share in config.shares:
            run = _run(pilot, share) | {"seed": pilot.config.seed}
            record["runs"].append(run)
            tell(f"{run['version']}, seed {run['seed']}: loss {run['losses'][-1]:.4f}")
        if pilot is not fitted_to:
            pilot.checkpoints.clear()
    record["top_loss"] = max(run["first_loss"] for run in record["runs"])
    runs = dict(zip(config.shares, record["runs"], strict=False))
    fits = {
        share: fit_curve(run["samples"], run["losses"], config.curve)
        for share, run in runs.items()
    }
    curves = {share: curve for share, (curve, _) in fits.items()}
    record["versions"] = [
        _version(fitted_to, share, *fit) for share, fit in fits.items()
    ]
    tell(f"costs: {[v['flops_per_sample'] for v in record['versions']]} FLOP a sample")
    record["switches"] = []
    for i, source in enumerate(config.shares):
        for target in config.shares[i + 1 :]:
            measured = _switch(fitted_to, source, target, curves[target])
            jump = _fitted_jump(measured, record["top_loss"])
            record["switches"].append(measured | {"jump": jump})
    tell(
        "switches: "
        + ", ".join(f"{s['jump']['height']:.3f}" for s in record["switches"])
    )
    record["clusters"], record["gradient_levels"] = _exchanges(fitted_to, curves)
    tell(f"clusters: {[(c['name'], c['efficiency']) for c in record['clusters']]}")
    seconds = time.perf_counter() - begun
    return record | {"status": "done", "wall_seconds": seconds}


def _pilot(config: ml_collections.ConfigDict, seed: int) -> Pilot:
    config = ml_collections.ConfigDict(config)
    config.seed = seed
    task, compressor = experiment.build_task(config), compressor_of(config)
    trainer = training.trainer(config, task, compressor)
    whole = jax.eval_shape(task.init, jax.random.key(0))[0]
    return Pilot(config, task, compressor, trainer, whole, {})


def _run(pilot: Pilot, share: float) -> dict[str, Any]:
    """Trains one version on samples of all nodes, compressed before it begins."""
    config, trainer = pilot.config, pilot.trainer
    params = pilot.task.init(jax.random.key(config.seed))[0]
    params = pilot.compressor.compress(params, pilot.whole, share)
    first, size = trainer.evaluate(params)["loss"], _size(trainer)
    ends = np.geomspace(config.first_samples, config.last_samples, config.points)
    run: dict[str, Any] = {"samples": [], "losses": [], "accuracy": []}
    kept, done = [], 0
    for end in np.unique(np.round(ends / size).astype(int)).tolist():
        params = trainer.fit(params, map(trainer.pooled, range(done, end)))
        done, found = end, trainer.evaluate(params)
        run["samples"].append(end * size)
        run["losses"].append(found["loss"])
        run["accuracy"].append(found["accuracy"])
        kept.append((found["loss"], params))
    pilot.checkpoints[share] = kept
    return {"version": version_name(share), "first_loss": first} | run


def _size(trainer: Trainer) -> int:
    """Samples of a pooled batch."""
    return len(jax.tree.leaves(trainer.pooled(0))[0])


def _version(pilot: Pilot, share: float, curve: Curve, residual: float) -> dict:
    counted = compressors.costs(
        pilot.compressor,
        pilot.task,
        pilot.checkpoints[share][0][1],
        pilot.trainer.pooled(0),
        pilot.trainer.optimizer,
    )
    kind = "power" if isinstance(curve, PowerLaw) else "exponential"
    return {
        "name": version_name(share),
        "share": share,
        **counted._asdict(),
        "curve": {"kind": kind, **dataclasses.asdict(curve)},
        "residual": residual,
    }


def _switch(pilot: Pilot, source: float, target: float, curve: Curve) -> dict:
    """Compresses checkpoints, and sees at once and after some training what was lost.

    A network that was just compressed recovers faster than a smaller one learns that
    has come to the same loss from above. What a plan should reckon with is therefore
    the *effective* loss: that from which the target's own curve leads, in as many
    samples, to where the compressed network is after `config.recovery_samples`.
    """
    config, trainer = pilot.config, pilot.trainer
    compress = pilot.compressor.compress
    points, size = pilot.checkpoints[source], _size(trainer)
    steps = max(1, round(config.recovery_samples / size))
    found: dict[str, Any] = {"before": [], "at_once": [], "effective": []}
    at = np.unique(np.linspace(0, len(points) - 1, config.jump_points).astype(int))
    for i in at.tolist():
        before, params = points[i]
        params = compress(params, pilot.whole, target)
        found["before"].append(before)
        found["at_once"].append(trainer.evaluate(params)["loss"])
        # Batches that the checkpoint has not seen.
        first = round(config.last_samples / size)
        params = trainer.fit(params, map(trainer.pooled, range(first, first + steps)))
        later = trainer.evaluate(params)["loss"]
        progress = float(curve.progress(later)) - steps * size
        if isinstance(curve, PowerLaw):  # whose loss is endless at 0
            progress = max(progress, 1e-9)
        found["effective"].append(float(curve.loss(progress)))
    flops = compressors.switch_flops(
        pilot.compressor, points[0][1], pilot.whole, target
    )
    ends = {"source": version_name(source), "target": version_name(target)}
    return ends | {"flops": flops} | found


def _fitted_jump(measured: Mapping[str, Any], top_loss: float) -> dict[str, float]:
    before, after = measured["before"], measured["effective"]
    return dataclasses.asdict(fit_jump(before, np.minimum(after, top_loss), top_loss))


def _exchanges(pilot: Pilot, curves: Mapping[float, Curve]) -> tuple[list, list]:
    """Efficiency of clusters and gradient levels, and what levels send.

    Every cluster trains the smallest version, which all can hold, for an epoch from two
    checkpoints; how far that led along the curve, for each sample, is its efficiency,
    at most 1. That of a level is relative to uncompressed gradients. It
    is taken to be the same for other versions. Bits are counted for each version.
    """
    config, trainer = pilot.config, pilot.trainer
    smallest = config.shares[-1]
    names = [node["name"] for node in config.nodes]
    points = pilot.checkpoints[smallest]
    starts = [points[len(points) // 3], points[2 * len(points) // 3]]
    seen = np.full(len(names), config.last_samples)

    def gain(members, rounds, method) -> float:
        """Effective samples per sample, the mean of both checkpoints."""
        gains = []
        for loss, params in starts:
            done = trainer.epoch(params, members, 1.0, rounds, method, seen)
            later = trainer.evaluate(done.params)["loss"]
            gains.append(efficiency(curves[smallest], loss, sum(done.samples), later))
        return float(np.mean(gains))

    clusters, relative = [], {level["name"]: [] for level in config.gradient_levels}
    for cluster in config.clusters:
        members = tuple(names.index(m) for m in cluster["members"])
        rounds = cluster.get("rounds_per_epoch", 1)
        plain = gain(members, rounds, "dense")
        clusters.append({"name": cluster["name"], "efficiency": plain})
        for level in config.gradient_levels if len(members) > 1 else ():
            method = level["method"]
            own = plain if method == "dense" else gain(members, rounds, method)
            relative[level["name"]].append(min(own / plain, 1.0))
    return clusters, [
        _level(pilot, level, relative) for level in config.gradient_levels
    ]


def _level(pilot: Pilot, level: Mapping[str, Any], relative: Mapping) -> dict[str, Any]:
    """Bits of a level that the aggregator declares in one round, by version."""
    config, found = pilot.config, relative[level["name"]]
    names = [node["name"] for node in config.nodes]
    cluster = next(c for c in config.clusters if len(c["members"]) > 1)
    members = tuple(names.index(m) for m in cluster["members"])
    sizes = pilot.trainer.histograms.sum(1)[list(members)]
    # One round of few samples, for the bits alone.
    part = config.batch_size / sizes.max()
    up, down = [], []
    for share in config.shares:
        _, params = pilot.checkpoints[share][0]
        method, seen = level["method"], np.zeros(len(names), int)
        done = pilot.trainer.epoch(params, members, part, 1, method, seen)
        bits = 8 * pilot.compressor.parameter_bytes(params) * done.rounds
        up.append(done.up_bits[1] / bits)
        down.append(done.down_bits[1] / bits)
    mean = float(np.mean(found)) if found else 1.0
    return {
        "name": level["name"],
        "up_fraction": up,
        "down_fraction": down,
        "efficiency": [mean] * len(up),
    }


def efficiency(curve: Curve, loss: float, samples: int, later: float) -> float:
    """Share of the samples that count, if they led from a loss to a later one.

    At least 0.01, where nothing was gained, and 1 where the curve promises no more.
    """
    least, most = (next_loss(curve, loss, share * samples) for share in (_LEAST, 1.0))
    if later >= least:
        return _LEAST
    if later <= most:
        return 1.0
    effective = curve.progress(later) - curve.progress(loss)
    return float(np.clip(effective / samples, _LEAST, 1.0))


# --- From a profile to a problem. -----------------------------------------------------


def problem(
    config: ml_collections.ConfigDict,
    record: Mapping[str, Any],
    histograms: np.ndarray,
    start_loss: float,
) -> Problem:
    """What is planned: a config's nodes and targets, and a profile's measurements.

    Args:
      config: Its nodes lack histograms, its clusters efficiencies.
      record: From `profile`.
      histograms: int[N, classes], samples of each node and label.
      start_loss: Of the model as training starts.

    Raises:
      ValueError: for a profile of other versions, clusters or levels.
    """
    shares = [v["share"] for v in record["versions"]]
    if shares != [*config.shares]:
        raise ValueError(
            f"the profile has versions {shares}, the config {list(config.shares)}: "
            "profile again, with scripts/pact_profile.py"
        )
    measured = _by_name(record, "clusters", config.clusters)
    levels = _by_name(record, "gradient_levels", config.gradient_levels)
    pick = lambda source, *names: {k: source[k] for k in names}
    return from_config(
        {
            "nodes": [
                {**node, "histogram": tuple(counts)}
                for node, counts in zip(config.nodes, histograms.tolist(), strict=True)
            ],
            "links": [dict(link) for link in config.links],
            "clusters": [
                {**c, **pick(measured[c["name"]], "efficiency")}
                for c in config.clusters
            ],
            "versions": [
                pick(v, "name", *compressors.Costs._fields, "curve")
                for v in record["versions"]
            ],
            "switches": [
                pick(s, "source", "target", "flops", "jump") for s in record["switches"]
            ],
            "gradient_levels": [
                {k: v for k, v in {**levels[c["name"]], **c}.items() if k != "method"}
                for c in config.gradient_levels
            ],
            "top_loss": record["top_loss"],
            "start_loss": min(start_loss, record["top_loss"]),
            "start_version": version_name(config.shares[0]),
        }
        | {
            name: config[name]
            for name in (
                *("start_cluster", "max_loss", "deadline_s", "max_epochs"),
                *("data_fractions", "sample_bytes"),
            )
        }
    )


def _by_name(record: Mapping, part: str, wanted) -> dict[str, Mapping]:
    found = {x["name"]: x for x in record[part]}
    missing = [x["name"] for x in wanted if x["name"] not in found]
    if missing:
        raise ValueError(
            f"the profile knows no {part} {missing}: profile again, with "
            "scripts/pact_profile.py"
        )
    return found


def prediction_errors(
    curve: Curve, samples: list[int], losses: list[float], points: int | None
) -> np.ndarray:
    """How far a curve is off that starts from each loss that was measured in a run.

    Args:
      curve: Of the run's version.
      samples: [n] at which the losses were measured.
      losses: [n]
      points: How many points ahead; None for the last one.

    Returns:
      Predicted less measured losses, one for each point that has one so far ahead.
    """
    x, y = np.asarray(samples, float), np.asarray(losses, float)
    last = len(x) - 1
    ahead = [(i, last if points is None else i + points) for i in range(last)]
    pairs = [(i, j) for i, j in ahead if j <= last]
    return np.array([next_loss(curve, y[i], x[j] - x[i]) - y[j] for i, j in pairs])
