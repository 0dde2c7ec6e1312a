"""The nouns of gcjax. Read this file first.

**The problem.** N workers hold one model and different data. Every step each worker
has a local gradient, and all need the mean. gcjax makes that exchange smaller and
decides, while training runs, how small it may become in every layer.

**The nouns.**

*Worker*: one of the N holders of a gradient; a position on a named axis of `jax.vmap`,
`jax.shard_map` or `jax.pmap`. The code is the same for all three.

*Layer*: one tensor of the parameter tree that is compressed. Small and 1-D tensors are
not layers; they travel together in one dense buffer.

*Layout*: where each layer lies in the flat vector in which all layers are compressed
at once.

*Level*: an index into a compressor's ladder (`levels`): densities, bits or ranks. One
level per layer, `int32[L]`. Levels are data: changing them does not recompile, because
a message is a list of units of which a level sends a prefix or a subset, in a buffer
whose length (*capacity*) comes from a static ladder through `lax.switch`.

*Compressor*: local and pure, `Compressor` below. It never communicates.

*Exchange*: one way to obtain the mean of all workers' vectors at given levels,
`Exchange` below: `exchange.py`.

*Aggregator*: the optax transformation around an exchange: local gradients in, their
mean out. It owns error feedback, the dense buffer, the skipping of non-finite steps and
the re-selection of levels: `aggregate.py`. All collectives stand in `collectives.py`.

*Selector*: tables in, levels out, `Selector` below.

*Allocation*: how much each worker may send to a parameter server, `allocation.py`.

*Error feedback*: what a worker did not send at this step it adds to its next gradient.

**The path of one gradient**, function by function, through the family with the least
code of its own:

1. `aggregate.update`, the step of every worker, calls all that follows.
2. `aggregate.split` and `Layout.flatten`: tree -> layers in one flat vector, and small
   tensors; `aggregate.join_small`: those in one vector, and whether this worker's
   gradient is finite.
3. The error is added: this is what enters the compressor.
4. `aggregate.exchanged` -> `Exchange.mean`. For most families that is `mean` in
   `exchange.compressed_mean`:
   `Compressor.encode`, in `sparsify.random_k`: threshold (`largest`), mask, x_hat;
   `Compressor.pack`, `sparsify._pack_values` with `wire.positions`;
   `collectives.switch` to a capacity, and in its branch one collective,
   `collectives.all_reduce` or `collectives.gather`, with the small tensors in it, and
   `Compressor.decode`, `sparsify._decode_values`, to the mean.
5. `update` again: `aggregate.part_small`; new error = what entered the compressor -
   what was sent; the mean goes back into the tree, and on to the optax optimizer.

What others do instead: `top_k` sends places as well (`sparsify.pack_indexed`),
quantisers send codes (`codes.fields`, `codes.planes`), and rows of them may be
dealt out to the workers (`exchange._mean_by_shares`, two collectives);
`exchange.power_sgd` has a `mean` of its own, with two collectives.

**A weighted mean by a parameter server**: `server.parameter_server`, whose `mean` asks
an `Allocation` (`allocation.py`) how many entries, or which threshold, each worker is
granted (`server._select`), sends every upload by itself (`server._receive`, with
`collectives.send`), adds up at the server and sends the sum back (`server._send_back`).
Which ratios are wise, `selectors/workers.py` says, and `splits.py` who has which data.

**The path of the levels**: `aggregate.reselect`, every so often: `Exchange.errors` ->
mean over workers -> `Selector.update` -> levels.

**Deviations from the first design.** `encode` yields all layers' units at once from a
flat vector, so that compile time does not grow with the number of layers. Messages are
packed before the switch, at the largest capacity, and cut within it: a branch then
compiles in tens of milliseconds. Lengths beyond the uniform default's do not exist
where the selector never needs them. An `Aggregator` carries, beside (init, update), the
function with which `adapt` rebuilds it around a selector: one update function exists,
and not one that wraps another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Layout(NamedTuple):
    """Where the layers lie in one flat float32 vector.

    Every layer starts at a multiple of `row` elements and is padded with zeros, so
    that the vector is `[num_rows, row]` and each row belongs to one layer.
    """

    paths: tuple[str, ...]  # tree path of each layer
    shapes: tuple[tuple[int, ...], ...]
    row: int  # elements in a row

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.shapes)

    @property
    def sizes(self) -> np.ndarray:
        """Elements in each layer, int64[L]."""
        return np.array([int(np.prod(s)) for s in self.shapes], np.int64)

    @property
    def rows(self) -> np.ndarray:
        """Rows of each layer, int64[L]."""
        return -(-self.sizes // self.row)

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return int(self.rows.sum())

    @property
    def size(self) -> int:
        """Elements of the flat vector, padding included."""
        return self.num_rows * self.row

    @property
    def first_row(self) -> np.ndarray:
        """First row of each layer, int64[L]."""
        return np.cumsum(self.rows) - self.rows

    @property
    def row_layer(self) -> np.ndarray:
        """Layer of each row, int32[num_rows]."""
        return np.repeat(np.arange(self.num_layers, dtype=np.int32), self.rows)

    @property
    def row_valid(self) -> np.ndarray:
        """Elements of each row that are not padding, int32[num_rows]."""
        end = (self.first_row * self.row + self.sizes)[self.row_layer]
        start = np.arange(self.num_rows) * self.row
        return np.clip(end - start, 0, self.row).astype(np.int32)

    def valid(self) -> jax.Array:
        """Mask of the elements that are not padding, bool[num_rows, row]."""
        return jnp.arange(self.row, dtype=jnp.int32) < self.row_valid[:, None]

    @property
    def partial_rows(self) -> np.ndarray:
        """Rows that hold padding, int[at most L]."""
        return np.flatnonzero(self.row_valid < self.row)

    def clear_padding(self, flat: jax.Array) -> jax.Array:
        """Sets the padding of a vector `[size]` to zero, touching no other row."""
        rows = self.partial_rows
        if not rows.size:
            return flat
        inside = np.arange(self.row) < self.row_valid[rows][:, None]
        matrix = flat.reshape(-1, self.row)
        cleared = jnp.where(inside, matrix[rows], 0)
        return matrix.at[rows].set(cleared, unique_indices=True).reshape(-1)

    def sum_rows(self, per_row: jax.Array) -> jax.Array:
        """Sums a value per row `[num_rows]` to one per layer `[L]`."""
        return jax.ops.segment_sum(
            per_row, self.row_layer, self.num_layers, indices_are_sorted=True
        )

    def max_rows(self, per_row: jax.Array) -> jax.Array:
        """Largest value per layer `[L]` of a value per row `[num_rows]`."""
        return jax.ops.segment_max(
            per_row, self.row_layer, self.num_layers, indices_are_sorted=True
        )

    def flatten(self, leaves: list[jax.Array]) -> jax.Array:
        """Lays the layers into one float32 vector `[size]`."""
        if not leaves:
            return jnp.zeros((0,), jnp.float32)
        parts = []
        for leaf, size, rows in zip(leaves, self.sizes, self.rows, strict=True):
            flat = leaf.reshape(-1).astype(jnp.float32)
            parts.append(jnp.pad(flat, (0, int(rows) * self.row - int(size))))
        return jnp.concatenate(parts)

    def unflatten(self, flat: jax.Array) -> list[jax.Array]:
        """Takes the float32 layers, in their shapes, out of a vector `[size]`."""
        return [
            flat[int(first) * self.row :][: int(size)].reshape(shape)
            for first, size, shape in zip(
                self.first_row, self.sizes, self.shapes, strict=True
            )
        ]


class Compressor(NamedTuple):
    """Local, pure compression of a flat vector, each layer at its own level.

    Shapes: L layers, V levels, `x` float32[layout.size] with zeros in the padding,
    `levels` int32[L].
    """

    name: str  # the factory's name, for tables
    levels: tuple[Any, ...]  # V values of the ladder, ascending: more is more bits
    row: int  # elements in a row of the layout that it wants
    # V flags: at this level E|x - C(x)|^2 < |x|^2, so error feedback stays bounded.
    contraction: tuple[bool, ...]
    # A message is float32 words whose mean over workers decodes to the mean.
    linear: bool
    words: Callable  # layout -> int64[L, V], 32-bit words of a layer's message
    errors: Callable  # (layout, x) -> float32[L, V], squared error at every level
    init: Callable  # layout -> state of one worker, e.g. the thresholds of last step
    # (layout, x, levels, keys, state) -> (units, x_hat float32[size], state), whatever
    # in the padding. A layer at level -1 is zeros; of several levels, none is sent.
    encode: Callable
    # (layout, units, levels, capacity) -> (message uint32[capacity], shared). A shorter
    # message is a prefix; `shared` is what all know without sending it, () where
    # that is nothing.
    pack: Callable
    # (layout, messages uint32[M, any], levels, shared) -> float32[size], the mean of
    # what M messages say.
    decode: Callable
    rows: "RowCodec | None" = None  # where every row can be compressed by itself


class Rows(NamedTuple):
    """Rows of the flat vector, in S messages of R rows each."""

    valid: Any  # int[S, R], elements that are not padding
    width: Any  # int[S, R], bits of each element's code
    unit: int  # elements of a row that are sent or left out together


class RowCodec(NamedTuple):
    """Compression of single rows, for exchanges that deal rows out to workers."""

    dealt: bool  # a share takes rows from everywhere, so that lengths are alike
    # V flags: what is lost when a mean is compressed again may be fed back as well.
    again: tuple[bool, ...]
    rows: Callable  # (layout, levels) -> Rows, S = 1
    words: Callable  # rows -> int[S], words of each message
    encode: Callable  # (x [R, row], rows, key) -> units
    value: Callable  # (units, rows) -> float32[R, row], what they mean
    # (units, order int[S, R], rows [S, R], words) -> uint32[S, words], the messages of
    # the units' rows in that order; one number past the last row stands for padding.
    pack: Callable
    # (messages uint32[S, words], rows [S, R], natural) -> units of all S R rows or, not
    # None, of those listed in `natural`, in that order.
    unpack: Callable


class Keys(NamedTuple):
    """Random keys of one step."""

    shared: jax.Array  # the same on all workers
    worker: jax.Array  # this worker's own


class Words(NamedTuple):
    """32-bit words that one worker contributed to collectives, by kind."""

    gathered: jax.Array  # int32, through all-gather
    reduced: jax.Array  # int32, through all-reduce
    scattered: jax.Array  # int32, through all-to-all
    permuted: jax.Array  # int32, to the next worker of a ring
    # int32[n], what each of n workers sent to a server, whose sizes differ; [] without
    uploaded: jax.Array
    downloaded: jax.Array  # int32, what the server sent to each worker

    def __add__(self, other: "Words") -> "Words":
        return Words(*(a + b for a, b in zip(self, other, strict=True)))


class Exchange(NamedTuple):
    """One way to obtain the mean of all workers' flat vectors."""

    name: str
    levels: tuple[Any, ...]
    row: int
    feedback: tuple[bool, ...]  # V flags: error feedback is on at this level
    admits: Callable  # layout -> bool[L, V], levels that may be chosen
    carrier: str  # "all-gather", or "all-reduce" and what sends as many bytes
    accepts: Callable  # shape -> bool, whether such a tensor can be a layer
    words: Callable  # layout -> int64[L, V], words of a layer's messages
    # (layout, fixed, largest) -> for each collective a ladder of static lengths: the
    # exact length for levels `fixed` int64[L]; for None, levels that change, a fine
    # ladder up to the length at levels `largest` int64[L].
    capacities: Callable
    errors: Callable  # (layout, x) -> float32[L, V]
    init: Callable  # (layout, key) -> state, the same on all workers
    init_worker: Callable  # layout -> state of each worker for itself
    # (layout, x, gradient, small, levels, (state, own state), keys, capacities) ->
    # (mean, mean of small, sent, both states, Words). `gradient` is x less the error.
    # `small` float32[any] is not compressed. A layer at level -1 is zeros.
    mean: Callable
    # Of a mean that is not plain: each worker's weight, adding up to 1.
    weights: tuple[float, ...] | None = None
    # Over devices a server has a position of its own, after the workers.
    server: bool = False


class Problem(NamedTuple):
    """What a selector decides on: L layers, V candidates for each."""

    errors: jax.Array  # float32[L, V], squared
    words: np.ndarray  # int64[L, V]
    default: jax.Array  # int32[L]
    capacities: list  # of each collective, the lengths that its message may have
    kinds: tuple[str, ...]  # V: how words travel, `Exchange.carrier` or "dense"
    sizes: np.ndarray  # int64[L], elements of each layer


class Selector(NamedTuple):
    """Chooses levels from tables; jitted, inside the training step."""

    default: Any  # the value of the ladder used until the first selection
    levels: Any  # values of the ladder to choose from; None for all
    snapshot_steps: int  # steps summed into a snapshot; 0: it needs no table
    corrected: bool  # snapshots hold gradient + error, not the gradient alone
    worker: int | None  # whose table decides; None: the mean of all workers' tables
    shrinks: bool  # its levels never need more words than the default
    dense: bool  # not to compress a layer at all is the last candidate
    init: Callable  # num_layers -> state
    # (Problem, state) -> (levels int32[L], state). A level of -1 keeps all old ones.
    update: Callable


class Aggregator(optax.GradientTransformationExtraArgs):
    """Local gradients -> mean of all workers' gradients, as an optax transformation.

    To optax it is a plain (init, update) pair. Its attributes say what it does.

    Attributes:
      exchange: The exchange in it.
      layout: params -> `Layout` of the tensors that are compressed.
      rebuild: Makes the same aggregator around a selector, for `gcjax.adapt`.
    """

    exchange: Exchange
    layout: Callable[[Any], Layout]
    rebuild: Callable[..., "Aggregator"]

    @classmethod
    def make(cls, init: Callable, update: Callable, **attributes: Any) -> "Aggregator":
        """Makes one. Fields of its own would make it a longer tuple than optax's."""
        self = cls(init, update)
        for name, value in attributes.items():
            setattr(self, name, value)
        return self


class PerWorker(NamedTuple):
    """Marks the part of a state that differs from worker to worker."""

    value: Any


class Info(NamedTuple):
    """What is worth logging of the last step; equal on all workers."""

    levels: jax.Array  # int32[L], the levels of the last step; -1 uncompressed
    words: Words  # what one worker contributed to the collectives of the last step
    dense: jax.Array  # bool, whether the last step was sent uncompressed (warm-up)
    skipped: jax.Array  # int32, steps skipped so far for a non-finite gradient
    selections: jax.Array  # int32, how often levels were selected so far


class AggregatorState(NamedTuple):
    """State of an aggregator.

    `worker` holds, per worker and float32[layout.size] each (or `()` where unused):
    the error, the velocity of momentum correction, and the snapshot for the selector;
    and what the compressor remembers.
    """

    worker: PerWorker  # of WorkerState
    step: jax.Array  # int32, steps taken
    levels: jax.Array  # int32[L], the levels now in force
    selector: Any  # the selector's state
    exchange: Any  # the exchange's state, e.g. the factors of PowerSGD
    info: Info


class WorkerState(NamedTuple):
    """The part of an aggregator's state that each worker has for itself."""

    error: Any  # what was not sent yet
    velocity: Any  # local momentum, for momentum correction
    snapshot: Any  # sum of the steps before a selection, for the error table
    compressor: Any  # what the compressor remembers, e.g. its last thresholds


def pick(table: Any, levels: Any) -> Any:
    """Each layer's entry [L] of a table [L, V]; NumPy if both are."""
    if isinstance(table, np.ndarray) and isinstance(levels, np.ndarray):
        return np.take_along_axis(table, levels[:, None], 1)[:, 0]
    levels = jnp.asarray(levels)[:, None]
    return jnp.take_along_axis(jnp.asarray(table), levels, 1)[:, 0]


def level_index(levels: tuple[Any, ...], value: Any) -> int:
    """Finds a ladder's value.

    Raises:
      ValueError: if the value is not on the ladder; names the nearest ones.
    """
    for i, level in enumerate(levels):
        if level == value or (
            isinstance(level, float) and np.isclose(level, value, rtol=1e-6, atol=0)
        ):
            return i
    raise ValueError(
        f"level {value!r} is not on the ladder {_short(levels)}; choose one of these "
        "or build the compressor with it"
    )


def _short(levels: tuple[Any, ...]) -> str:
    text = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in levels]
    return ", ".join(text if len(text) < 13 else [*text[:6], "...", *text[-5:]])


def ladder(values: Any, name: str, low: float, high: float) -> tuple[Any, ...]:
    """Checks a ladder's values, one or several, and sorts them.

    Raises:
      ValueError: if there is none, or one lies outside `low < v <= high` (floats) or
        `low <= v <= high` (ints).
    """
    values = tuple(np.atleast_1d(np.asarray(values, object)))
    if not values:
        raise ValueError(f"{name}: the ladder is empty; give at least one value")
    for v in values:
        if isinstance(low, int):
            if not isinstance(v, int) or isinstance(v, bool) or not low <= v <= high:
                raise ValueError(
                    f"{name}: must be integers in [{low}, {high}], got {v}"
                )
        elif not low < v <= high:
            raise ValueError(f"{name}: must be in ({low:g}, {high:g}], got {v}")
    return tuple(sorted(set(values)))
