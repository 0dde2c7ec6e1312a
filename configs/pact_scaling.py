"""Question: how do the planner's time and its gap grow with the problem?

Problems of the synthetic family of gcjax/pact/scenarios.py, up to 6 versions x 50
clusters x 200 epochs; and how much a finer resolution gains.

Command: python scripts/pact_scaling.py --config=configs/pact_scaling.py
Seconds: the same with --config=configs/pact_scaling.py:quick
Table and figure: python scripts/pact_scaling.py --report
Expected: below 10 s, once compiled, and within 1 % of the optimum on average, 3 % at
worst, at the largest size. Measured: 0.2 % at most where the optimum was proved, 8.7 %
above a bound in one problem where it was not; results/tables/pact_scaling.md. Records
of the largest size were made with --config.labels_s=240; bucket was measured again in
all of them when its cells had been chosen anew.
Time: ten minutes of one CPU core at most for the proof, usually less than one.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The sizes; with "quick" one small problem."""
    if arg not in (None, "quick"):
        raise ValueError(f"the config's argument can be 'quick', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.kinds = ("tiers", "slow links", "slow storage", "skewed")
    # (versions, clusters, epochs) of each size, and its seeds.
    config.sizes = ((2, 3, 24), (3, 12, 60), (4, 24, 100), (6, 50, 200))
    config.seeds = ((1, 2), (1, 2, 3), (1, 2), (1, 2))
    # The target: a loss, and a deadline between the fastest plan's time (0) and the
    # most frugal one's (1), in the logarithm.
    config.loss = 0.62
    config.deadline = 0.5
    # Processor seconds that exact labels may take.
    config.labels_s = 600.0
    # Problems of one size, by their seeds, that are planned in one batch.
    config.batch_size = (3, 12, 60)
    config.batch_seeds = (1, 2, 3, 4, 5, 6, 7, 8)
    # Bins of progress of plans at a fixed resolution, and points of proved bounds; for
    # problems of so many clusters at most.
    config.resolution_clusters = 12
    config.bins = (64, 512, 4096)
    config.bound_bins = (256, 1024, 2048)
    if arg == "quick":
        config.kinds = ("tiers",)
        config.sizes = ((2, 3, 12),)
        config.seeds = ((1,),)
        config.batch_size = (2, 3, 12)
        config.batch_seeds = (1, 2)
        config.bins = (64,)
        config.bound_bins = (128,)
        config.labels_s = 2.0
    return config
