"""The gcjax worker of bench_network.py: one process, one device, over gloo."""

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _network_worker as shared  # noqa: E402

import gcjax  # noqa: E402
from gcjax import collectives, experiment, results  # noqa: E402

AXIS = "workers"
_NAMES = experiment.AGGREGATORS | experiment.SELECTORS | {"adapt": gcjax.adapt}


def loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of the model whose parameters these are."""
    layers = list(params.items())
    for name, layer in layers:
        if name.startswith("conv"):
            x = lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=_NHWC
            )
            x = jax.nn.relu(x + layer["bias"])
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        else:
            x = x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"]
            x = x if name == layers[-1][0] else jax.nn.relu(x)
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


_NHWC = ("NHWC", "HWIO", "NHWC")


def main() -> None:
    """Joins the others and serves requests."""
    args, reply = shared.arguments(), shared.claim_stdout()
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(args.address, args.processes, args.rank)
    mesh = jax.make_mesh((args.processes,), (AXIS,), axis_types=(AxisType.Auto,))

    def place(x: Any, spec: P) -> jax.Array:
        # Unlike jax.device_put this sends nothing.
        where = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, where, lambda i: x[i])

    def per_worker(x: Any) -> jax.Array:
        where = NamedSharding(mesh, P(AXIS))
        return jax.make_array_from_process_local_data(where, x[None])

    data = jax.tree.map(per_worker, shared.batches(args.model, args.rank))
    start = shared.init(args.model)

    def build(method: str):
        exchanges = method != "none"
        tx = optax.sgd(shared.LEARNING_RATE)
        if exchanges:
            tx = optax.chain(experiment.call(method, _NAMES, "method"), tx)
        # Without an exchange every worker has parameters of its own.
        spec = P() if exchanges else P(AXIS)
        params = jax.tree.map(
            (lambda x: place(x, spec)) if exchanges else per_worker, start
        )
        specs = gcjax.state_specs(jax.eval_shape(tx.init, start), AXIS)
        init = gcjax.over_workers(tx.init, (spec,), specs, mesh=mesh)
        opt_state = jax.jit(init)(params)

        def worker_step(params, opt_state, batch):
            value, grads = jax.value_and_grad(loss)(
                gcjax.as_local(params, AXIS), *batch
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            words = collectives.no_words()
            if exchanges:
                words = optax.tree.get(opt_state, "info").words
            return optax.apply_updates(params, updates), opt_state, value, words

        compiled = jax.jit(
            gcjax.over_workers(
                worker_step,
                (spec, specs, P(AXIS)),
                (spec, specs, P(AXIS), P()),
                mesh=mesh,
            ),
            donate_argnums=(0, 1),
        )
        state, next_batch = [params, opt_state], itertools.cycle(data)

        def step():
            *state[:], value, words = jax.block_until_ready(
                compiled(*state, next(next_batch))
            )
            return value, words

        def read(result) -> tuple[float, float]:
            value, words = result
            own = float(value.addressable_data(0)[0])
            return own, results.wire_bits(words, args.processes) / 8

        return step, read

    shared.serve(reply, build)


if __name__ == "__main__":
    main()
