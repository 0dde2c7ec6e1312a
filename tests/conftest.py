"""Eight virtual devices, strict types, and one small data-parallel problem."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tests compile much and compute little. Where two programs must agree to the last bit,
# or rounding counts, use the fixture `optimised`; runs in processes of their own, the
# quickstart among them, are optimised as users' are.
jax.config.update("jax_disable_most_optimizations", True)

from collections.abc import Callable  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import gcjax  # noqa: E402

N = 8


def slow(*case, **options):
    """A case for -m slow only: another, which always runs, shows nearly as much."""
    return pytest.param(*case, marks=pytest.mark.slow, **options)


@pytest.fixture
def mesh():
    return jax.make_mesh((N,), ("workers",), axis_types=(AxisType.Auto,))


@pytest.fixture
def optimised():
    """Programs as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def tree(scale: float = 1.0, seed: int = 0, workers: int | None = None) -> dict:
    """A tree with three layers and two small tensors, maybe one for each worker."""
    rng = np.random.default_rng(seed)
    lead = () if workers is None else (workers,)
    shapes = {
        "a": {"kernel": (40, 33), "bias": (33,)},
        "b": {"kernel": (3, 3, 8, 16)},
        "c": {"kernel": (64, 48), "scale": ()},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=lead + s) * scale, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


class Trainer(NamedTuple):
    """A transformation, mapped over workers."""

    init: Callable
    update: Callable  # (state, grads [N, ...]) -> (updates, state)
    specs: Any


def trainer(tx: Any, params: Any, mesh: Any = None) -> Trainer:
    tx = optax.with_extra_args_support(tx)
    specs = gcjax.state_specs(jax.eval_shape(tx.init, params))
    across = dict(num_workers=N, mesh=mesh)
    init = gcjax.over_workers(tx.init, (P(),), specs, **across)

    def step(state, grads):
        return tx.update(grads, state)

    update = gcjax.over_workers(step, (specs, P("workers")), (P(), specs), **across)
    return Trainer(jax.jit(init), jax.jit(update), specs)


def info(state):
    return optax.tree.get(state, "info")
