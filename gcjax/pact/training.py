"""Real training on nodes that hold data of their own: an epoch of a cluster.

Nodes are simulated on one machine: the arithmetic is real, every node trains on its own
samples, gradients travel through `gcjax.parameter_server`, and what is counted is what
was done. How long that would have taken on the nodes, and with how much energy, is for
`gcjax.pact.tables` to say.

Nodes train by plain SGD, and what gradient compression did not send is forgotten at the
end of an epoch: the parameters are all that there is to hand over, so that the next
loss depends on as little of the past as it can.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from gcjax import experiment, splits, workers
from gcjax.pact.compressors import ModelCompressor, Params
from gcjax.tasks import Batch, Task

AXIS = experiment.AXIS
UNCOMPRESSED = {"method": "dense"}  # a level of gradient compression


class Done(NamedTuple):
    """An epoch that was done; one entry for each member of the cluster."""

    params: Params  # after it
    samples: tuple[int, ...]  # trained on
    up_bits: tuple[int, ...]  # sent to the coordinator, whose own is 0
    down_bits: tuple[int, ...]  # received from it
    rounds: int  # of exchange, 0 for a node alone


class Trainer(NamedTuple):
    """What nodes can do with a model, as pure functions."""

    histograms: np.ndarray  # int[N, classes], samples of each node and label
    # (params, batches) -> params, a step of SGD for each batch.
    fit: Callable[[Params, Iterable[Batch]], Params]
    # step -> batch of about batch_size samples from all nodes, by their shares.
    pooled: Callable[[int], Batch]
    # (params, members, fraction, rounds, level, seen int[N]) -> Done. `rounds` are
    # those of an epoch over all data, `level` is one of config.gradient_levels or
    # UNCOMPRESSED, `seen` the samples that each node has trained on before.
    epoch: Callable[..., Done]
    evaluate: Callable[[Params], dict[str, float]]  # held-out loss and accuracy
    optimizer: optax.GradientTransformation  # of each node


def trainer(
    config: ml_collections.ConfigDict, task: Task, compressor: ModelCompressor
) -> Trainer:
    """Makes the nodes of a config able to train.

    Args:
      config: With seed, nodes, batch_size, learning_rate and aggregator.
      task: With a split, which says what each node holds.
      compressor: It says which entries may be trained.

    Raises:
      ValueError: for a task without a split, or whose model keeps running statistics.
    """
    if task.shards is None:
        raise ValueError("config.split must say which samples each node holds")
    if jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))[1]):
        raise ValueError(
            "models with running statistics cannot be planned for: choose norm='group'"
        )
    count = len(config.nodes)
    shards = task.shards(config.seed, count)
    sizes = np.array([len(shard) for shard in shards])
    local = optax.sgd(config.learning_rate)

    @functools.lru_cache
    def batches(size: int) -> Callable[[int], Batch]:
        return task.batches(config.seed, count, size)

    def rows(node: int, size: int, step: int) -> Batch:
        return {name: x[node] for name, x in batches(size)(step).items()}

    def pooled(step: int) -> Batch:
        each = np.maximum(1, np.round(config.batch_size * sizes / sizes.sum()))
        parts = [rows(i, int(n), step) for i, n in enumerate(each)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    alone = jax.jit(functools.partial(_step, task, local), donate_argnums=0)
    fresh = jax.jit(local.init)

    def fit(params: Params, given: Iterable[Batch]) -> Params:
        state, mask = fresh(params), compressor.trainable(params)
        params = jax.tree.map(jnp.copy, params)  # the caller's are not to be reused
        for batch in given:
            params, state = alone(params, state, batch, mask)
        return params

    @functools.lru_cache
    def together(members: tuple[int, ...], *way: str) -> tuple[Callable, Callable]:
        p = sizes[list(members)] / sizes[list(members)].sum()
        return _cooperative(task, config.seed, *way, p, local)

    def epoch(params, members, fraction, rounds, level, seen) -> Done:
        if len(members) == 1:
            (node,), size = members, config.batch_size
            steps = max(1, round(fraction * sizes[node] / size))
            first = -(-int(seen[node]) // size)
            made = fit(params, (rows(node, size, first + i) for i in range(steps)))
            return Done(made, (steps * size,), (0,), (0,), 0)
        rounds = max(1, round(fraction * rounds))
        own = np.maximum(1, np.round(fraction * sizes[list(members)] / rounds))
        own = own.astype(int)
        if own.max() > config.batch_size:
            raise ValueError(
                f"{rounds} rounds leave {own.max()} samples of a member to each, more "
                f"than config.batch_size = {config.batch_size}: raise rounds_per_epoch"
            )
        way = level["method"], level.get("aggregator", config.aggregator)
        init, step = together(tuple(members), *way)
        state, mask = init(params), compressor.trainable(params)
        weight = (np.arange(own.max()) < own[:, None]) / own[:, None]
        sent = jnp.zeros(len(members), jnp.int32), jnp.int32(0)
        first = -(-seen[list(members)] // own)
        for i in range(rounds):
            parts = [
                rows(node, int(n), int(at) + i)
                for node, n, at in zip(members, own, first, strict=True)
            ]
            batch = jax.tree.map(lambda *x: _stacked(x, own.max()), *parts)
            args = batch, weight.astype(np.float32), mask
            params, state, words = step(params, state, *args)
            sent = jax.tree.map(jnp.add, sent, words)
        up, down = jax.device_get(sent)
        return Done(
            params,
            tuple((own * rounds).tolist()),
            (0, *(32 * up[1:].astype(np.int64)).tolist()),
            (0, *[32 * int(down)] * (len(members) - 1)),
            rounds,
        )

    return Trainer(
        splits.profile(shards, task.labels),
        fit,
        pooled,
        epoch,
        lambda params: task.evaluate(params, {}),
        local,
    )


def _step(task: Task, tx, params, state, batch: Batch, mask):
    """One step of a node alone."""
    loss = lambda p: task.loss(p, {}, batch, jax.random.key(0))[0]
    return _apply(tx, params, state, jax.grad(loss)(params), mask)


def _apply(tx, params, state, grads, mask):
    grads = jax.tree.map(jnp.multiply, grads, mask)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _cooperative(task: Task, seed: int, method: str, aggregator: str, p, local):
    """init and step of a cluster whose members have the weights p [n]."""
    config = ml_collections.ConfigDict({"aggregator": aggregator, "seed": seed})
    aggregate = experiment.build_aggregator(config, method, p)
    tx = optax.chain(aggregate, local)
    across = dict(axis_name=AXIS, num_workers=len(p))
    specs_of = lambda params: workers.state_specs(jax.eval_shape(tx.init, params), AXIS)

    def member(params, state, batch, weight, mask):
        # Members have batches of different sizes; shorter ones are filled up with
        # samples of weight 0.
        def loss(params):
            one = lambda x: task.loss(params, {}, x, jax.random.key(0))[0]
            each = jax.tree.map(lambda x: x[:, None], batch)
            return jnp.sum(weight * jax.vmap(one)(each))

        params, state = _apply(tx, params, state, jax.grad(loss)(params), mask)
        words = optax.tree.get(state, "info").words
        return params, state, (words.uploaded, words.downloaded)

    @jax.jit
    def init(params):
        return workers.over_workers(tx.init, (P(),), specs_of(params), **across)(params)

    @jax.jit
    def step(params, state, batch, weight, mask):
        specs, each = specs_of(params), P(AXIS)
        given, made = (P(), specs, each, each, P()), (P(), specs, P())
        mapped = workers.over_workers(member, given, made, **across)
        return mapped(params, state, batch, weight, mask)

    return init, step


def _stacked(parts: tuple[np.ndarray, ...], length: int) -> np.ndarray:
    """[n, length, ...] of arrays that are at most so long, filled up with zeros."""
    made = np.zeros((len(parts), length, *parts[0].shape[1:]), parts[0].dtype)
    for i, part in enumerate(parts):
        made[i, : len(part)] = part
    return made
