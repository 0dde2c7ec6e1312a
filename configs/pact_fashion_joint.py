"""Question: is it worth planning model versions and gradient levels together?

As configs/pact_fashion.py, but nodes hold few classes each, so that they have to
cooperate, and all three can, around the gateway; the sensor has room for the whole
network. With a profile of its own, in which levels' efficiencies are measured. The
deadline was set once, when the profile was there and nothing had been carried out: so
that all ways to plan that are carried out have a plan.

Profile: python scripts/pact_profile.py --config=configs/pact_fashion_joint.py
Plans: python scripts/pact_joint_measured.py
All runs: python scripts/sweep.py --config=configs/pact_fashion_joint.py
Expected: in the mean over plans, model only costs 2.6 and gradients only 4.2 times as
much as joint, one after the other as much where it has a plan. Carried out, fixed plans
miss the target on most of three seeds; re-planned, joint and model only meet it on all,
for 1807 and 3407 J. Time: profile a quarter of an hour, plans some minutes, a run about
a minute, on one CPU core.
"""

import itertools
from collections.abc import Callable

import ml_collections

from configs import pact_fashion


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run; with "quick" in seconds."""
    config = pact_fashion.get_config(arg)
    config.experiment = "bench_pact_fashion_joint"
    config.profile = config.profile.replace(".json", "_joint.json")
    config.split = "skewed((0.4, 0.35, 0.25), concentration=0.5)"
    config.nodes[2]["memory_bytes"] = 8e6  # room for the whole network
    config.clusters = (
        *config.clusters[:3],
        pact_fashion.cluster("gateway", ("server", "sensor"), 20 if arg else 200),
    )
    config.deadline_s = 120.0
    config.methods, config.replan = ("joint",), False
    # For scripts/pact_joint_measured.py: factors of links' rates, target losses, and
    # deadlines as multiples of a fast plan's time.
    config.link_rates = (1.0, 0.3, 0.1)
    config.losses = (0.6, 0.5, 0.45)
    config.deadlines = (1.3, 4.0, 12.0)
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    ways, seeds = ("model only", "gradients only", "model, then gradients"), (0, 1, 2)
    for way, seed in itertools.product(("joint", *ways), seeds):
        add(methods=(way,), seed=seed)
    for way, seed in itertools.product(("joint", *ways[:2]), seeds):
        add(methods=(way,), replan=True, seed=seed)
    for seed in seeds:
        add(methods=("joint",), margin=1.0, seed=seed)
