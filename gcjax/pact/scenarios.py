"""A family of synthetic problems in which time and energy pull in different directions.

Three tiers: cloud nodes are fast and hungry, mobile nodes slow and frugal, edge nodes
in between. Rates, energies, data and curves vary by seed around the values below, which
are of the order of published data sheets and stand for no particular device.
"""

from dataclasses import replace

import numpy as np

from gcjax.pact.predictor import Jump, PowerLaw
from gcjax.pact.problem import (
    Cluster,
    Link,
    ModelVersion,
    Node,
    Problem,
    Switch,
)

KINDS = ("tiers", "slow links", "slow storage", "skewed")
# Sustained FLOP/s, joules per FLOP, memory in bytes, idle watts, share of the data.
_TIERS = {
    "cloud": (6e12, 70e-12, 64e9, 60.0, 0.4),
    "edge": (1.0e12, 32e-12, 8e9, 10.0, 0.35),
    "mobile": (1.2e11, 14e-12, 2e9, 1.0, 0.25),
}
_DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09)
_SAMPLES = 60_000
_CLASSES = 10
_TOP_LOSS = 2.4
_SAMPLE_BYTES = 3_072.0


def scenario(
    kind: str,
    versions: int,
    clusters: int,
    epochs: int,
    seed: int,
) -> Problem:
    """One problem, with targets that are replaced by `gcjax.pact.study`.

    Args:
      kind: One of `KINDS`.
      versions: Model versions, 1 to 8.
      clusters: Clusters, half of them of one node; at least 3.
      epochs: Epochs after which the whole model would reach a loss of 0.6 on the
        data of a cloud node; `max_epochs` is three times that.
      seed: Of all that varies.

    Raises:
      ValueError: for an unknown kind or impossible numbers.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if not 1 <= versions <= len(_DENSITIES) or clusters < 3:
        raise ValueError(
            f"versions must be in 1..{len(_DENSITIES)} and clusters at least 3, "
            f"got {versions} and {clusters}"
        )
    rng = np.random.default_rng([KINDS.index(kind), versions, clusters, epochs, seed])
    nodes, tiers = _nodes(kind, -(-clusters * 5 // 8), rng)
    links = _links(kind, nodes, tiers, rng)
    groups = _clusters(nodes, tiers, clusters, rng)
    data = np.mean(
        [n.samples for n, t in zip(nodes, tiers, strict=True) if t == "cloud"]
    )
    models, switches = _versions(versions, epochs * data, rng)
    cloud = next(c for c in groups if c.coordinator.startswith("cloud"))
    return Problem(
        nodes=tuple(nodes),
        links=tuple(links),
        clusters=tuple(groups),
        versions=tuple(models),
        switches=tuple(switches),
        start_version=models[0].name,
        start_cluster=cloud.name,
        start_loss=2.2,
        top_loss=_TOP_LOSS,
        max_loss=0.6,
        deadline_s=1e9,
        max_epochs=3 * epochs,
        data_fractions=(1.0,) if clusters > 20 else (0.5, 1.0),
        sample_bytes=_SAMPLE_BYTES,
        skew_loss=0.5 if kind == "skewed" else 0.0,
        handover_loss=0.5 if kind == "skewed" else 0.0,
    )


def _nodes(kind: str, count: int, rng: np.random.Generator):
    names = [*_TIERS]
    tiers = [names[min(i, 2)] for i in range(3)]
    tiers += [*rng.choice(names, max(count - 3, 0), p=(0.15, 0.35, 0.5))]
    nodes = []
    for i, tier in enumerate(tiers):
        rate, joules, memory, idle, share = _TIERS[tier]
        fast = rng.lognormal(0, 0.35)
        samples = _SAMPLES * share / tiers.count(tier) * rng.lognormal(0, 0.3)
        skew = 0.3 if kind == "skewed" else 50.0
        labels = rng.multinomial(int(samples), rng.dirichlet(np.full(_CLASSES, skew)))
        # Storage that delivers less than what the node computes on the small versions.
        stored = {"cloud": 4e8, "edge": 1e8, "mobile": 3e7}[tier]
        if kind == "slow storage":
            stored /= 20
        nodes.append(
            Node(
                name=f"{tier}{i}",
                flops_per_s=rate * fast,
                memory_bytes=memory,
                # Within a tier faster devices are the hungrier ones.
                joules_per_flop=joules * fast**0.6 * rng.lognormal(0, 0.1),
                histogram=tuple(int(n) for n in labels),
                input_bytes_per_s=stored * rng.lognormal(0, 0.2),
                idle_watts=idle,
            )
        )
    return nodes, tiers


def _links(kind: str, nodes, tiers, rng: np.random.Generator):
    """All pairs are joined; the weaker end decides the rate."""
    rates = {"cloud": 1e9, "edge": 2e8, "mobile": 2e7}
    joules = {"cloud": 5e-9, "edge": 2e-8, "mobile": 2.5e-7}
    links = []
    for i, a in enumerate(nodes):
        for j in range(i):
            rate = min(rates[tiers[i]], rates[tiers[j]]) * rng.lognormal(0, 0.2)
            links.append(
                Link(
                    ends=(a.name, nodes[j].name),
                    bits_per_s=rate / (20 if kind == "slow links" else 1),
                    joules_per_bit=joules[tiers[i]] + joules[tiers[j]],
                    latency_s=0.02,
                )
            )
    return links


def _clusters(nodes, tiers, count: int, rng: np.random.Generator):
    groups = [Cluster(n.name, (n.name,)) for n in nodes[:count]]
    taken = {g.members for g in groups}
    order = {tier: i for i, tier in enumerate(_TIERS)}
    while len(groups) < count:
        size = int(rng.integers(2, min(5, len(nodes)) + 1))
        chosen = sorted(rng.choice(len(nodes), size, replace=False))
        # The strongest member coordinates.
        chosen.sort(key=lambda i: (order[tiers[i]], i))
        members = tuple(nodes[i].name for i in chosen)
        if members in taken:
            if size == len(nodes):
                break
            continue
        taken.add(members)
        name = f"group{len(groups)}"
        groups.append(Cluster(name, members, 4, efficiency=0.95 ** (size - 1)))
    return groups


def _versions(count: int, samples: float, rng: np.random.Generator):
    """Curves such that the whole model needs `samples` to get from 2.2 to 0.6."""
    exponent, floor = rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.25)
    first, last = ((v - floor) ** (-1 / exponent) for v in (2.2, 0.6))
    scale = (samples / (last - first)) ** exponent
    models, switches = [], []
    for density in _DENSITIES[:count]:
        lost = 1 / density - 1
        models.append(
            ModelVersion(
                name=f"d{density:g}",
                parameters=int(6e5 * density**2),
                flops_per_sample=2.5e8 * (0.04 + 0.96 * density**2),
                parameter_bytes=2.4e6 * density**2,
                training_bytes=1e9 * density + 2e8,
                curve=PowerLaw(
                    floor + 0.035 * lost * rng.uniform(0.8, 1.2),
                    scale * (1 + 0.05 * lost * rng.uniform(0.5, 1.5)),
                    exponent,
                ),
            )
        )
    for i in range(count):
        for j in range(i + 1, count):
            ratio = _DENSITIES[i] / _DENSITIES[j]
            height = 0.35 * (1 - 1 / ratio) * rng.uniform(0.8, 1.2)
            switches.append(
                Switch(
                    models[i].name,
                    models[j].name,
                    Jump(height, 1.0, _TOP_LOSS),
                    flops=2e9,
                )
            )
    return models, switches


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
