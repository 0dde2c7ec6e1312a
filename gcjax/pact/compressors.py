"""Smaller versions of a network, made from its parameters, and what they cost.

A `ModelCompressor` turns the parameters of a network into those of a smaller one, which
the same task runs: `gcjax.models` builds the network that the parameters describe. So
fewer FLOPs, bytes and parameters are a fact of the arrays and not an accounting rule.

It works on chains: networks of convolutions and dense layers in which every layer feeds
the next one, in the order of their names ("conv1", "conv2", "dense"), with kernels
[..., inputs, outputs] as flax has them. Other networks are refused.

References:
  Versions of one model by pruning are those of Malandrino et al., "Matching DNN
  Compression and Cooperative Training with Resources and Data Availability", INFOCOM
  2023, arXiv:2212.02304; which criterion they prune by is not in the abstract, which is
  all that was at hand.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gcjax.tasks import Task

Params = dict[str, dict[str, Any]]  # of float32 arrays, by layer


class ModelCompressor(NamedTuple):
    """A family of smaller versions of one network; pure functions.

    A version is named by its *share* in (0, 1] of the whole network; 1 is the whole
    network. Shapes depend on the share alone, values on the parameters too.
    """

    name: str
    # (params of a version, whole, share) -> params of the version of that share, which
    # must not be larger. `whole` are the whole network's arrays or their shapes.
    compress: Callable[[Params, Params, float], Params]
    # params -> bytes that are sent when the model moves, as float32.
    parameter_bytes: Callable[[Params], int]
    # params -> tree of float32 factors of the gradient: 0 where an entry was removed
    # and must stay so, 1 elsewhere.
    trainable: Callable[[Params], Params]


def channels() -> ModelCompressor:
    """Structured pruning: every hidden layer keeps a share of its channels or units.

    Kept are the outputs whose weights have the largest L1 norm; the others leave the
    layer's kernel and bias, and the inputs of the next layer's kernel. A flattened
    image has its channels last, so that one channel is an input at every position.
    Classes and image channels always stay.

    Properties: the pruned network is the network in which the removed outputs are zero.
      FLOPs and bytes of inner layers fall about with the square of the share.
    References: Li, Kadav, Durdanovic, Samet and Graf, 2016, Pruning Filters for
      Efficient ConvNets, arXiv:1608.08710, section 3.1 (filters by L1 norm); here the
      same share in each layer, and dense layers likewise.
    """

    def compress(params: Params, whole: Params, share: float) -> Params:
        _check_share(share)
        names = _chain(whole)
        made = {name: dict(layer) for name, layer in params.items()}
        for name, following in itertools.pairwise(names):
            width = max(1, round(share * whole[name]["kernel"].shape[-1]))
            kernel = params[name]["kernel"]
            now = kernel.shape[-1]
            if width > now:
                raise ValueError(
                    f"{name} has {now} outputs, fewer than the {width} of share "
                    f"{share:g}: a version can only become smaller"
                )
            if width == now:
                continue
            norm = jnp.sum(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1)))
            kept = jnp.sort(jax.lax.top_k(norm, width)[1])
            made[name] = {k: x[..., kept] for k, x in made[name].items()}
            after = made[following]["kernel"]
            by_position = after.reshape(*after.shape[:-2], -1, now, after.shape[-1])
            rest = by_position[..., kept, :]
            shape = *after.shape[:-2], -1, after.shape[-1]
            made[following]["kernel"] = rest.reshape(shape)
        return made

    return ModelCompressor("channels", compress, _dense_bytes, _everything)


def low_rank() -> ModelCompressor:
    """Low-rank factors: every kernel becomes a product of two thinner ones.

    The kernel [..., inputs, outputs], as a matrix of all but the last axis times the
    last one, keeps its largest singular values, a share of them; a convolution becomes
    one with fewer outputs and one of 1x1. A layer whose factors would not be smaller
    stays as it is.

    Properties: the product is the best approximation of its rank (Eckart and Young).
    References: Eckart and Young, 1936, The Approximation of One Matrix by Another of
      Lower Rank; Denton, Zaremba, Bruna, LeCun and Fergus, 2014, Exploiting Linear
      Structure Within Convolutional Networks, arXiv:1404.0736 (there for inference, of
      other unfoldings).
    """

    def compress(params: Params, whole: Params, share: float) -> Params:
        _check_share(share)
        made = {}
        for name in _chain(whole):
            shape = whole[name]["kernel"].shape
            rows, columns = int(np.prod(shape[:-1])), shape[-1]
            rank = max(1, round(share * min(rows, columns)))
            layer = params[name]
            if rank * (rows + columns) >= rows * columns:
                if "narrow" in layer:
                    raise ValueError(
                        f"{name} has factors, but none at share {share:g}: a version "
                        "can only become smaller"
                    )
                made[name] = dict(layer)
                continue
            made[name] = _truncated(layer, shape, rank)
        return made

    return ModelCompressor("low rank", compress, _dense_bytes, _everything)


def entries() -> ModelCompressor:
    """Unstructured pruning: every kernel keeps a share of its entries, the largest.

    Removed entries are zeros and stay so while training goes on. Multiplications by
    them are not saved: FLOPs and memory are those of the whole network, and only the
    bytes of a hand-over fall.

    Properties: bytes count what is left and where it stands: a bit for every entry, or
      an index of 2 bytes (4 beyond 65,536 entries) for each that is left, whichever is
      less; a kernel that is not sparse enough travels dense.
    References: Han, Pool, Tran and Dally, 2015, Learning both Weights and Connections
      for Efficient Neural Networks, arXiv:1506.02626 (there by a threshold).
    """

    def compress(params: Params, whole: Params, share: float) -> Params:
        _check_share(share)
        made = {name: dict(layer) for name, layer in params.items()}
        for name in _chain(whole):
            kernel = params[name]["kernel"]
            count = max(1, round(share * kernel.size))
            flat = kernel.reshape(-1)
            kept = jax.lax.top_k(jnp.abs(flat), count)[1]
            sparse = jnp.zeros_like(flat).at[kept].set(flat[kept])
            made[name]["kernel"] = sparse.reshape(kernel.shape)
        return made

    def parameter_bytes(params: Params) -> int:
        return sum(_sparse_bytes(np.asarray(x)) for x in jax.tree.leaves(params))

    def trainable(params: Params) -> Params:
        left = lambda x: (x != 0).astype(jnp.float32) if x.ndim > 1 else jnp.ones(())
        return jax.tree.map(left, params)

    return ModelCompressor("entries", compress, parameter_bytes, trainable)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"the share of a version must be in (0, 1], got {share}")


def _chain(whole: Params) -> list[str]:
    """Names of the layers in the order in which they feed each other."""
    names = sorted(whole)
    for name in names:
        if not {"kernel"} <= set(whole[name]) <= {"kernel", "bias"}:
            raise ValueError(
                f"{name} holds {', '.join(sorted(whole[name]))}: only chains of layers "
                "with a kernel and perhaps a bias can be compressed, such as "
                "small_cnn, cnn4 and lenet"
            )
    for name, following in itertools.pairwise(names):
        outputs = whole[name]["kernel"].shape[-1]
        inputs = whole[following]["kernel"].shape[-2]
        if inputs % outputs:
            raise ValueError(
                f"{following} takes {inputs} inputs, no multiple of the {outputs} "
                f"outputs of {name}: the network is no chain of layers"
            )
    return names


def _truncated(layer: dict, shape: tuple[int, ...], rank: int) -> dict:
    """Factors of a layer, which may be factors already."""
    bias = layer.get("widen", layer)
    bias = {"bias": bias["bias"]} if "bias" in bias else {}
    if "narrow" in layer:
        first, second = layer["narrow"]["kernel"], layer["widen"]["kernel"]
        if first.shape[-1] < rank:
            raise ValueError(
                f"a layer has rank {first.shape[-1]}, less than the {rank} wanted: a "
                "version can only become smaller"
            )
        matrix = _matrix(first) @ _matrix(second)
    else:
        matrix = _matrix(layer["kernel"])
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])  # both factors alike: neither learns much faster
    narrow = (u[:, :rank] * root).reshape(*shape[:-1], rank)
    widen = root[:, None] * v[:rank]
    widen = widen.reshape(*(1,) * (len(shape) - 2), rank, shape[-1])
    return {"narrow": {"kernel": narrow}, "widen": {"kernel": widen} | bias}


def _matrix(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, kernel.shape[-1])


def _dense_bytes(params: Params) -> int:
    return sum(4 * x.size for x in jax.tree.leaves(params))


def _sparse_bytes(x: np.ndarray) -> int:
    left = int(np.count_nonzero(x))
    places = min(-(-x.size // 8), left * (2 if x.size <= 1 << 16 else 4))
    return min(4 * x.size, 4 * left + places) if x.ndim > 1 else 4 * x.size


def _everything(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.ones(()), params)


# --- Costs. ---------------------------------------------------------------------------


class Costs(NamedTuple):
    """What a version costs, as `gcjax.pact.ModelVersion` has it."""

    parameters: int
    flops_per_sample: float  # of a training step: forward, backward and optimizer
    parameter_bytes: int  # sent when the model moves
    training_bytes: int  # memory of a training step at the batch size


def costs(
    compressor: ModelCompressor,
    task: Task,
    params: Params,
    batch: dict[str, Any],
    optimizer: optax.GradientTransformation,
) -> Costs:
    """Counts what training the network of these parameters costs.

    FLOPs are those that XLA counts in one training step (additions and multiplications,
    taps on the padding of a convolution not counted), divided by the samples of the
    batch. Memory is what the compiled step holds: parameters, optimizer state, batch
    and temporary arrays, with XLA's reuse of buffers on this device.

    Args:
      compressor: It says how many bytes are sent.
      task: Its loss is trained.
      params: Of the version.
      batch: Arrays [B, ...] of one step.
      optimizer: Its state is part of the memory.
    """

    def step(params, state, batch):
        loss = lambda p: task.loss(p, {}, batch, jax.random.key(0))[0]
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    memory = lowered.compile().memory_analysis()
    size = len(jax.tree.leaves(batch)[0])
    return Costs(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        flops_per_sample=lowered.cost_analysis()["flops"] / size,
        parameter_bytes=compressor.parameter_bytes(params),
        training_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def switch_flops(
    compressor: ModelCompressor, params: Params, whole: Params, share: float
) -> float:
    """FLOPs that XLA counts in one compression; a decomposition counts as none."""
    compress = lambda params: compressor.compress(params, whole, share)
    return float(jax.jit(compress).lower(params).cost_analysis().get("flops", 0.0))
