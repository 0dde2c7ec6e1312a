"""Question: with as many packets, are chosen widths better than a fixed one?

Fed-CVLC: every worker may upload two packets of 32 bytes a step, and chooses how many
values go into each at how many bits, against 6, 8, 10, 12 and 32 bits for all values.
Logistic regression on Fashion-MNIST, ten workers of equal size, labels from
Dirichlet(0.5). Solved again every 50 steps, with three models of what rounding loses.

Command: python scripts/sweep.py --config=configs/packets.py
One run: python scripts/train.py --config=configs/packets.py
Tables: python scripts/report.py
Data: Fashion-MNIST, fetched where it is missing; see gcjax/data.py.
Expected: chosen widths at or above the best fixed one: Su et al., 2024,
arXiv:2402.03770 (whose margins, of larger networks, do not carry over).
Time: 15 seconds a run of 2,000 steps, on 2 CPU cores.
"""

from collections.abc import Callable

import ml_collections

from configs import dagc_logistic, lgreco_cifar10

_PACKETS = "2, 32, 50"
CHOSEN = tuple(f"fed_cvlc({_PACKETS}, model='{m}')" for m in ("grid", "pq", "qsgd"))
FIXED = tuple(f"fed_cvlc({_PACKETS}, bits={b})" for b in (6, 8, 10, 12, 32))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of chosen widths; "quick" for seconds on small digits."""
    config = dagc_logistic.get_config()
    config.experiment = "packets"
    config.split = "skewed(None, 0.5)"
    config.aggregator = f"compressed_mean({CHOSEN[0]})"
    config.methods = ("uniform(2)",)
    config.steps = 2000
    if arg == "quick":
        config = lgreco_cifar10.quick(config)
        config.task = "image_classification('digits', 'logistic')"
        config.aggregator = f"compressed_mean({CHOSEN[0]})"
    elif arg is not None:
        raise ValueError(f"the config's argument can be 'quick', got {arg!r}")
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for seed in (0, 1, 2):
        add(methods=("dense",), seed=seed)
        for compressor in CHOSEN + FIXED:
            add(aggregator=f"compressed_mean({compressor})", seed=seed)
