"""A family of synthetic problems in which it matters where, and when, to compress.

*Tiers.* Cloud nodes are fast and hungry, mobile nodes slow and frugal, edge nodes in
between. Only cloud nodes have room for the whole model, mobile nodes for the smallest
versions alone: frugal nodes can be used only after the model was compressed.

*Versions.* The less is left of a model, the cheaper is a sample and the higher the loss
that it never goes below. While the loss is high, the whole model gains more by a sample
than what is left of it; later that advantage shrinks. With curves of power laws this
means that exponents rise as the density falls, and the share of the whole model's gain
at the start falls. Compressing at once wastes the good start, never compressing wastes
energy, and the jump of the loss at a switch rises as the loss falls; so a plan has a
reason to begin with a larger version and to go on with a smaller one. That is an
assumption of the family, made so that there is something to decide. Whether networks
behave so must be measured, see `fit_curve` and `fit_jump`.

Rates, energies, data and curves vary by seed around the values below, which are of the
order of published data sheets and stand for no particular device.
"""

from dataclasses import replace

import numpy as np

from gcjax.pact.predictor import Jump, PowerLaw
from gcjax.pact.problem import (
    Cluster,
    GradientLevel,
    Link,
    ModelVersion,
    Node,
    Problem,
    Switch,
)

KINDS = ("tiers", "slow links", "slow storage", "skewed", "cooperative")
# Sustained FLOP/s, joules per FLOP, memory in bytes, idle watts, share of the data.
_TIERS = {
    "cloud": (6e12, 70e-12, 64e9, 60.0, 0.4),
    "edge": (1.0e12, 32e-12, 4e9, 10.0, 0.35),
    "mobile": (1.2e11, 14e-12, 2e9, 1.0, 0.25),
}
_AWAY = {"cloud": 0.1, "edge": 0.4, "mobile": 0.5}  # data that is not in the cloud
_SMALLEST = 0.25  # density of the last version
_PARAMETERS = 6e5
_SAMPLES = 60_000
_CLASSES = 10
_START_LOSS = 2.2
_TOP_LOSS = 2.4
_SAMPLE_BYTES = 3_072.0


def scenario(
    kind: str,
    versions: int,
    clusters: int,
    epochs: int,
    seed: int,
) -> Problem:
    """One problem with loose targets, to be replaced.

    Args:
      kind: "tiers"; "slow links", at a twentieth of the rate; "slow storage", which
        delivers samples at a twentieth of the rate; "skewed", with labels drawn by
        node from a Dirichlet distribution with parameter 0.3, which costs progress;
        "cooperative", more skewed, so that nodes alone gain little, with most data
        and enough memory at edge and mobile nodes, in larger groups on links of a
        fifth of the rate.
      versions: Model versions, from the whole to a quarter of the channels.
      clusters: Clusters, five of eight of one node; in "cooperative" half of them.
      epochs: `max_epochs`. The whole model reaches a loss of 0.6 in a quarter of them
        on the data of a cloud node; in "cooperative", on a fifth of all data.
      seed: Of all that varies.

    Raises:
      ValueError: for an unknown kind or impossible numbers.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if versions < 1 or clusters < 3 or epochs < 1:
        raise ValueError(
            "versions and epochs must be at least 1 and clusters at least 3, "
            f"got {versions}, {epochs} and {clusters}"
        )
    rng = np.random.default_rng([KINDS.index(kind), versions, clusters, epochs, seed])
    together = kind == "cooperative"
    skew = {"skewed": 0.3, "cooperative": 0.05}.get(kind, 50.0)
    alone = max(3, -(-clusters * (4 if together else 5) // 8))
    nodes, tiers = _nodes(kind, alone, skew, rng)
    links = _links(kind, nodes, tiers, rng)
    groups = _clusters(nodes, tiers, clusters, 3 if together else 2, rng)
    in_cloud = [n.samples for n, t in zip(nodes, tiers, strict=True) if t == "cloud"]
    data = _SAMPLES / 5 if together else np.mean(in_cloud)
    models, switches = _versions(versions, epochs / 4 * data, rng)
    cloud = next(c for c in groups if c.coordinator.startswith("cloud"))
    return Problem(
        nodes=tuple(nodes),
        links=tuple(links),
        clusters=tuple(groups),
        versions=tuple(models),
        switches=tuple(switches),
        start_version=models[0].name,
        start_cluster=cloud.name,
        start_loss=_START_LOSS,
        top_loss=_TOP_LOSS,
        max_loss=0.6,
        deadline_s=1e9,
        max_epochs=epochs,
        data_fractions=(1.0,) if clusters > 20 else (0.5, 1.0),
        sample_bytes=_SAMPLE_BYTES,
        skew_loss={"skewed": 0.5, "cooperative": 0.9}.get(kind, 0.0),
        handover_loss=0.1 if skew < 1 else 0.0,
    )


def _nodes(kind: str, count: int, skew: float, rng: np.random.Generator):
    names = [*_TIERS]
    tiers = names + [*rng.choice(names, max(count - 3, 0), p=(0.15, 0.35, 0.5))]
    nodes = []
    for i, tier in enumerate(tiers):
        rate, joules, memory, idle, share = _TIERS[tier]
        if kind == "cooperative":
            share, memory = _AWAY[tier], 8e9
        fast = rng.lognormal(0, 0.35)
        samples = _SAMPLES * share / tiers.count(tier) * rng.lognormal(0, 0.3)
        labels = rng.dirichlet(np.full(_CLASSES, skew))
        # Storage that delivers less than what the node computes on the small versions.
        stored = {"cloud": 4e8, "edge": 1e8, "mobile": 3e7}[tier]
        if kind == "slow storage":
            stored /= 20
        nodes.append(
            Node(
                name=f"{tier}{i}",
                flops_per_s=rate * fast,
                memory_bytes=memory * rng.uniform(0.9, 1.5),
                # Within a tier faster devices are the hungrier ones.
                joules_per_flop=joules * fast**0.6 * rng.lognormal(0, 0.1),
                histogram=tuple(int(n) for n in rng.multinomial(int(samples), labels)),
                input_bytes_per_s=stored * rng.lognormal(0, 0.2),
                idle_watts=idle,
            )
        )
    return nodes, tiers


def _links(kind: str, nodes, tiers, rng: np.random.Generator):
    """All pairs are joined; the weaker end decides the rate."""
    rates = {"cloud": 1e9, "edge": 2e8, "mobile": 2e7}
    joules = {"cloud": 5e-9, "edge": 2e-8, "mobile": 2.5e-7}
    slower = {"slow links": 20, "cooperative": 5}.get(kind, 1)
    links = []
    for i, a in enumerate(nodes):
        for j in range(i):
            rate = min(rates[tiers[i]], rates[tiers[j]]) * rng.lognormal(0, 0.2)
            links.append(
                Link(
                    ends=(a.name, nodes[j].name),
                    bits_per_s=rate / slower,
                    joules_per_bit=joules[tiers[i]] + joules[tiers[j]],
                    latency_s=0.02,
                )
            )
    return links


def _clusters(nodes, tiers, count: int, least: int, rng: np.random.Generator):
    groups = [Cluster(n.name, (n.name,)) for n in nodes[:count]]
    taken = {g.members for g in groups}
    order = {tier: i for i, tier in enumerate(_TIERS)}
    for _ in range(100 * count):  # few nodes have few subsets
        if len(groups) == count:
            break
        size = int(rng.integers(least, min(5, len(nodes)) + 1))
        chosen = rng.choice(len(nodes), size, replace=False)
        # The strongest member coordinates.
        members = tuple(
            nodes[i].name for i in sorted(chosen, key=lambda i: (order[tiers[i]], i))
        )
        if members not in taken:
            taken.add(members)
            name = f"group{len(groups)}"
            groups.append(Cluster(name, members, 4, efficiency=0.95 ** (size - 1)))
    return groups


def _versions(count: int, samples: float, rng: np.random.Generator):
    """Curves such that the whole model needs `samples` to get from 2.2 to 0.6."""
    exponent, floor = rng.uniform(0.5, 0.7), rng.uniform(0.15, 0.25)
    # Shares of FLOPs that pruning does not save, and how fast the gain of a sample at
    # the start falls with the density, and the exponent rises.
    fixed, slower, bend = rng.uniform((0.2, 1.5, 0.5), (0.4, 2.3, 0.8))
    first, last = ((v - floor) ** (-1 / exponent) for v in (_START_LOSS, 0.6))
    whole = PowerLaw(floor, (samples / (last - first)) ** exponent, exponent)
    models, switches = [], []
    for i in range(count):
        density = _SMALLEST ** (i / max(count - 1, 1))
        jitter = rng.uniform(0.9, 1.1, 3) if i else np.ones(3)
        curve = _curve(
            floor + 0.08 * (1 / density - 1) * jitter[0],
            exponent * density**-bend * jitter[1],
            _gain(whole, _START_LOSS) * density**slower * jitter[2],
        )
        models.append(
            ModelVersion(
                name=f"d{density:.2g}",
                parameters=int(_PARAMETERS * density**2),
                flops_per_sample=2.5e8 * (fixed + (1 - fixed) * density**2),
                parameter_bytes=4 * _PARAMETERS * density**2,
                training_bytes=6e9 * density + 2e8,
                curve=curve,
            )
        )
        for j in range(i):
            kept = _SMALLEST ** ((i - j) / (count - 1))
            height = 0.25 * (1 - kept) * rng.uniform(0.8, 1.2)
            jump = Jump(height, 1.0, _TOP_LOSS)
            switches.append(Switch(models[j].name, models[i].name, jump, flops=2e9))
    return models, switches


def _gain(curve: PowerLaw, loss: float) -> float:
    """By how much a sample lowers the loss."""
    return curve.exponent * (loss - curve.floor) / float(curve.progress(loss))


def _curve(floor: float, exponent: float, gain: float) -> PowerLaw:
    """The power law by which a sample gains so much at the start."""
    above = _START_LOSS - floor
    return PowerLaw(floor, above * (exponent * above / gain) ** exponent, exponent)


def with_gradient_levels(problem: Problem, seed: int) -> Problem:
    """The same, with four ways to compress gradients in clusters of several nodes.

    Bits per uncompressed bit follow from the number of parameters: float32 without
    compression; 8 bits; a tenth and a hundredth of the entries, each with an index. The
    sum of several nodes' entries goes back, up to four times as many. The progress
    lost, 0.5, 3 and 12 % give or take a third on the whole model and more on smaller
    versions, whose gradients have less to spare, is an assumption.
    """
    rng = np.random.default_rng(seed)
    density = np.sqrt(
        [v.parameters / problem.versions[0].parameters for v in problem.versions]
    )
    lost = density**-0.5
    index = np.log2([max(v.parameters, 2) for v in problem.versions]) / 32
    ones = (1.0,) * len(problem.versions)
    levels = [GradientLevel("none", ones, ones, ones)]
    for name, share, part, flops in (
        ("8 bit", None, 0.005, 4.0),
        ("top-k 10 %", 0.1, 0.03, 20.0),
        ("top-k 1 %", 0.01, 0.12, 20.0),
    ):
        up = 0.26 * np.ones_like(index) if share is None else share * (1 + index)
        down = up if share is None else np.minimum(1, 4 * up)
        efficiency = 1 - part * rng.uniform(2 / 3, 4 / 3) * lost
        as_tuples = [tuple(float(v) for v in x) for x in (up, down, efficiency)]
        levels.append(GradientLevel(name, *as_tuples, flops, 4.0))
    return replace(problem, gradient_levels=tuple(levels))


def perturbed(problem: Problem, relative: float, seed: int) -> Problem:
    """The same problem as a predictor sees it whose curves are off.

    Height above the floor and number of samples are each off by a factor in
    1 +- `relative`, drawn per version, and jumps likewise.
    """
    rng = np.random.default_rng(seed)

    def factor():
        return 1 + relative * rng.uniform(-1, 1)

    versions = tuple(
        replace(
            v,
            curve=PowerLaw(
                v.curve.floor * factor(),
                v.curve.scale * factor(),
                v.curve.exponent,
            ),
        )
        for v in problem.versions
    )
    switches = tuple(
        replace(
            s,
            jump=Jump(
                min(s.jump.height * factor(), 1 / max(s.jump.rate, 1e-9)),
                s.jump.rate,
                s.jump.top,
            ),
        )
        for s in problem.switches
    )
    return replace(problem, versions=versions, switches=switches)
