"""Question: on CIFAR-10, how many bits does L-GreCo save over uniform levels?

Three families (top-k, QSGD, PowerSGD), each with the same level everywhere, with
L-GreCo on norms (as published) and with L-GreCo on squared errors, against dense
training on the same batches. 30 runs: three seeds, seed 0 complete first.

Command: python scripts/sweep.py --config=configs/lgreco_cifar10.py
One run: python scripts/train.py --config=configs/lgreco_cifar10.py
Full size, for a GPU: the same with --config=configs/lgreco_cifar10.py:full
Tables: python scripts/report.py
Data: CIFAR-10, fetched where it is missing; see gcjax/data.py.
Expected: L-GreCo sends fewer bits than uniform of the same family, with a test accuracy
within the spread of seeds; what was measured is in results/tables/lgreco_cifar10.md.
Time: one to three minutes a run, about an hour in all, on 2 CPU cores.
"""

from collections.abc import Callable

import ml_collections

from configs import base

# Family: (aggregator, the uniform level). L-GreCo may go from a tenth of the density to
# ten times as much, from half the bits to twice, from a quarter of the rank to four
# times.
FAMILIES = {
    "top_k": ("compressed_mean(top_k())", "0.01"),
    "qsgd": ("compressed_mean(qsgd((2, 3, 4, 5, 6, 7, 8)))", "4"),
    "power_sgd": (f"power_sgd({tuple(range(1, 17))})", "4"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of L-GreCo on top-k.

    Args:
      arg: None for the shortened experiment; "full" for ResNet-18 and 100 epochs, for a
        GPU; "quick" for seconds on small digits.
    """
    check(arg)
    config = base.get_config()
    config.experiment = "lgreco_cifar10"
    config.task = "image_classification('cifar10', 'small_cnn')"
    config.methods = ("lgreco(default=0.01)",)
    config.every = 50
    config.warmup_steps = 20
    config.steps = 500
    config.lr_warmup_steps = 20
    config.eval_every = 100
    if arg == "full":
        config.experiment += "_full"
        config.task = "image_classification('cifar10', 'resnet18', augment=True)"
        config.steps = 39_100  # 100 epochs of 391 steps
        config.weight_decay = 5e-4
        config.every = config.warmup_steps = config.lr_warmup_steps = 391
        config.eval_every = config.checkpoint_every = 3_910
    return quick(config) if arg == "quick" else config


def check(arg: str | None) -> None:
    """Refuses arguments that these configs do not know."""
    if arg not in (None, "quick", "full"):
        raise ValueError(f"the config's argument can be 'quick' or 'full', got {arg!r}")


def quick(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks an experiment to seconds, with data that needs no download."""
    config.experiment += "_quick"  # so that its records stay apart
    config.task = "image_classification('digits', 'small_cnn')"
    # Fewer lengths of the message buffer compile faster, at the price of padding.
    config.aggregator = "compressed_mean(top_k(), spacing=1.5)"
    config.num_workers = 2
    config.steps, config.every, config.eval_every, config.log_every = 8, 2, 4, 2
    config.warmup_steps = config.lr_warmup_steps = 2
    return config


def sweep(add: Callable, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    for seed in seeds:
        add(methods=("dense",), seed=seed)
        for aggregator, level in FAMILIES.values():
            for method in (
                f"uniform({level})",
                f"lgreco(default={level})",
                f"lgreco(default={level}, error='squared')",
            ):
                add(aggregator=aggregator, methods=(method,), seed=seed)
    # Beyond the paper: without the error in the snapshot, do levels stop alternating?
    for seed in seeds:
        for aggregator, level in FAMILIES.values():
            method = f"lgreco(default={level}, sample='gradient')"
            add(aggregator=aggregator, methods=(method,), seed=seed)
