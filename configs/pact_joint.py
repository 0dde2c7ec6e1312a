"""Question: is it worth planning model versions and gradient levels together?

The synthetic family of gcjax/pact/scenarios.py with four levels of gradient compression
in clusters of several nodes, where data is skewed and links are slow, so that nodes
have to cooperate. The joint plan against one without gradient levels, one without
versions, and both one after the other. The family was chosen on seed 0, and once more
after seed 1, where at first no plan used gradient levels: skew was raised and deadlines
were tightened. Seed 1 is thus no independent test; seeds 2 to 6 are.

Command: python scripts/pact_joint.py --config=configs/pact_joint.py
Seconds: the same with --config=configs/pact_joint.py:quick
Table and figure: python scripts/pact_joint.py --report
Expected: the joint plan is never dearer, up to the planner's own gap; cheaper than
model first, then gradients on seed 1 only. Figures: results/tables/pact_joint.md.
Time: some ten minutes of one CPU core.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The family; with "quick" one small problem of it."""
    if arg not in (None, "quick"):
        raise ValueError(f"the config's argument can be 'quick', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.kinds = ("cooperative",)
    # (versions, clusters, epochs) of each size, and its seeds.
    config.sizes = ((3, 12, 40),)
    config.seeds = ((1, 2, 3, 4, 5, 6),)
    # Target losses, and deadlines between the fastest plan's time (0) and the most
    # frugal one's (1), in the logarithm.
    config.losses = (0.8, 0.62)
    config.deadlines = (0.1, 0.4)
    if arg == "quick":
        config.kinds = ("cooperative",)
        config.sizes = ((2, 4, 12),)
        config.seeds = ((1,),)
        config.losses = (0.8,)
        config.deadlines = (0.4,)
    return config
