"""Question: should a worker with half of the data send more, or less?

Eleven workers, one with 50 % of Fashion-MNIST and ten with 5 %, labels from
Dirichlet(0.5); logistic regression, mean ratio 0.1 %. Scheme I gives the large worker
1 % and the others 0.01 %, scheme II 0.01 % and 0.11 %: the motivating example of DAGC.

Command: python scripts/sweep.py --config=configs/dagc_motivation.py
One run: python scripts/train.py --config=configs/dagc_motivation.py
Tables: python scripts/report.py
Data: Fashion-MNIST, fetched where it is missing; see gcjax/data.py.
Expected: scheme I saves 55, 42, 63 and 63 % of uniform's iterations to 50, 60, 70 and
80 %: Lu et al., 2023, arXiv:2311.07324, figure 2 (with an unknown learning rate).
Time: 10 seconds a run, on 2 CPU cores.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_logistic

TARGET_RATIO = 0.001
TARGETS = (0.5, 0.6, 0.7, 0.8)
PAPER = {}


def _ratios(large: float, small: float) -> str:
    return f"ratios({', '.join(map(str, [large, *[small] * 10]))})"


METHODS = (
    "dense",
    "uniform(0.001)",
    _ratios(0.01, 0.0001),
    _ratios(0.0001, 0.00109),
    "dagc_r(0.001)",
    "dagc_r(0.001, criterion='phi_exact')",
    "dagc_r(0.001, criterion='psi')",
    "dagc_r(0.001, criterion='omega')",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of scheme I; "quick" for seconds on small digits."""
    config = dagc_logistic.get_config(arg)
    config.experiment = config.experiment.replace("logistic", "motivation")
    if arg != "quick":
        config.num_workers = 11
        config.split = f"skewed({(0.5, *[0.05] * 10)}, 0.5)"
        config.methods = (_ratios(0.01, 0.0001),)
        config.steps, config.eval_every = 3000, 20
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for seed in (0, 1, 2, 3, 4):
        for method in METHODS:
            add(methods=(method,), seed=seed)
