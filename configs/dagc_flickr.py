"""Question: what do ratios per worker save where the division of the data is real?

A surrogate for DAGC's headline: fifteen workers whose sizes and labels are those of the
Flickr-Mammal photographs by subcontinent, scaled onto CIFAR-10 by 0.157, with at least
one sample each; four-layer CNN, mean ratio 0.1 %, thresholds 0.05.

Command: python scripts/sweep.py --config=configs/dagc_flickr.py
One run: python scripts/train.py --config=configs/dagc_flickr.py
Tables: python scripts/report.py
Data: CIFAR-10, fetched where it is missing; see gcjax/data.py.
Expected: with VGG11 on the photographs themselves DAGC-R saves 16.65 % of top-k's
iterations to 70 %, and DAGC-A 25.43 % of the hard threshold's: Lu et al., 2023,
arXiv:2311.07324, section 5 (its abstract has the two numbers the other way round). Here
images, model, steps and batches are others.
Time: two minutes a run of 600 steps, on one CPU core; a shortened run.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_cnn

TARGET_RATIO = 0.001
PAPER = {}
METHODS = (
    "uniform(0.001)",
    "dagc_r(0.001)",
    "hard(0.05)",
    "dagc_a(0.05)",
    "dagc_r(0.001, criterion='omega')",
    "dense",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of DAGC-R; "quick" for seconds on small digits."""
    config = dagc_cnn.get_config(arg)
    config.experiment = config.experiment.replace("cnn", "flickr")
    if arg != "quick":
        config.split, config.num_workers = "flickr()", 15
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for seed in (0, 1, 2):
        for method in METHODS:
            add(methods=(method,), seed=seed)
