"""Checkpoints of a whole run, error feedback and selector included."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gcjax import cluster

SCHEMA = 1


class Saver:
    """Writes and reads the checkpoints of one run.

    Of several processes all take part in everything: each writes and reads its own
    workers' errors, into and from a folder that all of them see.

    Args:
      directory: Where checkpoints lie, one folder for each step; the last two are kept.
      identity: What a checkpoint must agree with to be continued, JSON. `num_workers`
        may differ: then errors are folded.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]):
        self.directory = directory.absolute()
        self.identity = {"schema": SCHEMA} | identity
        self._manager: ocp.CheckpointManager | None = None

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Opened at first use, so that runs without checkpoints leave no folder."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def save(self, step: int, state: Any, host: Any) -> None:
        """Saves a state and what the host counted (JSON) after `step` steps."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave(self.identity | {"host": host}),
            ),
        )

    def restore(self, state: Any, specs: Any) -> tuple[Any, Any] | None:
        """Reads the last checkpoint.

        Args:
          state: A state of the same structure, placed where the result shall be.
          specs: Its specs, see `gcjax.state_specs`.

        Returns:
          The state and what the host counted; None if there is no checkpoint.

        Raises:
          ValueError: if the checkpoint is of another run, naming what differs, or
            damaged.
        """
        step = self.manager.latest_step() if self.directory.exists() else None
        if step is None:
            return None
        where = f"checkpoint {self.directory / str(step)}"
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self.manager.restore(step, args=args)["meta"]
        except Exception as error:  # orbax raises many kinds for a damaged file
            raise _damaged(where, error) from None
        self._compare(meta, where)
        old_workers = meta["num_workers"]

        def target(x: jax.Array, spec: P) -> jax.ShapeDtypeStruct:
            shape, sharding = x.shape, x.sharding
            if spec and old_workers != shape[0]:
                # Every process reads all workers' values, to fold them.
                shape = (old_workers, *shape[1:])
                if isinstance(sharding, NamedSharding):
                    sharding = NamedSharding(sharding.mesh, P())
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        try:
            args = ocp.args.StandardRestore(jax.tree.map(target, state, specs))
            args = ocp.args.Composite(state=args)
            saved = self.manager.restore(step, args=args)["state"]
        except Exception as error:
            raise _damaged(where, error) from None
        new_workers = self.identity["num_workers"]
        if old_workers != new_workers:
            if jax.process_index() == 0:
                print(
                    f"{where} has {old_workers} workers, this run {new_workers}: "
                    "errors are folded, their mean is kept"
                )
            saved = jax.tree.map(
                lambda x, old, spec: (
                    cluster.place(fold(x, new_workers), old.sharding) if spec else x
                ),
                saved,
                state,
                specs,
            )
        return saved, meta["host"]

    def _compare(self, meta: dict[str, Any], where: str) -> None:
        for name, mine in self.identity.items():
            theirs = meta.get(name)
            if theirs != mine and name != "num_workers":
                raise ValueError(
                    f"{where} is of another run: its {name} is {theirs}, here it is "
                    f"{mine}; use the same config, or another workdir"
                )

    def close(self) -> None:
        """Waits for what is being written."""
        if self._manager is not None:
            self._manager.close()


def fold(x: jax.Array, num_workers: int) -> np.ndarray:
    """Redistributes per-worker values `[N, ...]` over another number of workers.

    New worker i gets the sum of those old ones whose number is i modulo the new
    number, times new / old, so that the mean over workers stays what it was, and with
    it what error feedback still owes to the parameters.
    """
    x = np.asarray(x)
    old = x.shape[0]
    out = np.zeros((num_workers, *x.shape[1:]), np.float64)
    np.add.at(out, np.arange(old) % num_workers, x.astype(np.float64))
    return (out * (num_workers / old)).astype(x.dtype)


def _damaged(where: str, error: Exception) -> ValueError:
    text = str(error).strip().splitlines()[:1]
    return ValueError(
        f"{where} is damaged or incomplete ({type(error).__name__}: "
        f"{text[0][:200] if text else ''}); delete it to resume from the one before"
    )
