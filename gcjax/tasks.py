"""Training tasks on real data: models, losses, batches and held-out metrics.

A task is a NamedTuple of functions, so that training code needs to know neither the
model nor the data. Models are flax.nnx modules, turned into pure functions of plain
dicts: `loss` works under `jax.vmap` over workers and under `jax.shard_map`. There is no
dropout: while training, only the order of samples and their augmentation are random.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from gcjax import data, models, splits
from gcjax.batches import (
    channel_statistics,
    sampler,
    shard_sampler,
    shift_and_mirror,
    windows,
)

Batch = dict[str, Any]  # arrays with a leading axis of samples


class Task(NamedTuple):
    """A model with its data; N workers have B samples each per step."""

    # key -> (params, model_state): nested dicts of float32 arrays; model_state, {} for
    # most models, holds what training changes without a gradient (batch statistics).
    init: Callable[[jax.Array], tuple[dict, dict]]
    # (params, model_state, batch [B, ...], key) -> (mean loss, a float32 scalar,
    # new model_state) of one worker; pure. No task uses the key so far.
    loss: Callable[[dict, dict, Batch, jax.Array], tuple[jax.Array, dict]]
    # (params, model_state) -> metrics on held-out data, Python floats.
    evaluate: Callable[[dict, dict], dict[str, float]]
    # (seed, N, B) -> (step -> batch [N, B, ...] of NumPy arrays), a pure function.
    batches: Callable[[int, int, int], Callable[[int], Batch]]
    metric: str  # the main metric of `evaluate`: "accuracy" or "perplexity"
    # With a split, (seed, N) -> the numbers of each worker's own training samples, from
    # which its batches are drawn; None: all share all, without overlap in an epoch.
    shards: Callable[[int, int], splits.Shards] | None = None
    labels: np.ndarray | None = None  # int[n] of the training samples, for figures


def image_classification(
    dataset: str,
    model: str,
    *,
    data_dir: str | os.PathLike | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    validation_size: int = 0,
    augment: bool = False,
    norm: str | None = None,
    split: splits.Split | None = None,
) -> Task:
    """Image classification with cross-entropy.

    Batches are {"x": uint8 [N, B, h, w, c], "y": int32 [N, B]}; `loss` normalises each
    channel by its mean and standard deviation in the whole training set.

    Args:
      dataset: One of `data.IMAGE_SETS`.
      model: "logistic", "small_cnn", "cnn4", "cnn4_wide", "lenet", "vgg11" or
        "resnet18".
      data_dir: Passed to `data.load`.
      train_size: Number of training images kept, the first ones; None keeps all.
      test_size: The same for test images.
      validation_size: Evaluate on so many training images, the last ones, which are
        held out of training, in the place of the test images: for decisions that are
        made while training runs. 0: on the test images.
      augment: Apply `batches.shift_and_mirror`, drawn from (seed, step): for CIFAR.
      norm: "group" or "batch", for vgg11 and resnet18, where None means "group". The
        running statistics of "batch" are the model_state.
      split: Which images each worker has, from `gcjax.splits`.

    Raises:
      ValueError: Bad name or size, or images too small for the model.
      FileNotFoundError: As in `data.load`.
    """
    _check_name("image data set", dataset, data.IMAGE_SETS)
    _check_name("model", model, models.MODELS)
    if norm is not None:
        _check_name("norm", norm, ("group", "batch"))
        _check_name("model with norm", model, ("vgg11", "resnet18"))
    images = data.load(dataset, data_dir)
    shape, classes = images["x_train"].shape[1:], int(images["y_train"].max()) + 1
    if model in ("cnn4", "cnn4_wide", "lenet") and min(shape[:2]) < 16:
        raise ValueError(f"{model} needs images of 16x16 or more; {dataset}: {shape}")
    mean, std = channel_statistics(images["x_train"])
    train, test = (
        {k: _first(images[f"{k}_{part}"], size, f"{part}_size") for k in "xy"}
        for part, size in (("train", train_size), ("test", test_size))
    )
    if validation_size:
        kept = len(images["y_train"]) - validation_size
        kept = _within(train_size, kept, "train_size beside validation_size")
        train = {k: images[f"{k}_train"][:kept] for k in "xy"}
        test = {k: images[f"{k}_train"][-validation_size:] for k in "xy"}
    init, apply = models.functional(
        lambda rngs: models.MODELS[model](shape, classes, norm, rngs)
    )
    score = _accuracy(apply, lambda x: (x.astype(jnp.float32) - mean) / std)
    samples = splits.Samples(train["y"])
    held_out = test, 500, "accuracy"
    return _task(init, score, train, *held_out, samples, split, augment)


def activity_recognition(
    dataset: str = "wisdm",
    *,
    data_dir: str | os.PathLike | None = None,
    hidden: int = 0,
    split: splits.Split | None = None,
) -> Task:
    """Recognition of what the bearer of a phone does, from features of its motion.

    Batches are {"x": float32 [N, B, 43], "y": int32 [N, B]}, normalised by mean and
    standard deviation of the training set; missing values are its mean. Users of the
    test set are not in the training set.

    Args:
      dataset: One of `data.SENSOR_SETS`.
      data_dir: Passed to `data.load`.
      hidden: Width of a hidden layer with ReLU; 0 for logistic regression.
      split: Which samples each worker has: `gcjax.splits.by_user()`, with one worker
        per user, at most 30, or another one.

    Raises:
      ValueError, FileNotFoundError: Bad name or size; data missing, as in `data.load`.
    """
    _check_name("sensor data set", dataset, data.SENSOR_SETS)
    if hidden < 0:
        raise ValueError(f"hidden must be >= 0, got {hidden}")
    content = data.load(dataset, data_dir)
    mean = np.nanmean(content["x_train"], axis=0)
    std = np.nanstd(content["x_train"], axis=0) + 1e-6
    prepared = lambda x: np.nan_to_num((x - mean) / std).astype(np.float32)
    train, test = (
        {"x": prepared(content[f"x_{part}"]), "y": content[f"y_{part}"]}
        for part in ("train", "test")
    )
    sizes = train["x"].shape[1], *([hidden] * bool(hidden)), int(train["y"].max()) + 1
    init, apply = models.functional(lambda rngs: models.Perceptron(sizes, rngs))
    score = _accuracy(apply, lambda x: x)
    samples = splits.Samples(train["y"], content["users_train"])
    return _task(init, score, train, test, 500, "accuracy", samples, split)


def _accuracy(apply: Callable, prepare: Callable) -> Callable:
    """Makes the `score` of a classifier; see `_task`."""

    def score(params, model_state, batch, training):
        logits, model_state = apply(params, model_state, prepare(batch["x"]), training)
        hits = (logits.argmax(-1) == batch["y"]).astype(jnp.float32)
        losses = cross_entropy(logits, batch["y"])
        return {"accuracy": hits, "loss": losses}, model_state

    return score


def language_model(
    dataset: str,
    *,
    data_dir: str | os.PathLike | None = None,
    vocab_size: int | None = None,
    d_model: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    seq_len: int = 64,
    eval_tokens: int | None = 32_768,
    tied: bool = True,
    split: splits.Split | None = None,
) -> Task:
    """Next-token prediction by a causal Transformer with cross-entropy.

    Batches are {"tokens": int32 [N, B, seq_len + 1]}: windows of the training text that
    share only their end tokens. The perplexity is of the first `eval_tokens` of the
    validation text in windows without earlier context, so it is higher than with long
    contexts. In a reduced vocabulary "<unk>" is predicted like any word: compare
    perplexities only at equal `vocab_size`. "shakespeare_roles" has windows of single
    roles, the users of a split, whose labels are the plays; roles too short for one
    window are left out, and validation windows are of roles in random order.

    Args:
      dataset: One of `data.TEXT_SETS`.
      data_dir: Passed to `data.load`.
      vocab_size: Passed to `data.load`: number of words kept in "wikitext2".
      d_model: Width, a multiple of num_heads.
      num_layers: Number of blocks.
      num_heads: Attention heads in each block.
      seq_len: Number of tokens that the model sees.
      eval_tokens: Validation tokens predicted, rounded down to windows; None takes all.
      tied: The output matrix is the transposed embedding.
      split: Which windows each worker has, from `gcjax.splits`; of other texts than
        "shakespeare_roles" all have one label.

    Raises:
      ValueError, FileNotFoundError: Bad name or size; data missing, as in `data.load`.
    """
    _check_name("text data set", dataset, data.TEXT_SETS)
    if d_model % num_heads:
        raise ValueError(f"d_model must be a multiple of {num_heads}, got {d_model}")
    text = data.load(dataset, data_dir, vocab_size)
    if "roles" in text:
        train, samples = _role_windows(text, "train", seq_len)
        valid, _ = _role_windows(text, "valid", seq_len)
        order = np.random.default_rng(0).permutation(len(valid["tokens"]))
        most = None if eval_tokens is None else max(1, eval_tokens // seq_len)
        valid = {"tokens": valid["tokens"][order[:most]]}
    else:
        end = None if eval_tokens is None else eval_tokens + 1
        train = {"tokens": windows(text["train"], seq_len)}
        valid = {"tokens": windows(text["valid"][:end], seq_len)}
        samples = splits.Samples(np.zeros(len(train["tokens"]), np.int64))
    sizes = (len(text["vocab"]), d_model, num_layers, num_heads, seq_len)
    init, apply = models.functional(lambda rngs: models.Transformer(*sizes, tied, rngs))

    def score(params, model_state, batch, training):
        inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits, model_state = apply(params, model_state, inputs, training)
        hits = (logits.argmax(-1) == labels).astype(jnp.float32)
        losses = cross_entropy(logits, labels)
        return {"accuracy": hits.mean(-1), "loss": losses.mean(-1)}, model_state

    return _task(init, score, train, valid, 16, "perplexity", samples, split)


def _role_windows(text, part: str, seq_len: int) -> tuple[Batch, splits.Samples]:
    """Windows of every role that has one; the role is the user, the play the label."""
    plays = sorted({role.split("/")[0] for role in text["roles"]})
    parts, labels, users = [], [], []
    for user, (role, tokens) in enumerate(zip(text["roles"], text[part], strict=True)):
        if len(tokens) > seq_len:
            parts.append(windows(tokens, seq_len))
            labels += [plays.index(role.split("/")[0])] * len(parts[-1])
            users += [user] * len(parts[-1])
    if not parts:
        raise ValueError(
            f"no role has the {seq_len + 1} tokens of a window; {seq_len=}"
        )
    samples = splits.Samples(np.array(labels), np.array(users))
    return {"tokens": np.concatenate(parts)}, samples


def _task(
    init, score, train, held_out, chunk, metric, samples, split, augment=False
) -> Task:
    """Puts a task together.

    Args:
      init: As in `Task`.
      score: (params, model_state, batch, training) -> (metrics, new model_state);
        metrics are arrays [samples], "loss" is one of them.
      train: Training samples, a `Batch`.
      held_out: Held-out samples, a `Batch`.
      chunk: Largest number of held-out samples scored at a time.
      metric: As in `Task`; "perplexity" is computed from the loss.
      samples: Labels and users of the training samples.
      split: Which of them each worker has, or None.
      augment: Whether to augment the images in `train`.
    """

    def loss(params, model_state, batch, key):
        del key
        metrics, model_state = score(params, model_state, batch, True)
        return metrics["loss"].mean(), model_state

    held_out_metrics = jax.jit(lambda *args: score(*args, False)[0])

    def evaluate(params, model_state):
        scored = functools.partial(held_out_metrics, params, model_state)
        means = _means(scored, held_out, chunk)
        if metric == "perplexity":  # stays finite after divergence
            means = {metric: math.exp(min(means["loss"], 700.0)), **means}
        return means

    # Weights, batches and the record's profile all ask for them.
    dealt = functools.cache(lambda seed, n: split(samples, n, seed))
    shards = None if split is None else dealt

    def batches(seed, num_workers, batch_size):
        if shards is not None:
            owned = shards(seed, num_workers)
            pick = shard_sampler(owned, seed, batch_size)
        else:
            size = len(next(iter(train.values())))
            pick = sampler(size, seed, num_workers, batch_size)

        def batch(step):
            picked = {name: array[pick(step)] for name, array in train.items()}
            if augment:
                rng = np.random.default_rng((seed, 1, int(step)))
                picked["x"] = shift_and_mirror(picked["x"], rng)
            return picked

        return batch

    return Task(init, loss, evaluate, batches, metric, shards, samples.labels)


def _check_name(kind: str, name: str, valid) -> None:
    """Raises ValueError unless the name is one of the valid ones."""
    if name not in valid:
        raise ValueError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")


def _first(array: np.ndarray, size: int | None, name: str) -> np.ndarray:
    """Takes the first `size` entries, or all."""
    return array[: _within(size, len(array), name)]


def _within(size: int | None, most: int, name: str) -> int:
    """Checks a number of samples; None stands for as many as there are."""
    size = most if size is None else size
    if not 1 <= size <= most:
        raise ValueError(f"{name} must be in [1, {most}], got {size}")
    return size


def _means(metrics: Callable, arrays: Batch, chunk: int) -> dict[str, float]:
    """Averages what a jitted function computes for each sample, in equal chunks.

    The last chunk is filled up with the last sample, so that one compilation does.
    """
    n = len(next(iter(arrays.values())))
    chunk = math.ceil(n / math.ceil(n / chunk))
    index = np.minimum(np.arange(0, n, chunk)[:, None] + np.arange(chunk), n - 1)
    parts = [metrics({k: v[rows] for k, v in arrays.items()}) for rows in index]
    joined = jax.tree.map(lambda *v: np.concatenate(v)[:n], *jax.device_get(parts))
    return {name: float(v.mean(dtype=np.float64)) for name, v in joined.items()}


# Models
