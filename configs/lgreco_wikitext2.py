"""Question: for a small Transformer, how many bits does L-GreCo save over uniform?

The families and methods of configs/lgreco_cifar10.py, for a language model on the words
of WikiText-2: most parameters are one embedding matrix with sparse gradients, so the
layers differ more than in a convolutional network. 20 runs: two seeds, which is too
few for a claim about quality.

Command: python scripts/sweep.py --config=configs/lgreco_wikitext2.py
One run: python scripts/train.py --config=configs/lgreco_wikitext2.py
Full size, for a GPU: the same with --config=configs/lgreco_wikitext2.py:full
Tables: python scripts/report.py
Data: WikiText-2 in words, to be put in place by hand; see gcjax/data.py.
Expected: L-GreCo sends fewer bits than uniform of the same family, at a perplexity
close to uniform's; what was measured is in results/tables/lgreco_wikitext2.md.
Time: two to five minutes a run, about an hour in all, on 2 CPU cores.
"""

from collections.abc import Callable

import ml_collections

from configs import base, lgreco_cifar10


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One run of L-GreCo on top-k.

    Args:
      arg: None for the shortened experiment; "full" for the whole vocabulary and a
        larger model, for a GPU; "quick" for seconds on small digits.
    """
    lgreco_cifar10.check(arg)
    config = base.get_config()
    config.experiment = "lgreco_wikitext2"
    config.task = (
        "language_model('wikitext2', vocab_size=1000, d_model=64, num_layers=2, "
        "num_heads=4, seq_len=64)"
    )
    config.methods = ("lgreco(default=0.01)",)
    config.every = 50
    config.warmup_steps = 20
    config.batch_size_per_worker = 4
    config.steps = 400
    config.optimizer = "adamw"
    config.learning_rate = 3e-3
    config.lr_warmup_steps = 20
    config.eval_every = 100
    if arg == "full":
        config.experiment += "_full"
        config.task = (
            "language_model('wikitext2', d_model=256, num_layers=4, num_heads=8, "
            "seq_len=128)"
        )
        config.batch_size_per_worker = 8
        config.steps = 20_000
        config.every = config.warmup_steps = config.lr_warmup_steps = 500
        config.learning_rate = 1e-3
        config.eval_every = config.checkpoint_every = 2_000
    return lgreco_cifar10.quick(config) if arg == "quick" else config


def sweep(add: Callable, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    lgreco_cifar10.sweep(add, seeds)
