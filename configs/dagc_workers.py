"""Question: does what DAGC-R saves depend on the number of workers?

As dagc_logistic.py at a skew of 100 and a mean ratio of 0.1 %, with 5 to 200 workers.

Command: python scripts/sweep.py --config=configs/dagc_workers.py
One run: python scripts/train.py --config=configs/dagc_workers.py
Tables: python scripts/report.py
Data: Fashion-MNIST, fetched where it is missing; see gcjax/data.py.
Expected: the published sweep (Lu et al., 2023, arXiv:2311.07324, table 4; a CNN on
CIFAR-10, so not for comparison) has DAGC-R 0.4 to 0.8 points above top-k throughout.
Time: 10 seconds a run of 5 workers, minutes for 200; 3,000 steps, a shortened run.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_logistic

COUNTS = (5, 10, 20, 50, 100, 200)
TARGET_RATIO = 0.001
PAPER = {}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of DAGC-R with 20 workers; "quick" for seconds on small digits."""
    config = dagc_logistic.get_config(arg)
    config.experiment = config.experiment.replace("logistic", "workers")
    if arg != "quick":
        config.num_workers, config.steps = 20, 3000
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for count in COUNTS:
        for seed in (0, 1, 2) if count < 100 else (0,):
            for rule in ("uniform(0.001)", "dagc_r(0.001)"):
                add(methods=(rule,), num_workers=count, seed=seed)
