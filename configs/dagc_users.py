"""Question: what do ratios per worker do where every worker is a real user?

The 15 users with most samples: of phones in WISDM (motion features, a network with one
hidden layer, six activities) and roles of Shakespeare's plays (next character, a small
Transformer). Mean ratios 1 % and 0.1 %; one threshold for all, and DAGC-A.

Command: python scripts/sweep.py --config=configs/dagc_users.py
One run: python scripts/train.py --config=configs/dagc_users.py
Tables: python scripts/report.py
Data: WISDM and Shakespeare by role; see gcjax/data.py for what to put where.
Expected: nothing is published about these.
Time: seconds a run of WISDM, minutes of Shakespeare, on one CPU core.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_logistic

TASKS = {
    "activity_recognition('wisdm', hidden=64)": dict(learning_rate=0.05),
    "language_model('shakespeare_roles', d_model=64, seq_len=48, eval_tokens=8192)": (
        dict(learning_rate=0.3, batch_size_per_worker=4, steps=1000, eval_every=50)
    ),
}
TARGET_RATIO = 0.01
PAPER = {}
METHODS = (
    "dense",
    "uniform(0.01)",
    "dagc_r(0.01)",
    "dagc_r(0.01, criterion='psi')",
    "dagc_r(0.01, criterion='omega')",
    "resolved(0.01, criterion='psi')",
    "hard(0.05)",
    "dagc_a(0.05)",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of DAGC-R on WISDM; "quick" for seconds on small digits."""
    config = dagc_logistic.get_config(arg)
    config.experiment = config.experiment.replace("logistic", "users")
    if arg != "quick":
        config.task, options = next(iter(TASKS.items()))
        config.update(options)
        config.split, config.num_workers = "by_user()", 15
        config.methods = ("dagc_r(0.01)",)
        config.steps, config.eval_every = 2000, 50
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for task, options in TASKS.items():
        for seed in (0, 1, 2):
            for method in METHODS:
                add(task=task, methods=(method,), seed=seed, **options)
