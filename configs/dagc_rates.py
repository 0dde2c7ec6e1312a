"""Question: does the order of allocations change when each has its best learning rate?

As dagc_logistic.py at a skew of 100, at four learning rates; steps are counted to fixed
accuracies, so that rates can be compared.

Command: python scripts/sweep.py --config=configs/dagc_rates.py
One run: python scripts/train.py --config=configs/dagc_rates.py
Tables: python scripts/report.py
Data: Fashion-MNIST, fetched where it is missing; see gcjax/data.py.
Expected: nothing is published about it: DAGC's paper does not give this rate.
Time: 15 seconds a run, on 2 CPU cores.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_logistic

RATES = (0.003, 0.01, 0.03, 0.1)
TARGET_RATIO = 0.001
TARGETS = (0.8, 0.81, 0.82)
PAPER = {}
METHODS = (
    "dense",
    "uniform(0.001)",
    "dagc_r(0.001)",
    "dagc_r(0.001, criterion='omega')",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of DAGC-R; "quick" for seconds on small digits."""
    config = dagc_logistic.get_config(arg)
    config.experiment = config.experiment.replace("logistic", "rates")
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for seed in (0, 1):
        for rate in RATES:
            for method in METHODS:
                add(methods=(method,), learning_rate=rate, seed=seed)
