"""Question: for a small Transformer, how many bits does L-GreCo save over uniform?

The families and methods of configs/lgreco_cifar10.py, for a language model on the words
of WikiText-2: most parameters are one embedding matrix with sparse gradients, so the
layers differ more than in a convolutional network. 20 runs: two seeds, which is too
few for a claim about quality.

Command: python scripts/sweep.py --config=configs/lgreco_wikitext2.py
One run: python scripts/train.py --config=configs/lgreco_wikitext2.py
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
    """One run of L-GreCo on top-k; `arg` "quick" for seconds on small digits."""
    if arg not in (None, "quick"):
        raise ValueError(f"the argument of this config can be 'quick', got {arg!r}")
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
    return lgreco_cifar10.quick(config) if arg else config


def sweep(add: Callable, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Calls `add` with what each run of the experiment overrides."""
    lgreco_cifar10.sweep(add, seeds)
