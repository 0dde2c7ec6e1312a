"""Small random problems that all PACT tests share."""

import numpy as np

from gcjax import pact


def small(seed, versions=2, nodes=2, epochs=4, capped=True, levels=()):
    """A random problem of a few epochs whose targets are sometimes out of reach."""
    rng = np.random.default_rng(seed)
    names = [f"n{i}" for i in range(nodes)]
    made = tuple(
        pact.Node(
            name,
            flops_per_s=rng.uniform(1, 6),
            memory_bytes=10.0,
            joules_per_flop=rng.uniform(0.2, 2),
            histogram=tuple(rng.integers(1, 20, 3).tolist()),
            idle_watts=rng.uniform(0, 0.3),
        )
        for name in names
    )
    links = tuple(
        pact.Link(
            (a, b),
            bits_per_s=rng.uniform(5, 60),
            joules_per_bit=rng.uniform(0, 0.05),
            latency_s=rng.uniform(0, 0.3),
        )
        for i, a in enumerate(names)
        for b in names[:i]
    )
    clusters = [pact.Cluster(name, (name,)) for name in names]
    if nodes > 1:
        clusters.append(pact.Cluster("both", (names[0], names[1]), 2, 0.9))
    top, start = 2.5, rng.uniform(1.8, 2.4)
    models, switches = [], []
    for m in range(versions):
        floor = 0.2 + 0.2 * m + rng.uniform(0, 0.1)
        kind = rng.integers(2)
        curve = (
            pact.PowerLaw(floor, rng.uniform(3, 6), rng.uniform(0.3, 0.7))
            if kind
            else pact.Exponential(floor, 2.2, rng.uniform(0.004, 0.02))
        )
        models.append(
            pact.ModelVersion(
                f"v{m}",
                parameters=10,
                flops_per_sample=rng.uniform(0.5, 1.5) / (1 + m),
                parameter_bytes=4.0 / (1 + m),
                training_bytes=5.0,
                curve=curve,
            )
        )
        for n in range(m):
            jump = pact.Jump(rng.uniform(0, 0.4), rng.uniform(0, 1), top)
            switches.append(pact.Switch(f"v{n}", f"v{m}", jump, rng.uniform(0, 3)))
    problem = pact.Problem(
        made,
        links,
        tuple(clusters),
        tuple(models),
        tuple(switches),
        start_version="v0",
        start_cluster=names[0],
        start_loss=start,
        top_loss=top,
        max_loss=start * rng.uniform(0.5, 0.85),
        deadline_s=1.0,
        max_epochs=epochs if capped else 50,
        data_fractions=(1.0,) if rng.integers(2) else (0.5, 1.0),
        gradient_levels=levels,
        skew_loss=float(rng.choice([0, 0.5])),
        handover_loss=float(rng.choice([0, 0.3])),
    )
    seconds = pact.tabulate(problem).seconds
    typical = np.median(seconds[np.isfinite(seconds)])
    return problem.with_target(
        deadline_s=float(typical * epochs * rng.uniform(0.1, 0.7))
    )
