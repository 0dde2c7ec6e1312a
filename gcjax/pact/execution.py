"""Plans that are carried out: real training, and what it really costs.

`execute` is to `scripts/train.py` what `gcjax.train.train` is, for configs of plans. It
plans with a profile (`gcjax.pact.profiling`), trains epoch by epoch on the nodes that
the plan names (`gcjax.pact.training`), compresses the model where the plan switches and
hands it over where it moves. Losses are measured on held-out samples after every epoch.
Seconds and joules are those of the node model (`gcjax.pact.tables`), of FLOPs that XLA
counts in the step that is trained, of samples that were trained on and of bits that
were declared: what differs from the plan is what was done, not how it is priced.

**Re-planning** (`config.replan`). After every epoch the curve of its version is fitted
again to the losses measured so far, and the rest is planned anew from the measured
loss, time left and epochs left; training stops as soon as the target is met. Where no
plan is found any more, one is made with the profile's own curves, as one bad epoch can
make the fitted ones too gloomy. Where there is none either, the action of the least
predicted loss in the time left is taken, the epoch is marked as a fall-back, and the
next one is planned again. Where no epoch fits into the time left, the run ends and the
record says that the target was missed. Without re-planning the whole plan is carried
out, whatever the losses are.

**A margin** (`config.margin`, in standard deviations). Losses scatter around the curves
by the profile's `late_residual`; the largest of all versions is counted with, as the
plan decides which one is trained last. Every plan aims so much below the target, or by
as much of it as leaves a plan (`gcjax.pact.with_margin`); whether the target was met is
judged by the target itself.

References:
  Malandrino et al., "Matching DNN Compression and Cooperative Training with Resources
  and Data Availability", INFOCOM 2023, arXiv:2212.02304, plan once, as far as their
  abstract tells, which is all that was at hand; re-planning is our addition.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from gcjax import experiment, results, train
from gcjax.pact import compressors, joint, profiling, training
from gcjax.pact.baselines import BASELINES
from gcjax.pact.compressors import Costs, ModelCompressor, Params
from gcjax.pact.horizon import History, Standing, next_step, refitted, with_margin
from gcjax.pact.planning import attempt
from gcjax.pact.problem import Cluster, Problem
from gcjax.pact.schedule import Plan, Step, action_of
from gcjax.pact.tables import (
    Work,
    epoch_cost,
    hand_over_cost,
    switch_cost,
    tabulate,
)
from gcjax.pact.training import Trainer
from gcjax.tasks import Task

PLAN = "plan"  # the method that is no baseline
_NOISE = 0.01  # least relative standard deviation of a measured loss
_PROOF_S = 2.0  # processor time that a search beyond the solver may take


class Site(NamedTuple):
    """Where a plan is carried out; nothing in it changes."""

    config: ml_collections.ConfigDict
    task: Task
    compressor: ModelCompressor
    trainer: Trainer
    whole: Params  # shapes of the whole network
    problem: Problem  # as it is at the start
    left: Problem | None  # what of it may be planned, None where that is nothing
    noise: dict[str, float]  # of each version's losses, relative
    margin: float  # how far below the target plans aim, relative
    costs: Callable[[str, Params], Costs]  # of a version, counted once


class State(NamedTuple):
    """Where a run stands between two epochs."""

    params: Params
    version: str
    cluster: str
    loss: float  # measured
    seconds: float  # since the start
    joules: float
    seen: np.ndarray  # int[N], samples that each node has trained on
    history: History


def trainer_for(config: ml_collections.ConfigDict) -> Callable[..., dict[str, Any]]:
    """What trains a config: `execute` if it describes nodes, else `train.train`."""
    return execute if "nodes" in config else train.train


def execute(
    config: ml_collections.ConfigDict, method: str, workdir: Path
) -> dict[str, Any]:
    """Plans and trains; writes `record.json` and `metrics.jsonl` into `workdir`.

    Args:
      config: As configs/pact_fashion.py has it.
      method: "plan"; a name in `gcjax.pact.BASELINES`; or a way to plan versions and
        gradient levels, in `gcjax.pact.joint.WAYS`.
      workdir: Folder for what is written.

    Returns:
      The record. Its status is "done" or, in the file alone, "failed". Where the method
      has no plan that meets the target nothing is trained, and `plan` is None.

    Raises:
      ValueError: for a config or a profile that makes no sense.
      OSError: without the profile.
    """
    names = (PLAN, *BASELINES, *joint.WAYS)
    if method not in names:
        raise ValueError(f"config.methods may be {', '.join(names)}, got {method!r}")
    for name in ("replan", "margin"):
        if config[name] and method in BASELINES:
            raise ValueError(
                f"config.{name} goes with plans, not with the rule {method!r}"
            )
    return train.train(config, method, workdir, _execute)


def _execute(config, method: str, workdir: Path, record: dict[str, Any]) -> None:
    site, state = _begin(config, method)
    record |= {"epochs": [], "replan": config.replan, "start_loss": state.loss}
    record["histograms"] = site.trainer.histograms.tolist()
    again, below = " again each epoch" * config.replan, " with margin"
    record["label"] = method + again + below * bool(config.margin)
    planned, margin = _first_plan(site, method)
    record |= {"margin": site.margin, "aimed_loss": _aimed(site, margin)}
    record["plan"] = [list(step) for step in planned.steps] if planned else None
    total = len(planned.steps) if planned else 0
    bar = tqdm(total=total, desc=record["label"], unit="epoch")
    with open(workdir / "metrics.jsonl", "w") as lines, bar:
        while planned:
            begun = time.process_time()
            done = len(record["epochs"])
            step, how, margin = _next(site, state, planned, margin, done)
            if step is None:
                break
            planning_s = time.process_time() - begun
            state, line = carry_out(site, state, step)
            line |= {"how": how, "planning_cpu_s": planning_s}
            line["aimed_loss"] = _aimed(site, margin)
            record["epochs"].append(line)
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            bar.update()
            bar.set_postfix_str(f"loss {state.loss:.3f}", refresh=False)
    record["final"] = _final(site, state, record)
    record["status"] = "done"


def _begin(config, method: str) -> tuple[Site, State]:
    """Loads profile and data, and makes the model."""
    path = Path(config.profile)
    if not path.exists():
        raise FileNotFoundError(
            f"no profile {path}: make it with scripts/pact_profile.py and this config"
        )
    profile = results.read(path)
    task, compressor = experiment.build_task(config), profiling.compressor_of(config)
    trainer = training.trainer(config, task, compressor)
    params = task.init(jax.random.key(config.seed))[0]
    whole = jax.eval_shape(lambda: params)
    params, seen = _given(config, trainer, params)
    loss = trainer.evaluate(params)["loss"]
    problem = profiling.problem(config, profile, trainer.histograms, loss)
    counted: dict[str, Costs] = {}

    def costs(version: str, params: Params) -> Costs:
        if version not in counted:
            batch, tx = trainer.pooled(0), trainer.optimizer
            counted[version] = compressors.costs(compressor, task, params, batch, tx)
        return counted[version]

    noise = {v["name"]: max(v["residual"], _NOISE) for v in profile["versions"]}
    margin = config.margin * max(v["late_residual"] for v in profile["versions"])
    if not 0 <= margin < 1:
        raise ValueError(
            f"config.margin = {config.margin} aims {100 * margin:.0f} % below the "
            "target: it must be at least 0, and leave a loss to aim at"
        )
    parts = config, task, compressor, trainer, whole
    left = _left(problem, method) if method in joint.WAYS else problem
    site = Site(*parts, problem, left, noise, margin, costs)
    start = problem.start_version, problem.start_cluster, loss, 0.0, 0.0
    return site, State(params, *start, seen, {})


def _given(config, trainer: Trainer, params: Params) -> tuple[Params, np.ndarray]:
    """The whole network as a plan finds it, and samples that each node has seen."""
    names = [node["name"] for node in config.nodes]
    cluster = next(c for c in config.clusters if c["name"] == config.start_cluster)
    members = tuple(names.index(m) for m in cluster["members"])
    seen = np.zeros(len(names), np.int64)
    for _ in range(config.start_epochs):
        rounds = cluster.get("rounds_per_epoch", 1)
        level = training.UNCOMPRESSED
        done = trainer.epoch(params, members, 1.0, rounds, level, seen)
        params = done.params
        seen[list(members)] += done.samples
    return params, seen


def _first_plan(site: Site, method: str) -> tuple[Plan | None, float]:
    """The plan, and its margin below the target."""
    if method in BASELINES:
        return BASELINES[method](site.problem), 0.0
    if site.left is None:
        return None, 0.0
    return with_margin(site.left, site.margin, _PROOF_S)


def _left(problem: Problem, way: str) -> Problem | None:
    """What a way to plan leaves of the problem; plans that it builds on are made."""

    def first(way: str) -> Plan | None:
        left = _left(problem, way)
        return left and attempt(left, _PROOF_S)

    return joint.restricted(problem, way, first)


def _aimed(site: Site, margin: float) -> float:
    return site.problem.max_loss * (1 - margin)


def _next(
    site: Site, state: State, planned: Plan, margin: float, done: int
) -> tuple[Step | None, str, float]:
    """The next epoch, how it came about, and the margin of the plan that it is from.

    It is "planned", "re-planned", "from the profile" or "fall-back".
    """
    if not site.config.replan:
        left = planned.steps[done:]
        return (left[0] if left else None), "planned", margin
    if not done and planned.steps:
        return planned.steps[0], "planned", margin
    now = Standing(state.version, state.cluster, state.loss, state.seconds, done)
    again = refitted(site.left, state.history, site.noise)
    chosen = next_step((again, site.left), now, _PROOF_S, site.margin)
    how = ("re-planned", "from the profile", "fall-back")[chosen.candidate]
    return chosen.step, how, chosen.margin


def carry_out(site: Site, state: State, step: Step) -> tuple[State, dict[str, Any]]:
    """Does one epoch: switch, hand-over, training, measurement.

    Returns:
      The state after it, and a line for the record.
    """
    problem = site.problem
    cluster = next(c for c in problem.clusters if c.name == step.cluster)
    params, before, moved, joules, seconds = _brought(site, state, step, cluster)
    names = [node.name for node in problem.nodes]
    members = tuple(names.index(m) for m in cluster.members)
    level = _level(site.config, step.level)
    coding = level.get("flops_per_parameter", 0.0)
    rounds = cluster.rounds_per_epoch
    done = site.trainer.epoch(params, members, step.fraction, rounds, level, state.seen)
    costs = site.costs(step.version, params)
    flops = [
        costs.flops_per_sample * n + done.rounds * coding * costs.parameters
        for n in done.samples
    ]
    bits = np.add(done.up_bits, done.down_bits).tolist()
    work = Work(flops, done.samples, bits, done.rounds)
    node_j, epoch_s = epoch_cost(problem, cluster, work)
    found = site.trainer.evaluate(done.params)
    seen = state.seen.copy()
    seen[list(members)] += done.samples
    epoch = before, _effective_samples(problem, step, state.cluster), found["loss"]
    history = {k: [*v] for k, v in state.history.items()}
    history.setdefault(step.version, []).append(epoch)
    made = State(
        done.params,
        *step[:2],
        found["loss"],
        state.seconds + seconds + epoch_s,
        state.joules + joules + sum(node_j),
        seen,
        history,
    )
    return made, {
        "version": step.version,
        "cluster": step.cluster,
        "fraction": step.fraction,
        "level": step.level,
        "predicted_loss": step.loss,
        "loss_before": state.loss,
        "loss_after_switch": before,
        "loss": found["loss"],
        "accuracy": found["accuracy"],
        "seconds": made.seconds,
        "joules": made.joules,
        "node_joules": dict(zip(cluster.members, node_j, strict=True)),
        "samples": list(done.samples),
        "flops": flops,
        "parameters": costs.parameters,
        "moved_bytes": moved,
        "up_bits": list(done.up_bits),
        "down_bits": list(done.down_bits),
    }


def _brought(
    site: Site, state: State, step: Step, cluster: Cluster
) -> tuple[Params, float, int, float, float]:
    """Compresses the model where it is, and hands it over.

    Returns:
      Parameters, their measured loss, bytes moved, joules and seconds.
    """
    config, problem, compressor = site.config, site.problem, site.compressor
    holder = next(c for c in problem.clusters if c.name == state.cluster)
    params, loss, moved, costs = state.params, state.loss, 0, [(0.0, 0.0)]
    if step.version != state.version:
        share = next(
            s for s in config.shares if profiling.version_name(s) == step.version
        )
        flops = compressors.switch_flops(compressor, params, site.whole, share)
        params = compressor.compress(params, site.whole, share)
        loss = site.trainer.evaluate(params)["loss"]
        costs.append(switch_cost(problem, holder, flops))
    if holder.coordinator != cluster.coordinator:
        moved = compressor.parameter_bytes(params)
        costs.append(hand_over_cost(problem, holder, cluster, 8 * moved))
    joules, seconds = map(sum, zip(*costs, strict=True))
    return params, loss, moved, joules, seconds


def _level(config, name: str) -> Mapping[str, Any]:
    """The config's gradient level of that name; a node alone has none."""
    named = {level["name"]: level for level in config.gradient_levels}
    return named.get(name, training.UNCOMPRESSED)


def _effective_samples(problem: Problem, step: Step, holder: str) -> float:
    """Effective samples that the plan reckons with in an epoch."""
    tables = tabulate(problem)
    version = [v.name for v in problem.versions].index(step.version)
    cluster = [c.name for c in problem.clusters].index(holder)
    return float(tables.progress[version, cluster, action_of(problem, step, tables)])


def _final(site: Site, state: State, record: dict[str, Any]) -> dict[str, Any]:
    """What became of a run, beside what was planned."""
    problem, epochs, plan = site.problem, record["epochs"], record["plan"]
    met = [e for e in epochs if e["loss"] <= problem.max_loss]
    first = {k: met[0][k] for k in ("loss", "seconds", "joules")} if met else None
    last = Step(*plan[-1]) if plan else None
    return {
        "epochs": len(epochs),
        "loss": state.loss,
        "seconds": state.seconds,
        "joules": state.joules,
        "max_loss": problem.max_loss,
        "aimed_loss": record["aimed_loss"],
        "deadline_s": problem.deadline_s,
        "planned": last and {"epochs": len(plan), **_totals(last)},
        "first_met": first,  # the first epoch's end at which the target was met
        "met_in_time": bool(met) and met[0]["seconds"] <= problem.deadline_s,
    }


def _totals(step: Step) -> dict[str, float]:
    return {"loss": step.loss, "seconds": step.seconds, "joules": step.joules}
