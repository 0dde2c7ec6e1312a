"""What a plan needs to know of a model, measured by short real training runs.

`profile` trains every version for a while on samples of all nodes and fits its curve;
compresses checkpoints at several losses and fits the jumps; lets every cluster train
for an epoch to see how much its data and its exchange are worth; and counts what each
version costs. `problem` makes of that, and of a config's nodes and targets, what
`gcjax.pact.plan` plans. The loss is always that of held-out samples.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from gcjax import experiment, results
from gcjax.pact import compressors, training
from gcjax.pact.compressors import ModelCompressor, Params
from gcjax.pact.predictor import (
    Exponential,
    PowerLaw,
    fit_curve,
    fit_efficiency,
    fit_jump,
    next_loss,
)
from gcjax.pact.problem import Problem, from_config
from gcjax.pact.training import UNCOMPRESSED, Trainer
from gcjax.tasks import Task

Curve = PowerLaw | Exponential
# What levels have in configs and profiles, but not in problems.
_OURS = ("method", "aggregator", "error")
_LEAST = 0.01  # efficiency of a level


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

    Everything is fitted to the runs of all `config.profile_seeds` together; those of
    `config.test_seeds` are only there to see how well that predicts them. Plans should
    be carried out with seeds that are in neither.

    Each version's `residual` is the root mean square of the logarithm of fitted over
    measured losses, at all points of all runs: the noise of a loss measured anywhere.
    Its `late_residual` is that of the later half of each run's points, where targets
    lie and losses scatter less: a margin at the end of a plan is counted in it.

    Args:
      config: As configs/pact_fashion.py has it.
      tell: Is called with a line for each part that is done.

    Raises:
      ValueError: for a config that makes no sense.
    """
    begun = time.perf_counter()
    record = results.new_record(config, "profile") | {"runs": []}
    pilots = [_pilot(config, seed) for seed in config.profile_seeds]
    unseen = (_pilot(config, seed) for seed in config.test_seeds)
    record["histograms"] = pilots[0].trainer.histograms.tolist()
    for pilot in itertools.chain(pilots, unseen):
        for share in config.shares:
            run = _run(pilot, share) | {"seed": pilot.config.seed}
            record["runs"].append(run)
            tell(f"{run['version']}, seed {run['seed']}: loss {run['losses'][-1]:.4f}")
    record["top_loss"] = max(run["first_loss"] for run in record["runs"])
    curves, record["versions"] = _fitted(pilots, record["runs"])
    tell(f"costs: {[v['flops_per_sample'] for v in record['versions']]} FLOP a sample")
    record["switches"] = _switches(pilots, curves, record["top_loss"])
    heights = ", ".join(f"{s['jump']['height']:.3f}" for s in record["switches"])
    tell(f"switches: {heights}")
    record["tries"] = []
    for version in record["versions"]:
        record["tries"] += _tries(pilots, version)
        tell(f"{version['name']}: {len(record['tries'])} clusters and levels tried")
    curves = {version_name(share): curve for share, curve in curves.items()}
    efficiencies = _efficiencies(config, record["tries"], curves)
    record["clusters"], record["gradient_levels"] = efficiencies
    seconds = time.perf_counter() - begun
    return record | {"status": "done", "wall_seconds": seconds}


def _fitted(pilots: list[Pilot], runs: list[Mapping]) -> tuple[dict, list]:
    """Curves by share, and what is recorded of each version."""
    config, curves, versions = pilots[0].config, {}, []
    for share in config.shares:
        mine = [r for r in runs if r["version"] == version_name(share)]
        mine = [r for r in mine if r["seed"] in config.profile_seeds]
        points = ([run[name] for run in mine] for name in ("samples", "losses"))
        curves[share], off = fit_curve(*points, config.curve)
        versions.append(_version(pilots[0], share, curves[share], off))
    return curves, versions


def _switches(pilots: list[Pilot], curves, top_loss: float) -> list[dict[str, Any]]:
    made = []
    for source, target in itertools.combinations(pilots[0].config.shares, 2):
        each = [_switch(pilot, source, target, curves[target]) for pilot in pilots]
        measured = each[0] | {
            name: sum((one[name] for one in each), [])
            for name in ("before", "at_once", "effective")
        }
        made.append(measured | {"jump": _fitted_jump(measured, top_loss)})
    return made


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


def _version(pilot: Pilot, share: float, curve: Curve, off: np.ndarray) -> dict:
    counted = compressors.costs(
        pilot.compressor,
        pilot.task,
        pilot.checkpoints[share][0][1],
        pilot.trainer.pooled(0),
        pilot.trainer.optimizer,
    )
    kind = "power" if isinstance(curve, PowerLaw) else "exponential"
    size = lambda off: float(np.sqrt(np.mean(off**2)))
    return {
        "name": version_name(share),
        "share": share,
        **counted._asdict(),
        "curve": {"kind": kind, **dataclasses.asdict(curve)},
        "residual": size(off),
        "late_residual": size(off[:, off.shape[1] // 2 :]),
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


def _tries(pilots: list[Pilot], version: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Epochs of one version, in every cluster and at every gradient level.

    From `config.tried_points` checkpoints of each seed, spread over its run. Clusters
    and levels that the version leaves no memory for are left out.
    """
    config, made = pilots[0].config, []
    room = {node["name"]: node["memory_bytes"] for node in config.nodes}
    for cluster in config.clusters:
        several = len(cluster["members"]) > 1
        for level in _levels(config)[: None if several else 1]:
            coded = level.get("bytes_per_parameter", 0.0) * several
            needed = version["training_bytes"] + coded * version["parameters"]
            if needed <= min(room[m] for m in cluster["members"]):
                names = {"version": version["name"], "cluster": cluster["name"]}
                tried = _tried(pilots, version["share"], cluster, level)
                made.append(names | {"level": level["name"]} | tried)
    return made


def _levels(config) -> tuple[Mapping[str, Any], ...]:
    """The config's gradient levels, whose first one is uncompressed."""
    return config.gradient_levels or ({"name": "none"} | UNCOMPRESSED,)


def _tried(pilots: list[Pilot], share: float, cluster, level) -> dict[str, Any]:
    config = pilots[0].config
    names = [node["name"] for node in config.nodes]
    members = tuple(names.index(m) for m in cluster["members"])
    rounds = cluster.get("rounds_per_epoch", 1)
    # Batches that the checkpoints have not seen.
    seen = np.full(len(names), config.last_samples)
    found: dict[str, Any] = {"before": [], "samples": [], "after": []}
    for pilot in pilots:
        points, count = pilot.checkpoints[share], config.tried_points
        for i in range(1, count + 1):
            loss, params = points[i * len(points) // (count + 1)]
            done = pilot.trainer.epoch(params, members, 1.0, rounds, level, seen)
            found["before"].append(loss)
            found["samples"].append(sum(done.samples))
            found["after"].append(pilot.trainer.evaluate(done.params)["loss"])
    bits = 8 * pilot.compressor.parameter_bytes(params) * max(done.rounds, 1)
    sent = {"up_fraction": done.up_bits[-1], "down_fraction": done.down_bits[-1]}
    return found | {name: x / bits for name, x in sent.items()}


def _efficiencies(config, tries, curves) -> tuple[list, list]:
    """Efficiency of clusters and gradient levels, and what levels send, by version.

    Those of clusters explain how far their uncompressed epochs led along the version's
    curve; those of levels, on top of that, the epochs of all clusters of several nodes
    together. Where there is no memory for a version, the next smaller one's value
    stands in its place; no plan can use it.
    """
    columns: list[dict] = []
    for version in reversed(curves):  # from small to large
        mine = [t for t in tries if t["version"] == version]
        found = _measured(config, mine, curves[version])
        columns.append((columns[-1] if columns else {}) | found)
    columns.reverse()

    def rows(part: str) -> list[dict[str, Any]]:
        made = []
        for name in (x["name"] for x in config[part]):
            if (part, name) not in columns[-1]:
                raise ValueError(
                    f"{part}: no nodes have memory for the smallest version with "
                    f"{name!r}: remove it, or give them more"
                )
            each = [column[part, name] for column in columns]
            made.append({"name": name} | {k: [x[k] for x in each] for k in each[0]})
        return made

    return rows("clusters"), rows("gradient_levels")


def _measured(config, tries: list[Mapping], curve: Curve) -> dict:
    """By part of the problem and name, all that can be said of one version."""
    found, first = {}, _levels(config)[0]["name"]
    joined = lambda some, name: np.concatenate([t[name] for t in some])
    for tried in tries:
        if tried["level"] == first:
            parts = (tried[name] for name in ("before", "samples", "after"))
            share, error = fit_efficiency(curve, *parts)
            at = "clusters", tried["cluster"]
            found[at] = {"efficiency": share, "error": error}
    several = [c["name"] for c in config.clusters if len(c["members"]) > 1]
    for level in _levels(config):
        some = [t for t in tries if t["level"] == level["name"]]
        some = [t for t in some if t["cluster"] in several]
        if not some:
            continue
        share, error = 1.0, 0.0
        if level["name"] != first:
            plain = [found["clusters", t["cluster"]]["efficiency"] for t in some]
            useful = [
                e * np.array(t["samples"]) for e, t in zip(plain, some, strict=True)
            ]
            ends = joined(some, "before"), np.concatenate(useful), joined(some, "after")
            share, error = fit_efficiency(curve, *ends)
            share = max(share, _LEAST)
        mean = lambda name, some=some: float(np.mean([t[name] for t in some]))
        found["gradient_levels", level["name"]] = {
            "efficiency": share,
            "error": error,
            "up_fraction": mean("up_fraction"),
            "down_fraction": mean("down_fraction"),
        }
    return found


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
                {k: v for k, v in {**levels[c["name"]], **c}.items() if k not in _OURS}
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
