"""Workers: the mappings over them, and which part of a state belongs to each.

One worker's function runs under `jax.vmap` (simulated workers on one device),
`jax.shard_map` (one worker on each device) and a user's `jax.pmap`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gcjax.base import AggregatorState


def checked(axis_name: str) -> bool:
    """Whether JAX tracks here what varies over workers (`shard_map`'s default).

    It does not under `vmap`, `pmap` and `check_vma=False`.
    """
    return axis_name in jax.typeof(lax.axis_index(axis_name)).manual_axis_type.varying


def as_local(tree: Any, axis_name: str = "workers") -> Any:
    """Marks replicated parameters so that their gradients stay local.

    Under `shard_map`, `jax.grad` with respect to replicated parameters sums over the
    workers by itself, which leaves nothing to compress; differentiate with respect to
    the result of this function instead. Elsewhere it changes nothing.
    """

    def mark(x: jax.Array) -> jax.Array:
        if axis_name in jax.typeof(x).manual_axis_type.varying:
            return x
        return lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(mark, tree) if checked(axis_name) else tree


def state_specs(
    opt_state: Any, axis_name: str = "workers", shard_axis: str | None = None
) -> Any:
    """Partition specs of an optimizer state: what belongs to each worker, what to all.

    Args:
      opt_state: Any tree that contains aggregator states, through any optax wrapper;
        arrays or `jax.ShapeDtypeStruct`s.
      axis_name: Name of the workers' axis.
      shard_axis: The aggregator's `shard_axis`.

    Returns:
      The same tree with `PartitionSpec(axis_name)` at per-worker leaves and
      `PartitionSpec()` at all others. With a `shard_axis` per-worker leaves belong to
      each device, `PartitionSpec((axis_name, shard_axis))`; factors of PowerSGD and
      the arrays of other transformations to each shard, `PartitionSpec(shard_axis)`.
    """
    device = P(axis_name) if shard_axis is None else P((axis_name, shard_axis))
    shard = P() if shard_axis is None else P(shard_axis)
    fill = lambda spec, tree: jax.tree.map(lambda _: spec, tree)

    def specs(x: Any) -> Any:
        if not isinstance(x, AggregatorState):
            return shard if x.ndim else P()
        shared = fill(P(), x._replace(worker=(), exchange=()))
        return shared._replace(
            worker=fill(device, x.worker), exchange=fill(shard, x.exchange)
        )

    is_state = lambda x: isinstance(x, AggregatorState)
    return jax.tree.map(specs, opt_state, is_leaf=is_state)


def over_workers(
    fn: Callable,
    in_specs: tuple,
    out_specs: Any,
    *,
    axis_name: str = "workers",
    num_workers: int | None = None,
    mesh: Mesh | None = None,
    check_vma: bool = True,
) -> Callable:
    """Maps one worker's function over all workers, simulated or on devices.

    Args:
      fn: Function of one worker, which may use collectives over `axis_name`.
      in_specs: For each argument a spec or a tree of them: `P(axis_name)` for arrays
        `[N, ...]` with one slice for each worker, `P()` for what all share.
      out_specs: The same for the result.
      axis_name: Name of the workers' axis.
      num_workers: N simulated workers, by `jax.vmap`; with `mesh` None.
      mesh: Device mesh with the axis, one worker on each device, by `jax.shard_map`.
      check_vma: Of `jax.shard_map`; `gcjax.parameter_server` wants False.

    Returns:
      A function of global arrays, the same ones under both mappings.
    """

    def is_spec(s: Any) -> bool:
        return isinstance(s, P)

    if mesh is None:
        axes = lambda specs: jax.tree.map(
            lambda s: 0 if axis_name in s else None, specs, is_leaf=is_spec
        )
        return jax.vmap(
            fn,
            in_axes=axes(in_specs),
            out_axes=axes(out_specs),
            axis_name=axis_name,
            axis_size=num_workers,
        )

    def each(specs: Any, tree: Any, edit: Callable) -> Any:
        full = jax.tree.broadcast(specs, tree, is_leaf=is_spec)
        return jax.tree.map(
            lambda s, x: edit(x) if axis_name in s else x, full, tree, is_leaf=is_spec
        )

    def local(*args: Any) -> Any:
        args = each(in_specs, args, lambda x: x[0])
        return each(out_specs, fn(*args), lambda x: x[None])

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=check_vma,
    )
