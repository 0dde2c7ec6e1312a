"""Tasks: batches, models as pure functions, and both mappings over workers."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from gcjax import batches, data, models, tasks

REAL = Path(os.environ.get("GCJAX_DATA") or "/nonexistent")
KEY = jax.random.key(0)
WORDS = "the cat saw a dog and the dog saw a bird over there".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with small made-up data sets."""
    place, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, shape in (("cifar10", (32, 32, 3)), ("fashion_mnist", (28, 28))):
        arrays = {}
        for part, n in (("train", 40), ("test", 20)):
            arrays[f"x_{part}"] = rng.integers(0, 256, (n, *shape), np.uint8)
            arrays[f"y_{part}"] = np.arange(n) % 10
        np.savez(place / f"{name}.npz", **arrays)
    (place / "wikitext2").mkdir()
    for part, n in (("train", 400), ("valid", 30), ("test", 30)):
        lines = [" ".join(rng.permutation(WORDS)) for _ in range(n)]
        (place / f"wikitext2/{part}.txt").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def digits():
    return tasks.image_classification("digits", "small_cnn", test_size=33)


@pytest.fixture(scope="module")
def lm(folder):
    return tasks.language_model(
        "wikitext2",
        data_dir=folder,
        d_model=16,
        num_layers=1,
        num_heads=2,
        seq_len=8,
        eval_tokens=90,
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ["/".join(part.key for part in path) for path, _ in leaves]


def worker_grads(task):
    """One worker's gradient, loss and model state."""
    grad = jax.value_and_grad(task.loss, has_aux=True)
    return lambda params, state, batch: grad(params, state, batch, KEY)


def vmapped(task):
    return jax.vmap(worker_grads(task), (None, None, 0))


def sharded(task, devices):
    def body(params, state, batch):
        # Cast, or the gradient would come out summed over the workers.
        cast = lambda x: jax.lax.pcast(x, "workers", to="varying")
        params, state = jax.tree.map(cast, (params, state))
        out = worker_grads(task)(params, state, jax.tree.map(lambda x: x[0], batch))
        return jax.tree.map(lambda x: x[None], out)

    mesh = jax.make_mesh((devices,), ("workers",), axis_types=(AxisType.Auto,))
    none, workers = PartitionSpec(), PartitionSpec("workers")
    return jax.shard_map(
        body, mesh=mesh, in_specs=(none, none, workers), out_specs=workers
    )


# Batches


def test_batches_are_pure_and_disjoint(digits):
    batch = digits.batches(3, 4, 5)
    got = batch(7)
    assert got["x"].shape == (4, 5, 8, 8, 1) and got["x"].dtype == np.uint8
    assert got["y"].shape == (4, 5) and got["y"].dtype == np.int32
    batch(0), batch(999)  # calls in between change nothing
    for again in (batch(7), digits.batches(3, 4, 5)(7)):
        np.testing.assert_array_equal(got["x"], again["x"])
    assert not np.array_equal(got["x"], digits.batches(4, 4, 5)(7)["x"])


def test_an_epoch_takes_each_sample_once():
    pick = batches.sampler(size=23, seed=0, num_workers=2, batch_size=5)
    first, second = (
        np.concatenate([pick(s).ravel() for s in e]) for e in ((0, 1), (2, 3))
    )
    assert len(set(first)) == len(set(second)) == 20 and set(first) <= set(range(23))
    assert list(first) != list(second)
    with pytest.raises(ValueError, match=r"in \[1, 23\].*got 4 \* 6"):
        batches.sampler(23, 0, 4, 6)


def test_shift_and_mirror_equals_a_loop():
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 7, 3), np.uint8)
    got = batches.shift_and_mirror(x, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    rows, columns = rng.integers(0, 9, (2, 5)), rng.integers(0, 9, (2, 5))
    mirror = rng.random((2, 5)) < 0.5
    for i in np.ndindex(2, 5):
        padded = np.pad(x[i], ((4, 4), (4, 4), (0, 0)))
        want = padded[rows[i] : rows[i] + 6, columns[i] : columns[i] + 7]
        np.testing.assert_array_equal(got[i], want[:, ::-1] if mirror[i] else want)


def test_augmented_batches_are_pure(folder):
    task, plain = (
        tasks.image_classification("cifar10", "lenet", data_dir=folder, augment=a)
        for a in (True, False)
    )
    got, want = task.batches(0, 2, 3)(4), plain.batches(0, 2, 3)(4)
    np.testing.assert_array_equal(got["y"], want["y"])
    assert not np.array_equal(got["x"], want["x"])
    np.testing.assert_array_equal(got["x"], task.batches(0, 2, 3)(4)["x"])


def test_windows_share_only_their_ends():
    got = batches.windows(np.arange(12), 5)
    np.testing.assert_array_equal(got, [range(0, 6), range(5, 11)])
    with pytest.raises(ValueError, match="5 tokens are too few"):
        batches.windows(np.arange(5), 5)


def test_channel_statistics():
    x = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), np.uint8)
    mean, std = batches.channel_statistics(x)
    np.testing.assert_allclose(mean.ravel(), x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std.ravel(), x.std((0, 1, 2)), rtol=1e-6)


# Models

SIZES = [  # dataset, model, norm, parameters, state
    ("fashion_mnist", "logistic", None, 7_850, 0),
    ("digits", "small_cnn", None, 33_546, 0),
    ("fashion_mnist", "small_cnn", None, 29_178, 0),
    ("cifar10", "small_cnn", None, 34_170, 0),
    ("cifar10", "cnn4", None, 235_690, 0),
    ("cifar10", "cnn4_wide", None, 878_538, 0),
    ("cifar10", "lenet", None, 62_006, 0),
    ("fashion_mnist", "lenet", None, 44_426, 0),
    ("cifar10", "vgg11", None, 9_228_362, 0),
    ("digits", "vgg11", "batch", 9_227_210, 2 * 2752),
    ("cifar10", "resnet18", None, 11_173_962, 0),
    ("cifar10", "resnet18", "batch", 11_173_962, 2 * 4800),
]


@pytest.mark.parametrize("dataset, model, norm, params, state", SIZES)
def test_image_models_trace_in_both_mappings(
    dataset, model, norm, params, state, folder
):
    task = tasks.image_classification(dataset, model, data_dir=folder, norm=norm)
    shapes = jax.eval_shape(task.init, KEY)
    assert (count(shapes[0]), count(shapes[1])) == (params, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    batch = task.batches(0, 1, 2)(0)
    for mapped in (vmapped(task), sharded(task, 1)):
        (loss, new_state), grads = jax.eval_shape(mapped, *shapes, batch)
        assert loss.shape == (1,) and loss.dtype == jnp.float32
        assert jax.tree.structure((grads, new_state)) == jax.tree.structure(shapes)


def test_parameter_names(digits, lm):
    names = paths(jax.eval_shape(digits.init, KEY)[0])
    assert names[:2] == ["conv1/bias", "conv1/kernel"] and "dense/kernel" in names
    names = paths(jax.eval_shape(lm.init, KEY)[0])
    assert {"embedding/embedding", "block1/qkv/kernel", "norm/scale"} <= set(names)


@pytest.mark.parametrize("name", ["digits", "lm"])
def test_vmap_and_shard_map_agree(name, request):
    task = request.getfixturevalue(name)
    n = min(2, jax.device_count())
    params, state = jax.jit(task.init)(KEY)
    assert state == {}
    batch = task.batches(0, n, 3)(0)
    (losses, new_state), grads = jax.jit(vmapped(task))(params, state, batch)
    assert new_state == {}
    (other_losses, _), other = jax.jit(sharded(task, n))(params, state, batch)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    # Sums run in another order, so float32 agrees to about 1e-6 of the largest.
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, grads, other)


def test_batch_norm_keeps_running_statistics():
    init, apply = models.functional(
        lambda rngs: models.ConvNorm(3, 4, 3, 1, "batch", rngs)
    )
    params, state = jax.jit(init)(KEY)
    apply = jax.jit(apply, static_argnums=3)
    x = 2 + jax.random.normal(jax.random.key(1), (8, 6, 6, 3))
    y, new = apply(params, state, x, True)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    assert float(jnp.abs(new["norm"]["mean"] - state["norm"]["mean"]).max()) > 0.01
    assert jax.tree.structure(new) == jax.tree.structure(state)
    _, same = apply(params, new, x, False)
    jax.tree.map(np.testing.assert_array_equal, same, new)


@pytest.mark.parametrize("tied, size", [(True, 16 * 13), (False, 16 * 13 * 2 + 13)])
def test_transformer_is_causal(tied, size):
    init, apply = models.functional(
        lambda rngs: models.Transformer(13, 16, 1, 2, 8, tied, rngs)
    )
    params, _ = jax.jit(init)(KEY)
    width = 16  # positions, a block (norms, attention, network), and the last norm
    block = 2 * 2 * width + 4 * width**2 + 4 * width + 8 * width**2 + 5 * width
    assert count(params) == size + 8 * width + block + 2 * width
    tokens = jnp.stack([jnp.arange(8), jnp.arange(8).at[5].set(12)])[:, None]
    logits = jax.jit(lambda t: apply(params, {}, t, True)[0])
    logits, changed = (logits(t) for t in tokens)
    np.testing.assert_array_equal(logits[0, :5], changed[0, :5])
    assert (jnp.abs(logits[0, 5:] - changed[0, 5:]).max(-1) > 1e-4).all()


# Training and evaluation


def train(task, steps, optimizer):
    params, state = jax.jit(task.init)(KEY)
    opt_state = optimizer.init(params)
    batch = task.batches(0, 2, 16)

    @jax.jit
    def step(params, opt_state, batch):
        (loss, _), grads = vmapped(task)(params, state, batch)
        grads = jax.tree.map(lambda g: g.mean(0), grads)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss.mean()

    for i in range(steps):
        params, opt_state, loss = step(params, opt_state, batch(i))
    return params, state, float(loss)


def test_small_cnn_learns_digits(digits):
    params, state, _ = train(digits, 60, optax.sgd(0.03, momentum=0.9))
    metrics = digits.evaluate(params, state)
    assert digits.metric == "accuracy" and metrics["accuracy"] > 0.8  # chance: 0.1
    assert all(type(value) is float for value in metrics.values())


def test_language_model_learns(lm):
    params, state, loss = train(lm, 40, optax.sgd(0.3, momentum=0.9))
    metrics = lm.evaluate(params, state)
    # 12 types, and about 13 different words in each random sentence.
    assert lm.metric == "perplexity" and metrics["perplexity"] < 11.5
    np.testing.assert_allclose(metrics["perplexity"], np.exp(metrics["loss"]))


def test_untrained_perplexity_is_about_the_vocabulary(folder, lm):
    vocab = len(data.load("wikitext2", folder)["vocab"])
    perplexity = lm.evaluate(*jax.jit(lm.init)(KEY))["perplexity"]
    assert abs(perplexity / vocab - 1) < 0.1


def test_a_diverged_language_model_is_evaluated(lm):
    params, state = jax.jit(lm.init)(KEY)
    worse = params | {
        "embedding": {"embedding": params["embedding"]["embedding"] * 1e6}
    }
    assert lm.evaluate(worse, state)["perplexity"] > 1e300
    nan = jax.tree.map(lambda p: p * np.nan, params)
    assert np.isnan(lm.evaluate(nan, state)["perplexity"])


@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_means_in_chunks(n, chunk):
    shapes = set()

    def metrics(batch):
        shapes.add(batch["v"].shape)
        return {"square": batch["v"] ** 2}

    values = np.arange(float(n))
    got = tasks._means(metrics, {"v": values}, chunk)
    assert got == {"square": pytest.approx(np.mean(values**2))}
    assert len(shapes) == 1  # one compilation


# Errors


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(dataset="mnist"), "valid: digits"),
        (dict(dataset="wikitext2"), "unknown image data set"),
        (dict(model="vit"), "valid: logistic, small_cnn, cnn4, cnn4_wide, lenet"),
        (dict(model="cnn4"), "16x16"),
        (dict(norm="batch"), "valid: vgg11, resnet18"),
        (dict(model="vgg11", norm="layer"), "valid: group, batch"),
        (dict(train_size=1438), "train_size must be in [1, 1437], got 1438"),
        (dict(test_size=0), "test_size must be in [1, 360], got 0"),
    ],
)
def test_bad_image_arguments(kwargs, words):
    with pytest.raises(ValueError) as caught:
        tasks.image_classification(
            **{"dataset": "digits", "model": "small_cnn"} | kwargs
        )
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(dataset="ptb"), "valid: wikitext2, tinyshakespeare"),
        (dict(num_heads=3), "multiple of 3, got 128"),
        (dict(eval_tokens=5), "6 tokens are too few for seq_len=64"),
    ],
)
def test_bad_language_arguments(kwargs, words, folder):
    with pytest.raises(ValueError) as caught:
        tasks.language_model(**{"dataset": "wikitext2", "data_dir": folder} | kwargs)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Real data, where they are there


def test_cifar10_statistics_are_the_published_ones():
    if not (REAL / "cifar10.npz").is_file():
        pytest.skip("no cifar10.npz in $GCJAX_DATA")
    mean, std = batches.channel_statistics(data.load("cifar10", REAL)["x_train"])
    np.testing.assert_allclose(mean.ravel() / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(std.ravel() / 255, [0.2470, 0.2435, 0.2616], atol=1e-4)


def test_validation_images_are_training_images_that_are_held_out():
    task = tasks.image_classification("digits", "logistic", validation_size=100)
    images = data.load("digits")
    x, y = (images[f"{k}_train"] for k in "xy")
    assert len(task.labels) == len(y) - 100
    seen = task.batches(0, 1, len(y) - 100)(0)  # an epoch in one batch
    np.testing.assert_array_equal(
        np.bincount(seen["y"][0], minlength=10), np.bincount(y[:-100], minlength=10)
    )
    params, state = task.init(jax.random.key(0))
    held_out = {"x": x[-100:], "y": y[-100:]}
    loss = float(task.loss(params, state, held_out, None)[0])
    assert task.evaluate(params, state)["loss"] == pytest.approx(loss, rel=1e-5)
    sizes = dict(train_size=1400, validation_size=100)
    with pytest.raises(ValueError, match="beside validation_size must be in"):
        tasks.image_classification("digits", "logistic", **sizes)
