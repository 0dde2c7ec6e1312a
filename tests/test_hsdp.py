"""Sharded parameters: compression along the replicas' axis of a two-axis mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import info
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gcjax

REPLICAS, SHARDS = 4, 2
SIZES = {"w": (64, 64), "v": (128, 40), "b": (16,)}  # of a whole tensor
AGGREGATORS = {
    "identity": lambda **o: gcjax.compressed_mean(gcjax.identity(), **o),
    "top_k": lambda **o: gcjax.compressed_mean(gcjax.top_k(0.05), **o),
    "qsgd scattered": lambda **o: gcjax.compressed_mean(
        gcjax.qsgd(4, 256, rounding="nearest"), collective="reduce_scatter", **o
    ),
    "power_sgd": lambda **o: gcjax.power_sgd(2, **o),
    "top_k adaptive": lambda **o: gcjax.adapt(
        gcjax.compressed_mean(gcjax.top_k((0.01, 0.05, 0.1)), spacing=2.0, **o),
        gcjax.lgreco(0.05),
        every=2,
    ),
}
FIXED = [name for name in AGGREGATORS if "adaptive" not in name]


def gradients(step: int) -> dict:
    """Gradients [REPLICAS, *shape] whose layers differ."""
    rng = np.random.default_rng(step)
    g = {k: rng.normal(size=(REPLICAS, *s)) for k, s in SIZES.items()}
    g["w"] = g["w"] ** 3
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)


def sharded(name: str, steps: int, poison=None):
    """Means of `steps` steps on a mesh of replicas and shards, and the last state."""
    axes = dict(axis_name="replica", shard_axis="shard")
    tx = optax.chain(AGGREGATORS[name](**axes), optax.trace(0.0))
    mesh = jax.make_mesh(
        (REPLICAS, SHARDS), ("replica", "shard"), axis_types=(AxisType.Auto,) * 2
    )
    params = {k: jnp.zeros(s) for k, s in SIZES.items()}
    local = {k: jnp.zeros((s[0] // SHARDS, *s[1:])) for k, s in SIZES.items()}
    specs = gcjax.state_specs(jax.eval_shape(tx.init, local), **axes)
    over = dict(mesh=mesh)
    init = jax.jit(jax.shard_map(tx.init, in_specs=P("shard"), out_specs=specs, **over))

    def step(state, grads):
        return tx.update(jax.tree.map(lambda g: g[0], grads), state)

    where = P("replica", "shard")
    step = jax.jit(
        jax.shard_map(
            step, in_specs=(specs, where), out_specs=(P("shard"), specs), **over
        )
    )
    state, means = init(params), []
    for i in range(steps):
        grads = gradients(i)
        if poison == i:
            grads["w"] = grads["w"].at[1, 0, 0].set(jnp.nan)  # replica 1, shard 0
        mean, state = jax.block_until_ready(step(state, grads))
        means.append(mean)
    return means, state


def one_shard(name: str, shard: int, steps: int) -> list[dict]:
    """Means of one shard, in a run of its replicas alone."""
    part = lambda x, axis: jnp.split(x, SHARDS, axis)[shard]
    tx = AGGREGATORS[name](axis_name="replica")
    params = {k: part(jnp.zeros(s), 0) for k, s in SIZES.items()}
    specs = gcjax.state_specs(jax.eval_shape(tx.init, params), "replica")
    across = dict(axis_name="replica", num_workers=REPLICAS)
    state = gcjax.over_workers(tx.init, (P(),), specs, **across)(params)
    step = lambda state, grads: tx.update(grads, state)
    step = gcjax.over_workers(step, (specs, P("replica")), (P(), specs), **across)
    step, means = jax.jit(step), []
    for i in range(steps):
        mean, state = step(state, jax.tree.map(lambda g: part(g, 1), gradients(i)))
        means.append(mean)
    return means


@pytest.mark.parametrize("name", FIXED)
def test_each_shard_is_compressed_among_its_replicas(name):
    """As if every group of replicas with the same shard were a run of its own."""
    means, _ = sharded(name, 3)
    for shard in range(SHARDS):
        for found, alone in zip(means, one_shard(name, shard, 3), strict=True):
            for k in SIZES:
                of_shard = jnp.split(found[k], SHARDS)[shard]
                np.testing.assert_allclose(of_shard, alone[k], atol=2e-5, err_msg=k)


def test_levels_are_those_of_all_shards():
    means, state = sharded("top_k adaptive", 6)
    levels = np.asarray(info(state).levels)
    assert info(state).selections == 2 and len(set(levels.tolist())) > 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(means))


def test_one_shard_that_is_not_finite_skips_the_step_for_all():
    means, state = sharded("top_k", 3, poison=1)
    assert int(info(state).skipped) == 1
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(means[1]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((means, state)))
