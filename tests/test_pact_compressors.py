"""Smaller networks are the functions they should be, and cost what is counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcjax import models, tasks
from gcjax.pact import compressors

FAMILIES = {f.__name__: f() for f in (compressors.channels, compressors.low_rank)}
FAMILIES["entries"] = compressors.entries()
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def task():
    return tasks.image_classification("digits", "small_cnn", validation_size=100)


@pytest.fixture(scope="module")
def trained(task):
    """A network whose layers are not random any more."""
    params, _ = task.init(jax.random.key(0))
    batch = task.batches(0, 1, 64)
    step = jax.jit(jax.grad(lambda p, b: task.loss(p, {}, b, None)[0]))
    for i in range(20):
        grads = step(params, jax.tree.map(lambda x: x[0], batch(i)))
        params = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, params, grads)
    return params


@pytest.fixture(scope="module")
def images(task):
    return jax.tree.map(lambda x: x[0], task.batches(1, 1, 32)(0))


def logits(model, params, x):
    make = lambda rngs: models.MODELS[model](x.shape[1:], 10, None, rngs)
    apply = models.functional(make)[1]
    return jax.jit(lambda params, x: apply(params, {}, x, False)[0])(params, x)


def compressed(family, params, share):
    """Compiled: one program and not one for each of its operations."""
    return jax.jit(lambda p: family.compress(p, params, share))(params)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


@each_family
def test_a_share_of_one_is_the_network_itself(name, trained):
    assert same(compressed(FAMILIES[name], trained, 1.0), trained)


@pytest.mark.parametrize("model, share", [("small_cnn", 0.5), ("lenet", 0.125)])
def test_pruned_is_the_network_with_those_channels_zeroed(model, share):
    """Also after a flattening, where one channel feeds many inputs."""
    shape = (8, 8, 1) if model == "small_cnn" else (16, 16, 3)
    make = lambda rngs: models.MODELS[model](shape, 10, None, rngs)
    params, _ = models.functional(make)[0](jax.random.key(1))
    bias = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    params = jax.tree.map(lambda x: bias(x) if x.ndim == 1 else x, params)
    pruned = compressed(compressors.channels(), params, share)
    zeroed = jax.tree.map(lambda x: x, params)
    for layer in sorted(params)[:-1]:
        kernel = np.asarray(params[layer]["kernel"])
        norms = np.abs(kernel).reshape(-1, kernel.shape[-1]).sum(0)
        width = max(1, round(share * len(norms)))
        assert pruned[layer]["bias"].shape == (width,)
        kept = (norms >= np.sort(norms)[-width]).astype(np.float32)
        zeroed[layer] = {k: x * kept for k, x in params[layer].items()}
    x = jax.random.normal(jax.random.key(3), (4, *shape))
    found, expected = (logits(model, p, x) for p in (pruned, zeroed))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    assert float(jnp.abs(logits(model, params, x) - found).max()) > 1e-3


@pytest.mark.parametrize("share", [0.5, 0.125])
def test_factors_are_the_best_approximation_of_their_rank(trained, images, share):
    made = compressed(compressors.low_rank(), trained, share)
    product = {}
    for name, layer in made.items():
        kernel = np.asarray(trained[name]["kernel"], np.float64)
        if "narrow" not in layer:
            product[name] = layer
            continue
        flat = kernel.reshape(-1, kernel.shape[-1])
        parts = layer["narrow"]["kernel"], layer["widen"]["kernel"]
        a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in parts)
        left = np.linalg.svd(flat, compute_uv=False)[a.shape[1] :]
        error = np.sum((flat - a @ b) ** 2)
        np.testing.assert_allclose(error, np.sum(left**2), rtol=1e-4)
        assert a.size + b.size < flat.size
        product[name] = {
            "kernel": jnp.asarray(a @ b, jnp.float32).reshape(kernel.shape)
        }
        product[name]["bias"] = layer["widen"]["bias"]
    assert any("narrow" in layer for layer in made.values())
    # And the network computes with the factors what it would with their product.
    x = images["x"].astype(jnp.float32) / 255
    found, expected = (logits("small_cnn", p, x) for p in (made, product))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@each_family
def test_compressing_twice_leads_to_the_same_shapes(name, trained):
    family, whole = FAMILIES[name], jax.eval_shape(lambda: trained)
    compress = jax.jit(
        lambda p, share: family.compress(p, whole, share), static_argnums=1
    )
    once, half = compress(trained, 0.25), compress(trained, 0.5)
    twice = compress(half, 0.25)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(once) == shapes(twice)
    if name == "entries":  # the largest of the largest
        assert same(once, twice)
    if name == "low_rank":  # truncation of a truncation
        for a, b in itertools.product(("conv2",), ("narrow", "widen")):
            np.testing.assert_allclose(
                *(np.abs(t[a][b]["kernel"]) for t in (once, twice)), atol=1e-4
            )
    if name != "entries":
        with pytest.raises(ValueError, match="only become smaller"):
            compress(once, 0.5)


@each_family
def test_costs_fall_with_the_share(name, task, trained, images):
    family, tx = FAMILIES[name], optax.sgd(0.1, momentum=0.9)
    found = []
    for share in (1.0, 0.25):
        params = compressed(family, trained, share)
        found.append(compressors.costs(family, task, params, images, tx))
    for a, b in itertools.pairwise(found):
        assert b.parameter_bytes < a.parameter_bytes
        if name == "entries":  # sparse is not cheap
            assert b.flops_per_sample == a.flops_per_sample
            assert b.training_bytes == a.training_bytes
        else:
            assert b.parameters < a.parameters
            assert b.flops_per_sample < a.flops_per_sample
            assert b.training_bytes < a.training_bytes
    assert found[0].parameters == 33_546  # as models.SmallCNN says
    assert found[0].parameter_bytes == 4 * 33_546


def inside(size, kernel):
    """Taps of a kernel on the image, over all positions of an axis with padding."""
    half = kernel // 2
    at = np.arange(size)
    return int(np.sum(np.minimum(at + half, size - 1) - np.maximum(at - half, 0) + 1))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_counted_flops_are_those_of_the_formula(task, trained, images, share):
    family = FAMILIES["channels"]
    params = compressed(family, trained, share)
    counted = compressors.costs(family, task, params, images, optax.sgd(0.1))
    total, size = 0, 8
    for name, pooled in (("conv1", False), ("conv2", True), ("conv3", False)):
        h, _, c_in, c_out = params[name]["kernel"].shape
        macs = inside(size, h) ** 2 * c_in * c_out
        # Forward and both gradients; the first layer's inputs need none.
        total += 2 * macs * (2 if name == "conv1" else 3)
        size //= 2 if pooled else 1
    total += 2 * 3 * params["dense"]["kernel"].size
    # Biases, activations, pooling, the loss and the optimizer are in the count, too.
    assert total < counted.flops_per_sample < 1.15 * total


def test_bytes_of_a_sparse_network_can_be_decoded(trained):
    """What is counted suffices: values and the cheaper of bitmap and indices."""
    family = FAMILIES["entries"]
    for share in (0.9, 0.01):
        params = compressed(family, trained, share)
        expected = 0
        for x in map(np.asarray, jax.tree.leaves(params)):
            if x.ndim == 1:
                expected += x.nbytes
                continue
            values = x[x != 0]
            bitmap = np.packbits(x.ravel() != 0)
            index = np.flatnonzero(x).astype(np.uint16)  # no kernel is larger
            expected += values.nbytes + min(bitmap.nbytes, index.nbytes)
        assert family.parameter_bytes(params) == expected
    mask = family.trainable(params)["conv2"]["kernel"]
    assert int(mask.sum()) == np.count_nonzero(params["conv2"]["kernel"])


def test_other_networks_are_refused():
    conv = {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)}
    family = compressors.channels()
    nested = {"a": conv, "block": {"conv": conv}}
    with pytest.raises(ValueError, match="block holds conv: only chains"):
        family.compress(nested, nested, 0.5)
    loose = {"a": conv, "b": {"kernel": jnp.zeros((12, 3))}}
    with pytest.raises(ValueError, match="b takes 12 inputs, no multiple of the 8"):
        family.compress(loose, loose, 0.5)
    with pytest.raises(ValueError, match="share of a version must be in"):
        family.compress(nested, nested, 0.0)
    # Batch statistics and residual networks are not chains either.
    make = lambda rngs: models.MODELS["resnet18"]((32, 32, 3), 10, "group", rngs)
    shapes = jax.eval_shape(models.functional(make)[0], jax.random.key(0))[0]
    with pytest.raises(ValueError, match="only chains"):
        compressors.low_rank().compress(shapes, shapes, 0.5)


def test_switch_flops_are_counted(trained):
    family = FAMILIES["channels"]
    flops = compressors.switch_flops(family, trained, trained, 0.5)
    hidden = sum(trained[k]["kernel"].size for k in ("conv1", "conv2", "conv3"))
    assert hidden <= flops <= 4 * hidden
