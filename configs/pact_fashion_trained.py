"""Question: does a plan keep its promises that begins with a trained network?

As configs/pact_fashion.py, with its profile, but the server has trained the whole
network for an epoch before, at nobody's expense: a switch then has something to lose.

Command: python scripts/train.py --config=configs/pact_fashion_trained.py
All runs: python scripts/sweep.py --config=configs/pact_fashion_trained.py
Expected: the target is met on three of three seeds, for 43 J, 34 re-planned; the plan
switches at once all the same. Time: a run about half a minute, on one CPU core.
"""

from collections.abc import Callable

import ml_collections

from configs import pact_fashion


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run; with "quick" in seconds."""
    config = pact_fashion.get_config(arg)
    config.experiment = "bench_pact_fashion_trained"
    config.start_epochs = 1
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    pact_fashion.sweep(add, ("static", "no compression"), seeds=(0, 1, 2))
