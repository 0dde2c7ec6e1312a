"""Every field of an experiment, with its default. Other configs override some.

Command: python scripts/train.py --config=configs/base.py --config.steps=100
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """All fields; no experiment of its own."""
    del arg
    config = ml_collections.ConfigDict()
    # Names the folder of records in results/runs.
    config.experiment = "base"
    # A call of a factory in gcjax.tasks; data_dir is added.
    config.task = "image_classification('digits', 'small_cnn')"
    # A call of a function in gcjax.splits: which samples each worker has; "" for all.
    config.split = ""
    # Where data sets lie; "" for $GCJAX_DATA or the cache.
    config.data_dir = ""
    # A call of gcjax.compressed_mean, gcjax.power_sgd or gcjax.parameter_server (then
    # without allocation and weights, which come from the method and the data's split).
    config.aggregator = "compressed_mean(top_k())"
    # One run each, one after the other: "dense", or a call of a selector; for a
    # parameter server of an allocation, see gcjax.experiment.allocations.
    config.methods = ("lgreco(default=0.01)",)
    # Steps between selections.
    config.every = 100
    # First steps, sent uncompressed.
    config.warmup_steps = 0
    # "simulated" (vmap on one device), "devices" (shard_map, one worker on each) or
    # "processes" (the same over the devices of all processes; set by scripts/train.py).
    config.mapping = "simulated"
    config.num_workers = 8
    # Samples per worker and step, over all micro-batches.
    config.batch_size_per_worker = 16
    # Micro-batches per step, accumulated before one exchange.
    config.micro_batches = 1
    # Local SGD steps, each with its part of the batch, after which the change of the
    # weights is exchanged in the gradient's place; 0 to exchange gradients.
    config.local_steps = 0
    # Of the local steps; learning_rate is then that of the server, usually 1.
    config.local_learning_rate = 0.01
    config.steps = 1000
    config.seed = 0
    # "sgd" (with momentum) or "adamw".
    config.optimizer = "sgd"
    config.learning_rate = 0.1
    config.momentum = 0.9
    config.weight_decay = 0.0
    # Linear from 0, over these first steps.
    config.lr_warmup_steps = 0
    # "constant" or "cosine" (to 0 at the last step).
    config.lr_schedule = "cosine"
    # Global norm that the mean gradient is clipped to; 0 for no clipping.
    config.clip_norm = 0.0
    # Steps between evaluations; 0 for one at the end.
    config.eval_every = 100
    # Steps between lines of metrics.jsonl.
    config.log_every = 20
    # Steps between checkpoints in workdir; 0 for none.
    config.checkpoint_every = 0
    # Continue from the last checkpoint in workdir.
    config.resume = False
    return config
