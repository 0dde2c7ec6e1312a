"""Question: over 100 Mbit/s, which exchange reaches an accuracy first?

Fashion-MNIST, a CNN of 582,026 parameters, four processes with a network link each; the
same seed and batches for all. Seconds are those of training, without compilation and
evaluation.

Command: python scripts/bench_time_to_accuracy.py --config=configs/slow_network.py
One run: python scripts/launch.py --processes=4 --rate=100mbit -- \
    scripts/train.py --config=configs/slow_network.py
Data: Fashion-MNIST, fetched where it is missing; see gcjax/data.py.
Expected: all end within a point of dense (about 89 %), and the time that they need
grows with the bits that they send, until computation is all that is left.
Time: dense about ten minutes, the others two to six, on 2 CPU cores; needs root.
"""

from collections.abc import Callable

import ml_collections

from configs import base

# Aggregator and uniform level.
BF16 = ("compressed_mean(cast(), collective='reduce_scatter')", "16")
FOUR_BITS = ("compressed_mean(qsgd(), collective='reduce_scatter')", "4")
TOP_K = ("compressed_mean(top_k())", "0.01")
POWER_SGD = ("power_sgd((1, 2, 3, 4, 5, 6, 8))", "4")


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
    config.steps = 1500
    config.every = 100
    config.warmup_steps = config.lr_warmup_steps = 20
    config.learning_rate = 0.05
    config.eval_every = 75
    if arg == "quick":
        config.experiment += "_quick"
        config.task = "image_classification('digits', 'small_cnn')"
        config.mapping = "simulated"
        config.num_workers = 2
        config.steps, config.every, config.eval_every, config.log_every = 8, 2, 4, 2
        config.warmup_steps = config.lr_warmup_steps = 2
    return config


def sweep(add: Callable) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    add(methods=("dense",))
    for aggregator, level in (BF16, FOUR_BITS, TOP_K, POWER_SGD):
        add(aggregator=aggregator, methods=(f"uniform({level})",))
    for aggregator, level in (FOUR_BITS, TOP_K, POWER_SGD):
        add(aggregator=aggregator, methods=(f"lgreco(default={level})",))
