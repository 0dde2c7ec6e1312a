"""A problem as arrays: what each action costs, and how far it leads.

An action of one epoch is: compress the model to version m at the coordinator that holds
it, hand it over to the coordinator of a cluster, train there on a fraction of the data,
with gradients compressed to a level. Because compression happens before the hand-over,
an epoch's cost splits into a *switch*, which depends on both versions and the holder,
and the *rest*, which depends on the new version, the holder and the action. That is
what the tables hold; per (state, action) pairs they would be M times larger.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gcjax.pact.predictor import next_loss
from gcjax.pact.problem import (
    Cluster,
    GradientLevel,
    ModelVersion,
    Problem,
)


class Tables(NamedTuple):
    """M versions, C clusters, A = C * data fractions * gradient levels actions.

    Costs of impossible actions and switches are inf.
    """

    energy_j: np.ndarray  # float64[M, C, A], hand-over from cluster C and training
    seconds: np.ndarray  # float64[M, C, A]
    progress: np.ndarray  # float64[M, C, A], effective samples
    destination: np.ndarray  # int[A], cluster
    fraction: np.ndarray  # float64[A], of the data
    level: np.ndarray  # int[A], gradient level; 0 where the problem has none
    switch_j: np.ndarray  # float64[M, M, C], from version to version at cluster C
    switch_s: np.ndarray  # float64[M, M, C]
    start: tuple[int, int]  # version, cluster

    @property
    def possible(self) -> np.ndarray:
        """Actions that can be taken and lead somewhere, bool[M, C, A]."""
        return np.isfinite(self.energy_j) & (self.progress > 0)


def tabulate(problem: Problem) -> Tables:
    """Costs and progress of all actions and switches.

    Raises:
      ValueError: where no cluster can train some version, or none can be reached.
    """
    clusters, versions = problem.clusters, problem.versions
    levels = problem.gradient_levels or (_uncompressed(len(versions)),)
    shape = len(problem.data_fractions), len(levels)
    destination, fraction, level = (
        x.ravel() for x in np.indices((len(clusters), *shape))
    )
    fraction = np.asarray(problem.data_fractions, float)[fraction]

    train = np.empty((3, len(versions), len(destination)))
    useful = [_useful(problem, c) for c in clusters]
    for m, version in enumerate(versions):
        for a, (c, f, g) in enumerate(zip(destination, fraction, level, strict=True)):
            spent = _epoch(problem, m, clusters[c], f, levels[g])
            kept = levels[g].efficiency[m] if len(clusters[c].members) > 1 else 1.0
            train[:, m, a] = *spent, f * useful[c][m] * kept
        if not np.isfinite(train[0, m]).any():
            raise ValueError(_why_nobody(problem, version))
    move_j, move_s = _moves(problem)
    lost = _lost_samples(problem)
    energy = train[0][:, None] + move_j[:, :, destination]
    seconds = train[1][:, None] + move_s[:, :, destination]
    progress = np.maximum(train[2][:, None] - lost[:, destination], 0)
    switch_j, switch_s = _switches(problem)
    tables = Tables(
        energy,
        seconds,
        progress,
        destination,
        fraction,
        level,
        switch_j,
        switch_s,
        start=(
            [v.name for v in versions].index(problem.start_version),
            [c.name for c in clusters].index(problem.start_cluster),
        ),
    )
    m, c = tables.start
    reachable = np.isfinite(switch_j[m, :, c])[:, None] & tables.possible[:, c]
    if not reachable.any():
        raise ValueError(
            f"from {problem.start_cluster!r} no cluster can be reached that can train "
            "a version and gains by it: add links or memory"
        )
    return tables


def _uncompressed(versions: int) -> GradientLevel:
    ones = (1.0,) * versions
    return GradientLevel("none", ones, ones, ones)


def _epoch(
    problem: Problem,
    m: int,
    cluster: Cluster,
    fraction: float,
    level: GradientLevel,
) -> tuple[float, float]:
    """Joules and seconds of an epoch; inf where impossible."""
    version, members = problem.versions[m], problem.members(cluster)
    together = len(members) > 1
    rounds = cluster.rounds_per_epoch * fraction if together else 0.0
    memory = version.training_bytes
    coding = 0.0
    if together:
        memory += level.bytes_per_parameter * version.parameters
        coding = rounds * level.flops_per_parameter * version.parameters
    if any(node.memory_bytes < memory for node in members):
        return np.inf, np.inf
    samples = [fraction * node.samples for node in members]
    bits = rounds * 8 * version.parameter_bytes
    bits *= level.up_fraction[m] + level.down_fraction[m]
    work = Work(
        [version.flops_per_sample * n + coding for n in samples],
        samples,
        [0.0] + [bits] * (len(members) - 1),
        rounds,
    )
    spent, seconds = epoch_cost(problem, cluster, work)
    if any(j > n.max_epoch_j for j, n in zip(spent, members, strict=True)):
        return np.inf, np.inf
    return sum(spent), seconds


class Work(NamedTuple):
    """What the members of a cluster do in an epoch, planned or counted."""

    flops: Sequence[float]  # of each member
    samples: Sequence[float]  # read by each member
    bits: Sequence[float]  # up and down together, 0 for the coordinator
    rounds: float  # of exchange


def epoch_cost(
    problem: Problem, cluster: Cluster, work: Work
) -> tuple[list[float], float]:
    """What an epoch's work costs: joules of each member, and seconds.

    Members compute side by side; then the slowest link decides. Those of a cluster wait
    for each other at their idle power, and a link's energy is its member's.
    """
    members = problem.members(cluster)
    busy = [
        max(
            flops / node.flops_per_s,
            samples * problem.sample_bytes / node.input_bytes_per_s,
        )
        for node, flops, samples in zip(members, work.flops, work.samples, strict=True)
    ]
    waits, link_j = [0.0], [0.0]
    for node, bits in zip(members[1:], work.bits[1:], strict=True):
        link = problem.link(node.name, cluster.coordinator)
        waits.append(bits / link.bits_per_s + 2 * work.rounds * link.latency_s)
        link_j.append(bits * link.joules_per_bit)
    seconds = max(busy) + max(waits)
    spent = [
        node.joules_per_flop * flops
        + (node.idle_watts * (seconds - s) if len(members) > 1 else 0.0)
        + joules
        for node, flops, s, joules in zip(
            members, work.flops, busy, link_j, strict=True
        )
    ]
    return spent, seconds


def hand_over_cost(
    problem: Problem, source: Cluster, target: Cluster, bits: np.ndarray | float
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Joules and seconds of models of so many bits; inf without a link."""
    ends = source.coordinator, target.coordinator
    if ends[0] == ends[1]:
        return 0.0 * bits, 0.0 * bits
    link = problem.link(*ends)
    if link is None:
        return np.inf * bits, np.inf * bits
    return bits * link.joules_per_bit, bits / link.bits_per_s + link.latency_s


def switch_cost(problem: Problem, holder: Cluster, flops: float) -> tuple[float, float]:
    """Joules and seconds of so many FLOPs at the node that holds the model."""
    node = problem.members(holder)[0]
    return flops * node.joules_per_flop, flops / node.flops_per_s


def _useful(problem: Problem, cluster: Cluster) -> np.ndarray:
    """Effective samples of a cluster's data, [M], gradients uncompressed."""
    samples = _histogram(problem, cluster)
    everything = sum(np.array(n.histogram, float) for n in problem.nodes)
    kept = 1 - problem.skew_loss * _distance(samples, everything)
    each = np.broadcast_to(cluster.efficiency, len(problem.versions))
    return samples.sum() * each * kept


def _histogram(problem: Problem, cluster: Cluster) -> np.ndarray:
    members = problem.members(cluster)
    return sum(np.array(node.histogram, float) for node in members)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between two label histograms, in [0, 1]."""
    return float(np.abs(a / a.sum() - b / b.sum()).sum() / 2)


def _lost_samples(problem: Problem) -> np.ndarray:
    """Effective samples lost at a hand-over to differently labelled data, [C, C]."""
    samples = [_histogram(problem, c) for c in problem.clusters]
    if not problem.handover_loss:
        return np.zeros((len(samples), len(samples)))
    lost = [[_distance(a, b) * b.sum() for b in samples] for a in samples]
    return problem.handover_loss * np.array(lost)


def _moves(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Joules and seconds of a hand-over of each version, [M, C, C]."""
    bits = 8 * np.array([v.parameter_bytes for v in problem.versions])
    clusters = problem.clusters
    cost = [[hand_over_cost(problem, a, b, bits) for b in clusters] for a in clusters]
    return tuple(np.moveaxis(np.array(cost), (2, 3), (0, 1)))


def _switches(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Joules and seconds of each switch at each coordinator, [M, M, C]."""
    size = len(problem.versions)
    joules = np.full((size, size, len(problem.clusters)), np.inf)
    joules[np.arange(size), np.arange(size)] = 0
    seconds = joules.copy()
    order = {v.name: i for i, v in enumerate(problem.versions)}
    for switch in problem.switches:
        at = order[switch.source], order[switch.target]
        cost = [switch_cost(problem, c, switch.flops) for c in problem.clusters]
        joules[at], seconds[at] = np.transpose(cost)
    return joules, seconds


def switched(problem: Problem, source: int, target: int, loss: np.ndarray | float):
    """Loss right after a switch, elementwise; the same where nothing is switched."""
    if source == target:
        return loss
    names = problem.versions[source].name, problem.versions[target].name
    for switch in problem.switches:
        if (switch.source, switch.target) == names:
            return np.minimum(switch.jump.after(loss), problem.top_loss)
    raise ValueError(f"no switch leads from {names[0]!r} to {names[1]!r}")


def advance(
    problem: Problem, source: int, target: int, loss: np.ndarray | float, samples: float
) -> np.ndarray:
    """Loss after an epoch: the switch, then `samples` effective samples."""
    curve = problem.versions[target].curve
    return next_loss(curve, switched(problem, source, target, loss), samples)


def _why_nobody(problem: Problem, version: ModelVersion) -> str:
    """Says why a version cannot be trained anywhere."""
    room = max(
        min(node.memory_bytes for node in problem.members(c)) for c in problem.clusters
    )
    if room < version.training_bytes:
        return (
            f"no cluster can hold version {version.name!r}: it needs "
            f"{version.training_bytes:.3g} bytes, the roomiest has {room:.3g}"
        )
    return (
        f"no cluster can train version {version.name!r} within its nodes' memory and "
        "max_epoch_j: remove the version or raise a limit"
    )
