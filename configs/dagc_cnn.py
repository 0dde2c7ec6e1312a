"""Question: do ratios per worker help a convolutional network on CIFAR-10?

As dagc_logistic.py, with the four-layer CNN of DAGC's paper: mean ratio 0.1 %,
thresholds 0.05, and L-GreCo's tables per worker, one budget for all layers of all
workers. The split of the data, not of the work, is uneven: batches are equal.

Command: python scripts/sweep.py --config=configs/dagc_cnn.py
One run: python scripts/train.py --config=configs/dagc_cnn.py
Tables: python scripts/report.py
Data: CIFAR-10, fetched where it is missing; see gcjax/data.py.
Expected: after 10,000 steps, SR 10 / 100 / 1000: DAGC-R 68.85 / 69.29 / 68.25 %, top-k
68.72 / 67.36 / 67.35; DAGC-A 63.69 / 63.47 / 64.17, the hard threshold 62.34 / 56.93 /
56.45 (Lu et al., 2023, arXiv:2311.07324, tables 3 and 5). 600 steps of 4 samples per
worker and not 32 end far below: a shortened run, not to be set beside them.
Time: two minutes a run, on one CPU core.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_logistic

SKEWS = (100, 10, 1000)
TARGET_RATIO = 0.001
PAPER = {}  # of ten times as many steps, so beside nothing
# Half to twice the default, as L-GreCo's authors choose, and a tenth to twenty times.
_DENSITIES = (
    (0.0005, 0.0007, 0.001, 0.0014, 0.002),
    (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02),
)
METHODS = ("uniform(0.001)", "dagc_r(0.001)", "hard(0.05)", "dagc_a(0.05)")
MORE = (
    "dagc_r(0.001, criterion='psi')",
    "uniform(0.001, per_layer=True)",
    *(f"pairs(lgreco(default=0.001), densities={d}, every=50)" for d in _DENSITIES),
    "dense",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of DAGC-R; "quick" for seconds on small digits."""
    config = dagc_logistic.get_config(arg)
    config.experiment = config.experiment.replace("logistic", "cnn")
    if arg != "quick":
        config.task = "image_classification('cifar10', 'cnn4', test_size=2000)"
        config.batch_size_per_worker = 4
        config.steps, config.eval_every = 600, 30
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for skew in SKEWS:
        split = dagc_logistic.split(skew)
        for seed in (0, 1, 2):
            for method in METHODS + MORE * (skew == 100):
                add(methods=(method,), split=split, seed=seed)
