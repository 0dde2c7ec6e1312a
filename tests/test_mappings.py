"""One worker function, three mappings: vmap, shard_map and pmap give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import N, info, slow, trainer, tree

import gcjax


def adaptive_qsgd(collective):
    compressor = gcjax.qsgd((3, 4, 6), 256, rounding="nearest")
    return gcjax.adapt(
        gcjax.compressed_mean(compressor, collective=collective, spacing=2.0),
        gcjax.lgreco(4, error="squared"),
        every=2,
    )


AGGREGATORS = {
    "identity": lambda: gcjax.compressed_mean(gcjax.identity()),
    "cast": lambda: gcjax.compressed_mean(gcjax.cast()),
    "top_k": lambda: gcjax.compressed_mean(gcjax.top_k(0.05)),
    "random_k": lambda: gcjax.compressed_mean(gcjax.random_k(0.05)),
    "threshold": lambda: gcjax.compressed_mean(gcjax.threshold(2.0, 0.05)),
    "qsgd": lambda: gcjax.compressed_mean(gcjax.qsgd(4, rounding="nearest")),
    "qsgd scattered": lambda: gcjax.compressed_mean(
        gcjax.qsgd(4, 256, rounding="nearest"), collective="reduce_scatter"
    ),
    "cast scattered": lambda: gcjax.compressed_mean(
        gcjax.cast(), collective="reduce_scatter"
    ),
    "cast ring": lambda: gcjax.compressed_mean(gcjax.cast(), collective="ring"),
    "qsgd ring adaptive": lambda: adaptive_qsgd("ring"),
    "qsgd scattered adaptive": lambda: adaptive_qsgd("reduce_scatter"),
    "sign": lambda: gcjax.compressed_mean(gcjax.sign()),
    "terngrad": lambda: gcjax.compressed_mean(gcjax.terngrad()),
    "natural": lambda: gcjax.compressed_mean(gcjax.natural()),
    "power_sgd": lambda: gcjax.power_sgd(2),
    "top_k nearly": lambda: gcjax.compressed_mean(gcjax.top_k(0.05, tolerance=0.1)),
    "top_k adaptive": lambda: gcjax.adapt(
        gcjax.compressed_mean(
            gcjax.top_k((0.003, 0.01, 0.03)), spacing=2.0, momentum=0.9
        ),
        gcjax.lgreco(0.01),
        every=2,
        warmup_steps=1,
    ),
    "qsgd adaptive": lambda: gcjax.adapt(
        gcjax.compressed_mean(
            gcjax.qsgd((2, 3, 4, 6), rounding="nearest"), spacing=2.0
        ),
        gcjax.lgreco(4, error="squared"),
        every=2,
    ),
    "power_sgd adaptive": lambda: gcjax.adapt(
        gcjax.power_sgd((1, 2, 4, 8), spacing=2.0), gcjax.lgreco(4), every=2
    ),
}


def grads(step: int):
    """Gradients whose layers differ in how well they compress."""
    g = tree(seed=step, workers=N)
    g["a"]["kernel"] = g["a"]["kernel"] ** 3
    g["c"]["kernel"] = g["c"]["kernel"] * jnp.geomspace(1, 1e-2, 48)
    return g


# Messages that are gathered are summed in one order under every mapping.
BIT_EQUAL = ("cast", "top_k", "threshold", "sign", "natural")


def layers(tree):
    return [x for x in jax.tree.leaves(tree) if x.size >= 1024]


# Half a minute of compilation each; others of their kind run always.
SLOW = (
    "qsgd adaptive",
    "qsgd ring adaptive",
    "qsgd scattered adaptive",
    "power_sgd adaptive",
)


@pytest.mark.parametrize(
    "name",
    [slow(name) if name in SLOW else name for name in AGGREGATORS],
)
def test_vmap_equals_shard_map(name, mesh, request):
    # Where half a unit in the last place more is another code, or bits must be equal.
    if name in BIT_EQUAL or "qsgd" in name:
        request.getfixturevalue("optimised")
    params = tree()
    runs = []
    for where in (None, mesh):
        run = trainer(AGGREGATORS[name](), params, where)
        state, trace = run.init(params), []
        for step in range(5):
            mean, state = run.update(state, grads(step))
            trace.append((mean, info(state)))
        runs.append((trace, state))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads(0)))
    close = lambda a, b, step: jax.tree.map(
        # One rounding error a step, which error feedback carries on.
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=0, atol=(step + 1) * 1e-6 * largest
        ),
        a,
        b,
    )
    for step in range(5):
        (a, info_a), (b, info_b) = runs[0][0][step], runs[1][0][step]
        close(a, b, step)
        jax.tree.map(np.testing.assert_array_equal, info_a, info_b)
        if step == 0 and name in BIT_EQUAL:
            jax.tree.map(np.testing.assert_array_equal, layers(a), layers(b))
    close(runs[0][1].worker.value.error, runs[1][1].worker.value.error, 5)
    if "adaptive" in name:
        levels = np.asarray(runs[0][0][-1][1].levels)
        assert len(set(levels.tolist())) > 1, "the case does not select anything"
