"""Question: over 100 Mbit/s, which exchange reaches an accuracy first?

Fashion-MNIST, a CNN of 582,026 parameters, four processes with a network link each; the
same seed and batches for all. Seconds are those of training, without compilation and
evaluation.

Command: python scripts/bench_time_to_accuracy.py --config=configs/slow_network.py
One run: python scripts/launch.py --processes=4 --rate=100mbit -- \
    scripts/train.py --config=configs/slow_network.py
Data: Fashion-MNIST, fetched where it is missing; see gcjax/data.py.
Expected: all end within two points of dense, and the time that they need grows with the
bits that they send, until computation is all that is left.
Time: one to four minutes a run, on 2 CPU cores; needs root. A shortened run.
"""

from collections.abc import Callable

import ml_collections

from configs import base, lgreco_cifar10

# Aggregator and uniform level.
BF16 = ("compressed_mean(cast(), collective='ring')", "16")
TOP_K = ("compressed_mean(top_k(tolerance=0.02), spacing=1.2)", "0.01")
FOUR_BITS = ("compressed_mean(qsgd(), collective='reduce_scatter', spacing=1.2)", "4")
POWER_SGD = ("power_sgd((1, 2, 3, 4, 5, 6, 8), spacing=1.2)", "4")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of L-GreCo on top-k.

    Args:
      arg: None, or "quick" for seconds on small digits, without processes.

    Raises:
      ValueError: for another argument.
    """
    if arg not in (None, "quick"):
        raise ValueError(f"the config's argument can be 'quick', got {arg!r}")
    config = base.get_config()
    config.experiment = "slow_network"
    config.task = "image_classification('fashion_mnist', 'cnn4_wide')"
    config.mapping = "processes"
    config.num_workers = 4
    config.steps = 400  # shortened: 0.4 epochs
    config.every = 50
    config.warmup_steps = config.lr_warmup_steps = 20
    config.learning_rate = 0.05
    config.eval_every = 50
    if arg == "quick":
        config.mapping = "simulated"
        return lgreco_cifar10.quick(config)
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    add(methods=("dense",))
    add(aggregator=BF16[0], methods=("uniform(16)",))
    for aggregator, level in (TOP_K, FOUR_BITS, POWER_SGD):
        for method in (f"uniform({level})", f"lgreco(default={level})"):
            add(aggregator=aggregator, methods=(method,))
