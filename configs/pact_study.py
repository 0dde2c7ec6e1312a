"""Question: how near to the optimum are solvers and simpler rules, and how fast?

A family of synthetic problems in which fast nodes are hungry and frugal ones slow; see
gcjax/pact/scenarios.py. Each is planned for two losses and three deadlines.

Command: python scripts/pact_study.py --config=configs/pact_study.py
Seconds: the same with --config=configs/pact_study.py:quick
Table and figures: python scripts/pact_study.py --report
Expected: bucket within 1 % of the least energy on average and 3 % at worst; what was
measured is in results/tables/pact_study.md.
Time: about ten minutes of one CPU core.
"""

import ml_collections

from gcjax.pact.scenarios import KINDS


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The family; with "quick" two small problems of it."""
    if arg not in (None, "quick"):
        raise ValueError(f"the config's argument can be 'quick', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.kinds = KINDS
    # (versions, clusters, epochs of the whole model on one cloud node) of each size.
    config.sizes = ((3, 5, 16), (4, 12, 10), (5, 14, 8))
    config.seeds = (0,)
    # Target losses.
    config.losses = (0.9, 0.65)
    # Deadlines between the fastest plan's time (0) and the most frugal one's (1), in
    # the logarithm.
    config.deadlines = (0.2, 0.5, 0.8)
    # Processor seconds that labels may take.
    config.labels_s = 6.0
    # Grid, which is far off and takes up to half a minute, only on so many clusters.
    config.grid_clusters = 5
    # Relative errors of the predictor, on the middle deadlines.
    config.errors = (0.05, 0.1, 0.2)
    if arg == "quick":
        config.kinds = KINDS[:1]
        config.sizes = ((2, 3, 4),)
        config.labels_s = 2.0
    return config
