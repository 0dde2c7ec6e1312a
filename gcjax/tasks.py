"""Training tasks on real data: models, losses, batches and held-out metrics.

A task is a NamedTuple of functions, so that training code needs to know neither the
model nor the data. Models are flax.nnx modules, turned into pure functions of plain
dicts: `loss` works under `jax.vmap` over workers and under `jax.shard_map`. There is no
dropout: while training, only the order of samples and their augmentation are random.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from gcjax import data, splits

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
      augment: Apply `data.shift_and_mirror`, drawn from (seed, step): for CIFAR.
      norm: "group" or "batch", for vgg11 and resnet18, where None means "group". The
        running statistics of "batch" are the model_state.
      split: Which images each worker has, from `gcjax.splits`.

    Raises:
      ValueError: Bad name or size, or images too small for the model.
      FileNotFoundError: As in `data.load`.
    """
    _check_name("image data set", dataset, data.IMAGE_SETS)
    _check_name("model", model, MODELS)
    if norm is not None:
        _check_name("norm", norm, ("group", "batch"))
        _check_name("model with norm", model, ("vgg11", "resnet18"))
    images = data.load(dataset, data_dir)
    shape, classes = images["x_train"].shape[1:], int(images["y_train"].max()) + 1
    if model in ("cnn4", "cnn4_wide", "lenet") and min(shape[:2]) < 16:
        raise ValueError(f"{model} needs images of 16x16 or more; {dataset}: {shape}")
    mean, std = data.channel_statistics(images["x_train"])
    train, test = (
        {k: _first(images[f"{k}_{part}"], size, f"{part}_size") for k in "xy"}
        for part, size in (("train", train_size), ("test", test_size))
    )
    init, apply = _functional(lambda rngs: MODELS[model](shape, classes, norm, rngs))
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
    init, apply = _functional(lambda rngs: Perceptron(sizes, rngs))
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
        train = {"tokens": data.windows(text["train"], seq_len)}
        valid = {"tokens": data.windows(text["valid"][:end], seq_len)}
        samples = splits.Samples(np.zeros(len(train["tokens"]), np.int64))
    sizes = (len(text["vocab"]), d_model, num_layers, num_heads, seq_len)
    init, apply = _functional(lambda rngs: Transformer(*sizes, tied, rngs))

    def score(params, model_state, batch, training):
        inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits, model_state = apply(params, model_state, inputs, training)
        return {"loss": cross_entropy(logits, labels).mean(-1)}, model_state

    return _task(init, score, train, valid, 16, "perplexity", samples, split)


def _role_windows(text, part: str, seq_len: int) -> tuple[Batch, splits.Samples]:
    """Windows of every role that has one; the role is the user, the play the label."""
    plays = sorted({role.split("/")[0] for role in text["roles"]})
    windows, labels, users = [], [], []
    for user, (role, tokens) in enumerate(zip(text["roles"], text[part], strict=True)):
        if len(tokens) > seq_len:
            windows.append(data.windows(tokens, seq_len))
            labels += [plays.index(role.split("/")[0])] * len(windows[-1])
            users += [user] * len(windows[-1])
    if not windows:
        raise ValueError(
            f"no role has the {seq_len + 1} tokens of a window; {seq_len=}"
        )
    samples = splits.Samples(np.array(labels), np.array(users))
    return {"tokens": np.concatenate(windows)}, samples


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

    shards = None if split is None else lambda seed, n: split(samples, n, seed)

    def batches(seed, num_workers, batch_size):
        if shards is not None:
            owned = shards(seed, num_workers)
            pick = data.shard_sampler(owned, seed, batch_size)
        else:
            size = len(next(iter(train.values())))
            pick = data.sampler(size, seed, num_workers, batch_size)

        def batch(step):
            picked = {name: array[pick(step)] for name, array in train.items()}
            if augment:
                rng = np.random.default_rng((seed, 1, int(step)))
                picked["x"] = data.shift_and_mirror(picked["x"], rng)
            return picked

        return batch

    return Task(init, loss, evaluate, batches, metric, shards, samples.labels)


def _check_name(kind: str, name: str, valid) -> None:
    """Raises ValueError unless the name is one of the valid ones."""
    if name not in valid:
        raise ValueError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")


def _first(array: np.ndarray, size: int | None, name: str) -> np.ndarray:
    """Takes the first `size` entries, or all."""
    if size is not None and not 1 <= size <= len(array):
        raise ValueError(f"{name} must be in [1, {len(array)}], got {size}")
    return array[:size]


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


def _functional(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable, Callable]:
    """Turns the module that `build` makes into pure functions of plain dicts.

    Returns:
      init: key -> (params, model_state).
      apply: (params, model_state, inputs, training) -> (outputs, new model_state).
    """
    definition = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key):
        _, params, stats = nnx.split(build(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(params, model_state, inputs, training):
        model = nnx.merge(definition, params, model_state)
        outputs = model(inputs, training)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return init, apply


def _normal(std: float) -> Callable:
    """Makes an initialiser that draws from a normal distribution."""

    def init(key, shape, dtype=jnp.float32, **_):
        # Drawn flat: several axes take four times as long to compile on CPUs.
        return std * jax.random.normal(key, math.prod(shape), dtype).reshape(shape)

    return init


def _conv(c_in, c_out, size, rngs, **options) -> nnx.Conv:
    """Makes a convolution, initialised for ReLU (He et al., 2015, arXiv:1502.01852)."""
    init = _normal(math.sqrt(2 / (size * size * c_in)))
    return nnx.Conv(c_in, c_out, (size, size), kernel_init=init, rngs=rngs, **options)


def _linear(n_in, n_out, rngs, std=None) -> nnx.Linear:
    """Makes a dense layer; outputs have the variance of the inputs without `std`."""
    init = _normal(std or 1 / math.sqrt(n_in))
    return nnx.Linear(n_in, n_out, kernel_init=init, rngs=rngs)


def _pool(x: jax.Array, reduce: Callable) -> jax.Array:
    """Reduces 2x2 windows, faster on CPUs than `reduce_window`; crops odd sizes."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return reduce(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def _size(features: Callable, shape: tuple[int, ...]) -> int:
    """Counts what a function makes of one image of the given shape [h, w, c]."""
    return jax.eval_shape(features, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).size


class Perceptron(nnx.Module):
    """Dense layers with ReLU in between; of one layer, logistic regression."""

    def __init__(self, sizes, rngs):
        self.depth = len(sizes) - 1
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes), 1):
            setattr(self, f"dense{i}", _linear(n_in, n_out, rngs))

    def __call__(self, x, training):
        """Computes logits [b, classes] from inputs [b, ...]."""
        del training
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth):
            x = nnx.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.depth}")(x)


def _logistic(shape, classes, norm, rngs) -> Perceptron:
    """Logistic regression on pixels: 7,850 parameters for Fashion-MNIST."""
    del norm
    return Perceptron((math.prod(shape), classes), rngs)


class SmallCNN(nnx.Module):
    """Three convolutions and a dense layer, made for CPUs.

    The first convolution has stride 2 (stride 1 on images up to 16x16), the others have
    average pooling behind them as long as there are more than 4 rows: 34,170 parameters
    for CIFAR-10, and 33,546 for 8x8 digits.
    """

    def __init__(self, shape, classes, norm, rngs):
        del norm
        size, stride = (3, 1) if min(shape[:2]) <= 16 else (4, 2)
        self.conv1 = _conv(shape[-1], 16, size, rngs, strides=stride)
        self.conv2 = _conv(16, 32, 3, rngs)
        self.conv3 = _conv(32, 64, 3, rngs)
        self.dense = _linear(_size(self.features, shape), classes, rngs)

    def features(self, x):
        """Computes [b, width] from images [b, h, w, c]."""
        x = nnx.relu(self.conv1(x))
        for conv in (self.conv2, self.conv3):
            x = nnx.relu(conv(x))
            x = _pool(x, jnp.mean) if min(x.shape[1:3]) > 4 else x
        return x.reshape(x.shape[0], -1)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        del training
        return self.dense(self.features(x))


class LeNet(nnx.Module):
    """Two convolutions of 5x5 with max pooling, then dense layers.

    With filters (6, 16) and hidden widths (120, 84) this is LeNet-5 with ReLU (62,006
    parameters for CIFAR-10). With (32, 32) and (256,) it is the CNN of two convolutions
    and two dense layers common in work on gradient compression (235,690 parameters).
    With (32, 64) and (512,) it is the one common in federated learning (582,026
    parameters for Fashion-MNIST).

    References:
      LeCun et al., 1998, Gradient-Based Learning Applied to Document Recognition.
      McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from
        Decentralized Data, arXiv:1602.05629 (whose convolutions pad).
    """

    def __init__(self, filters, widths, shape, classes, norm, rngs):
        del norm
        self.conv1 = _conv(shape[-1], filters[0], 5, rngs, padding="VALID")
        self.conv2 = _conv(filters[0], filters[1], 5, rngs, padding="VALID")
        widths = (_size(self.features, shape), *widths, classes)
        self.depth = len(widths) - 1
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"dense{i}", _linear(n_in, n_out, rngs))

    def features(self, x):
        """Computes [b, width] from images [b, h, w, c]."""
        for conv in (self.conv1, self.conv2):
            x = _pool(nnx.relu(conv(x)), jnp.max)
        return x.reshape(x.shape[0], -1)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        del training
        x = self.features(x)
        for i in range(1, self.depth):
            x = nnx.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.depth}")(x)


class ConvNorm(nnx.Module):
    """A convolution without bias, then normalisation by "group" (or None) or "batch".

    References:
      Wu and He, 2018, Group Normalization, arXiv:1803.08494.
      Ioffe and Szegedy, 2015, Batch Normalization, arXiv:1502.03167.
    """

    def __init__(self, c_in, c_out, size, stride, norm, rngs):
        self.conv = _conv(c_in, c_out, size, rngs, strides=stride, use_bias=False)
        if norm == "batch":
            self.norm = nnx.BatchNorm(c_out, momentum=0.9, rngs=rngs)
        else:
            self.norm = nnx.GroupNorm(c_out, num_groups=32, rngs=rngs)

    def __call__(self, x, training):
        """Maps [b, h, w, c_in] to [b, h / stride, w / stride, c_out]."""
        if isinstance(self.norm, nnx.BatchNorm):
            return self.norm(self.conv(x), use_running_average=not training)
        return self.norm(self.conv(x))


class VGG11(nnx.Module):
    """Eight convolutions and one dense layer; images are pooled down to one pixel.

    References:
      Simonyan and Zisserman, 2014, Very Deep Convolutional Networks for Large-Scale
      Image Recognition, arXiv:1409.1556 (configuration A, there without normalisation).
    """

    # name, width, and whether pooling follows
    layers = tuple(
        (f"conv{i}", width, i in (1, 2, 4, 6, 8))
        for i, width in enumerate((64, 128, 256, 256, 512, 512, 512, 512), 1)
    )

    def __init__(self, shape, classes, norm, rngs):
        c_in = shape[-1]
        for name, c_out, _ in self.layers:
            setattr(self, name, ConvNorm(c_in, c_out, 3, 1, norm, rngs))
            c_in = c_out
        self.dense = _linear(c_in, classes, rngs)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        for name, _, pooled in self.layers:
            x = nnx.relu(getattr(self, name)(x, training))
            x = _pool(x, jnp.max) if pooled and min(x.shape[1:3]) > 1 else x
        return self.dense(x.mean((1, 2)))


class ResidualBlock(nnx.Module):
    """Two convolutions with a shortcut, which is 1x1 where the shape changes."""

    def __init__(self, c_in, c_out, stride, norm, rngs):
        self.conv1 = ConvNorm(c_in, c_out, 3, stride, norm, rngs)
        self.conv2 = ConvNorm(c_out, c_out, 3, 1, norm, rngs)
        self.projected = stride > 1 or c_in != c_out
        if self.projected:
            self.shortcut = ConvNorm(c_in, c_out, 1, stride, norm, rngs)

    def __call__(self, x, training):
        """Maps [b, h, w, c_in] to [b, h / stride, w / stride, c_out]."""
        y = self.conv2(nnx.relu(self.conv1(x, training)), training)
        return nnx.relu(y + (self.shortcut(x, training) if self.projected else x))


class ResNet18(nnx.Module):
    """ResNet-18 in the form for 32x32 images: 3x3 stem, no pooling before the blocks.

    References:
      He, Zhang, Ren and Sun, 2015, Deep Residual Learning for Image Recognition,
      arXiv:1512.03385.
    """

    # name, width and stride of each block
    blocks = tuple(
        (f"stage{stage}_block{block}", 32 << stage, 2 if stage > 1 == block else 1)
        for stage in (1, 2, 3, 4)
        for block in (1, 2)
    )

    def __init__(self, shape, classes, norm, rngs):
        c_in = 64
        self.stem = ConvNorm(shape[-1], c_in, 3, 1, norm, rngs)
        for name, c_out, stride in self.blocks:
            setattr(self, name, ResidualBlock(c_in, c_out, stride, norm, rngs))
            c_in = c_out
        self.dense = _linear(c_in, classes, rngs)

    def __call__(self, x, training):
        """Computes logits [b, classes] from images [b, h, w, c]."""
        x = nnx.relu(self.stem(x, training))
        for name, _, _ in self.blocks:
            x = getattr(self, name)(x, training)
        return self.dense(x.mean((1, 2)))


# Makers of image models: (shape [h, w, c], number of classes, norm, rngs) -> module.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "logistic": _logistic,
    "small_cnn": SmallCNN,
    "cnn4": functools.partial(LeNet, (32, 32), (256,)),
    "cnn4_wide": functools.partial(LeNet, (32, 64), (512,)),
    "lenet": functools.partial(LeNet, (6, 16), (120, 84)),
    "vgg11": VGG11,
    "resnet18": ResNet18,
}


class Block(nnx.Module):
    """Causal self-attention and a two-layer network, each with LayerNorm before it."""

    def __init__(self, d_model, num_heads, scale, rngs):
        self.num_heads = num_heads
        self.norm1 = nnx.LayerNorm(d_model, rngs=rngs)
        self.qkv = _linear(d_model, 3 * d_model, rngs, 0.02)
        self.out = _linear(d_model, d_model, rngs, scale)
        self.norm2 = nnx.LayerNorm(d_model, rngs=rngs)
        self.up = _linear(d_model, 4 * d_model, rngs, 0.02)
        self.down = _linear(4 * d_model, d_model, rngs, scale)

    def __call__(self, x):
        """Maps [b, t, d_model] to the same shape."""
        heads = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3 * self.num_heads, -1)
        q, k, v = jnp.split(heads, 3, axis=2)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder-only Transformer with learned positions.

    References:
      Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.
      Radford et al., 2019, Language Models are Unsupervised Multitask Learners
      (LayerNorm first, initialisation scaled by the depth).
      Press and Wolf, 2016, arXiv:1608.05859 (tied embeddings).
    """

    def __init__(self, vocab, d_model, num_layers, num_heads, seq_len, tied, rngs):
        embed = functools.partial(nnx.Embed, embedding_init=_normal(0.02), rngs=rngs)
        self.tied, self.num_layers = tied, num_layers
        self.embedding, self.position = embed(vocab, d_model), embed(seq_len, d_model)
        scale = 0.02 / math.sqrt(2 * num_layers)
        for i in range(1, num_layers + 1):
            setattr(self, f"block{i}", Block(d_model, num_heads, scale, rngs))
        self.norm = nnx.LayerNorm(d_model, rngs=rngs)
        if not tied:
            self.head = _linear(d_model, vocab, rngs, 0.02)

    def __call__(self, tokens, training):
        """Computes logits [b, t, vocab] from tokens int32 [b, t]."""
        del training
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        for i in range(1, self.num_layers + 1):
            x = getattr(self, f"block{i}")(x)
        x = self.norm(x)
        return self.embedding.attend(x) if self.tied else self.head(x)
