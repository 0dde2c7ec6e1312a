"""What is planned: nodes, links, clusters, model versions, switches and the target.

A model is trained epoch by epoch. Every epoch one *cluster* (a node, or several that
average over links) trains one *version* of the model (the whole network or a compressed
one) on a fraction of its data. Between epochs the model may be switched to a smaller
version, which costs a jump of the loss, and handed over to another cluster, which costs
time and energy. A plan is the list of these decisions; it must reach `max_loss` before
`deadline_s` with as little energy as possible.

All descriptions are frozen and checked when they are made. Units stand in the names:
`_s` seconds, `_j` joules, `_bytes`, `_flops`; link rates are in bits, as data sheets
give them.

References:
  The problem is that of Malandrino, Di Giacomo, Karamzade, Levorato and Chiasserini,
  "Matching DNN Compression and Cooperative Training with Resources and Data
  Availability", INFOCOM 2023, arXiv:2212.02304. Only its abstract was at hand: the
  equations here are a reconstruction and not the authors' text.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from gcjax.pact.predictor import Exponential, Jump, PowerLaw

Curve = PowerLaw | Exponential


@dataclass(frozen=True)
class Node:
    """A device that can train.

    Its time for an epoch is the larger of computing and reading the data.
    """

    name: str
    flops_per_s: float  # sustained, not peak
    memory_bytes: float
    joules_per_flop: float  # at the sustained rate
    histogram: tuple[int, ...]  # local samples of each class
    input_bytes_per_s: float = math.inf  # rate at which its storage delivers samples
    idle_watts: float = 0.0  # while it waits for slower members
    max_epoch_j: float = math.inf  # what it may spend in one epoch

    def __post_init__(self):
        _positive(self, "flops_per_s", "memory_bytes", "input_bytes_per_s")
        _positive(self, "max_epoch_j")
        _not_negative(self, "joules_per_flop", "idle_watts")
        if not self.histogram or any(n < 0 for n in self.histogram):
            raise ValueError(
                f"node {self.name!r}: histogram must hold counts >= 0, one per class, "
                f"got {self.histogram}"
            )

    @property
    def samples(self) -> int:
        """Local samples."""
        return sum(self.histogram)


@dataclass(frozen=True)
class Link:
    """Connects two nodes, both ways."""

    ends: tuple[str, str]
    bits_per_s: float
    joules_per_bit: float = 0.0  # sending and receiving together
    latency_s: float = 0.0

    def __post_init__(self):
        _positive(self, "bits_per_s")
        _not_negative(self, "joules_per_bit", "latency_s")
        if len(self.ends) != 2 or self.ends[0] == self.ends[1]:
            raise ValueError(f"link: ends must be two different nodes, got {self.ends}")

    @property
    def name(self) -> str:
        """Both ends, for messages."""
        return "-".join(self.ends)


@dataclass(frozen=True)
class Cluster:
    """Nodes that train together for an epoch, around a coordinator.

    The model rests at the coordinator between epochs. It is the first member.
    """

    name: str
    members: tuple[str, ...]
    rounds_per_epoch: int = 1  # exchanges up and down in an epoch over all data
    # Progress per sample, relative to samples of all nodes at one: of all versions, or
    # a value for each; 0 where its epochs lead nowhere, and are no choice.
    efficiency: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        _positive(self, "rounds_per_epoch")
        if not all(0 <= v <= 1 for v in np.ravel(self.efficiency)):
            raise ValueError(
                f"cluster {self.name!r}: efficiency must be in [0, 1], got "
                f"{self.efficiency}"
            )
        if not self.members or len(set(self.members)) != len(self.members):
            raise ValueError(
                f"cluster {self.name!r}: members must be different nodes, at least "
                f"one, got {self.members}"
            )

    @property
    def coordinator(self) -> str:
        """The node that averages, and holds the model between epochs."""
        return self.members[0]


@dataclass(frozen=True)
class ModelVersion:
    """The model at one degree of compression, measured or computed."""

    name: str
    parameters: int
    flops_per_sample: float  # forward and backward
    parameter_bytes: float  # sent when the model moves, and per exchange
    training_bytes: float  # memory while it trains, optimiser included
    curve: Curve  # loss against effective samples

    def __post_init__(self):
        _positive(self, "parameters", "flops_per_sample", "parameter_bytes")
        _positive(self, "training_bytes")


@dataclass(frozen=True)
class Switch:
    """From a version to a smaller one."""

    source: str
    target: str
    jump: Jump  # by how much the loss rises at once
    flops: float = 0.0  # spent once, at the coordinator that holds the model

    def __post_init__(self):
        _not_negative(self, "flops")

    @property
    def name(self) -> str:
        """Both versions, for messages."""
        return f"{self.source}->{self.target}"


@dataclass(frozen=True)
class GradientLevel:
    """How gradients are compressed in a cluster of several nodes.

    One value per model version where tuples stand: what an index costs and how much
    progress is lost depends on how much of the model is left.
    """

    name: str
    up_fraction: tuple[float, ...]  # bits sent to the coordinator per uncompressed bit
    down_fraction: tuple[float, ...]  # the same, back to the members
    efficiency: tuple[float, ...]  # progress per sample, relative to uncompressed
    flops_per_parameter: float = 0.0  # per member and exchange, to encode and decode
    bytes_per_parameter: float = 0.0  # memory, for the error that is fed back

    def __post_init__(self):
        _not_negative(self, "flops_per_parameter", "bytes_per_parameter")
        for part in ("up_fraction", "down_fraction", "efficiency"):
            if any(not 0 < v for v in getattr(self, part)):
                raise ValueError(
                    f"level {self.name!r}: {part} must be above 0, "
                    f"got {getattr(self, part)}"
                )
        if any(v > 1 for v in self.efficiency):
            raise ValueError(
                f"level {self.name!r}: efficiency must be in (0, 1], "
                f"got {self.efficiency}"
            )


@dataclass(frozen=True)
class Problem:
    """Everything that a plan depends on.

    Raises:
      ValueError: with the reason, where the parts contradict each other.
    """

    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    clusters: tuple[Cluster, ...]
    versions: tuple[ModelVersion, ...]
    switches: tuple[Switch, ...]
    start_version: str
    start_cluster: str
    start_loss: float
    top_loss: float  # of an uninformed model; no jump leads above it
    max_loss: float  # target
    deadline_s: float
    max_epochs: int
    data_fractions: tuple[float, ...] = (1.0,)
    gradient_levels: tuple[GradientLevel, ...] = ()  # none: uncompressed only
    sample_bytes: float = 0.0  # read from storage per sample
    skew_loss: float = 0.0  # share of progress lost per unit of label skew, [0, 1]
    # Effective samples lost, as a share of the new cluster's data, per unit of
    # distance between the label histograms at a hand-over.
    handover_loss: float = 0.0

    def __post_init__(self):
        _positive(self, "deadline_s", "max_epochs")
        _not_negative(self, "sample_bytes", "skew_loss", "handover_loss")
        if self.skew_loss > 1:
            raise ValueError(f"skew_loss must be in [0, 1], got {self.skew_loss}")
        for part in ("nodes", "links", "clusters", "versions", "switches"):
            names = [x.name for x in getattr(self, part)]
            twice = {n for n in names if names.count(n) > 1}
            if twice:
                raise ValueError(f"{part}: {sorted(twice)} stand there twice")
        for part in ("nodes", "clusters", "versions", "data_fractions"):
            if not getattr(self, part):
                raise ValueError(f"a problem needs at least one of {part}")
        self._check_losses()
        self._check_names()
        self._check_switches()
        self._check_data()

    def _check_losses(self):
        for name in ("start_loss", "top_loss", "max_loss"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)}")
        if self.start_loss > self.top_loss:
            raise ValueError(
                f"start_loss {self.start_loss} is above top_loss {self.top_loss}: "
                "raise top_loss to the loss of an untrained model"
            )
        for f in self.data_fractions:
            if not 0 < f <= 1:
                raise ValueError(f"data_fractions must be in (0, 1], got {f}")
        for version in self.versions:
            if version.curve.floor >= self.top_loss:
                raise ValueError(
                    f"version {version.name!r} never goes below {version.curve.floor}, "
                    f"which is not under top_loss {self.top_loss}"
                )

    def _check_names(self):
        nodes = {n.name for n in self.nodes}
        joined = {frozenset(link.ends) for link in self.links}
        for link in self.links:
            _known(f"link {link.name!r}", link.ends, nodes)
        for cluster in self.clusters:
            _known(f"cluster {cluster.name!r}", cluster.members, nodes)
            for member in cluster.members[1:]:
                if frozenset((member, cluster.coordinator)) not in joined:
                    raise ValueError(
                        f"cluster {cluster.name!r}: no link joins {member!r} and its "
                        f"coordinator {cluster.coordinator!r}"
                    )
        for cluster in self.clusters:
            if np.size(cluster.efficiency) not in (1, len(self.versions)):
                raise ValueError(
                    f"cluster {cluster.name!r}: efficiency needs one value, or one for "
                    f"each of {len(self.versions)} versions, got {cluster.efficiency}"
                )
        versions = {v.name for v in self.versions}
        _known("start_version", (self.start_version,), versions)
        _known("start_cluster", (self.start_cluster,), {c.name for c in self.clusters})
        for switch in self.switches:
            _known(f"switch {switch.name!r}", (switch.source, switch.target), versions)
        for level in self.gradient_levels:
            for part in ("up_fraction", "down_fraction", "efficiency"):
                if len(getattr(level, part)) != len(self.versions):
                    raise ValueError(
                        f"level {level.name!r}: {part} needs one value for each of "
                        f"{len(self.versions)} versions"
                    )

    def _check_switches(self):
        order = {v.name: i for i, v in enumerate(self.versions)}
        for switch in self.switches:
            if order[switch.source] >= order[switch.target]:
                raise ValueError(
                    f"switch {switch.name!r} leads to an earlier version: list "
                    "versions from large to small; growing back is not supported"
                )
            if switch.jump.top > self.top_loss * (1 + 1e-9):
                raise ValueError(
                    f"switch {switch.name!r}: its jump was fitted up to a loss of "
                    f"{switch.jump.top}, above top_loss {self.top_loss}"
                )

    def _check_data(self):
        classes = {len(n.histogram) for n in self.nodes}
        if len(classes) > 1:
            raise ValueError(f"histograms differ in their classes: {sorted(classes)}")
        samples = {n.name: n.samples for n in self.nodes}
        for cluster in self.clusters:
            if not sum(samples[m] for m in cluster.members):
                raise ValueError(
                    f"cluster {cluster.name!r} has no data, so it cannot train: "
                    "remove it, or give a member samples"
                )

    @functools.cached_property
    def _nodes_by_name(self) -> dict[str, Node]:
        return {n.name: n for n in self.nodes}

    @functools.cached_property
    def _links_by_ends(self) -> dict[frozenset[str], Link]:
        return {frozenset(link.ends): link for link in self.links}

    def members(self, cluster: Cluster) -> list[Node]:
        """The nodes of a cluster, the coordinator first."""
        return [self._nodes_by_name[name] for name in cluster.members]

    def link(self, a: str, b: str) -> Link | None:
        """The link that joins two nodes, None without one."""
        return self._links_by_ends.get(frozenset((a, b)))

    def with_target(self, **changes: float) -> "Problem":
        """The same with other `max_loss`, `deadline_s` or `max_epochs`."""
        return replace(self, **changes)


def from_config(config: Mapping[str, Any]) -> Problem:
    """Reads a problem from an ml_collections config (or any mapping).

    Fields are those of `Problem`; parts are tuples of mappings with the fields of
    `Node`, `Link`, `Cluster`, `ModelVersion`, `Switch` and `GradientLevel`. A curve
    has a `kind`, "power" or "exponential".

    Raises:
      ValueError: for unknown or missing fields, or where parts contradict each other.
    """
    given = dict(config)
    parts = {
        "nodes": Node,
        "links": Link,
        "clusters": Cluster,
        "versions": ModelVersion,
        "switches": Switch,
        "gradient_levels": GradientLevel,
    }
    for name, kind in parts.items():
        given[name] = tuple(_build(kind, dict(x), name) for x in given.get(name, ()))
    return _build(Problem, given, "problem")


def _build(kind: type, given: dict[str, Any], where: str) -> Any:
    """Makes a dataclass from a mapping, lists becoming tuples."""
    if "curve" in given and not isinstance(given["curve"], Curve):
        curve = dict(given["curve"])
        curves = {"power": PowerLaw, "exponential": Exponential}
        if curve.get("kind") not in curves:
            raise ValueError(
                f"{where}: a curve's kind is 'power' or 'exponential', "
                f"got {curve.get('kind')!r}"
            )
        given["curve"] = _build(curves[curve.pop("kind")], curve, "curve")
    if "jump" in given and not isinstance(given["jump"], Jump):
        given["jump"] = _build(Jump, dict(given["jump"]), "jump")
    known = {f.name for f in fields(kind)}
    if set(given) - known:
        raise ValueError(f"{where}: unknown fields {sorted(set(given) - known)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _known(where: str, names: tuple[str, ...], all_names: set[str]) -> None:
    for name in names:
        if name not in all_names:
            raise ValueError(f"{where}: {name!r} is not among {sorted(all_names)}")


def _label(part: Any) -> str:
    name = f" {part.name!r}" if hasattr(part, "name") else ""
    return f"{type(part).__name__.lower()}{name}"


def _positive(part: Any, *names: str) -> None:
    for name in names:
        if not getattr(part, name) > 0:  # NaN fails too
            raise ValueError(
                f"{_label(part)}: {name} must be above 0, got {getattr(part, name)}"
            )


def _not_negative(part: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(part, name) < math.inf:
            raise ValueError(
                f"{_label(part)}: {name} must be a number >= 0, "
                f"got {getattr(part, name)}"
            )
