"""Question: how many bits does L-GreCo save over uniform top-k, at what accuracy?

Command: python scripts/train.py --config=configs/quickstart.py
Data: 8x8 handwritten digits (1,437 for training), bundled with scikit-learn.
Expected: test accuracy within a point of dense (about 0.97), L-GreCo with fewer bits
than uniform. Time: under two minutes on 2 cores.
"""

import ml_collections

from configs import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Three runs on the same seed and batches."""
    config = base.get_config(arg)
    config.experiment = "quickstart"
    config.methods = ("dense", "uniform(0.01)", "lgreco(default=0.01)")
    config.steps = 500
    config.every = 25
    config.warmup_steps = 10
    config.lr_warmup_steps = 10
    config.eval_every = 25
    return config
