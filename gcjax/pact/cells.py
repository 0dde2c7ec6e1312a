"""Label correcting on cells of (version, cluster, progress, time), compiled.

Partial plans, *labels*, are appended to one log. Labels of an epoch lie together, epoch
after epoch, so the log is also the queue: it is worked off in blocks, and what a block
leads to is appended. A label's parent is a place in the log, which never changes, and
so the way back from any label is true whatever happens to its cell later. Each cell
knows the best label that it has seen; a label that has lost its cell when its turn
comes is not expanded. Work is thus in proportion to the labels that were the best of
their cell at some time, and not to the cells.

Two modes share this loop:

*bucket*: labels keep their exact energy, time and progress. Rounding only decides who
competes with whom.

*snap*: labels are moved to the worse end of their cell, loss and time rounded up, which
makes the log the time-expanded graph over rounded states. With the roles of energy and
time exchanged the same is the scaling of costs; see `scaled.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax.pact.graph import KNOTS, MIDDLE, SLACK, TICKS, Bounds, Graph, start_ticks

FINEST = 8192  # bins of progress, or of loss
_BLOCK = 256  # labels taken from the queue at a time
_PAIRS = 64  # of (label, next version), expanded at a time
_MOST_SLOT_BITS = 24  # of the table of cells


class Arrays(NamedTuple):
    """A graph for the compiled solver: M versions, C clusters, P actions, W weights.

    `cost` is what cells minimise (energy, in units of the bounds), `used` what they
    are told apart by (time, in ticks of the deadline).
    """

    cost: jax.Array  # float32[M, C, P], inf where impossible
    used: jax.Array  # int32[M, C, P]
    step: jax.Array  # int32[M, C, P], ticks of progress
    destination: jax.Array  # int32[M, C, P]
    switch_cost: jax.Array  # float32[M, M, C]
    switch_used: jax.Array  # int32[M, M, C]
    switch: jax.Array  # int32[M, M, KNOTS + 1], ticks of progress after a switch
    goal: jax.Array  # bool[M], whether the end of the range is the target
    edges: jax.Array  # int32[M, FINEST + 1], ascending ticks of bins; for `snap`
    weights: jax.Array  # float32[W, 3], of cost, share of the budget used, epochs
    fixed: jax.Array  # float32[W], limits of completion bounds less the cost's part
    value: jax.Array  # float32[M, C, J + 1, W]
    stay: jax.Array  # float32[M, C, J + 1, W]
    start: jax.Array  # int32[3]: version, cluster, ticks of progress
    upper: jax.Array  # float32, cost of a known plan, or inf
    max_epochs: jax.Array  # int32
    guide: jax.Array  # int32, the weight that ranks labels of a cell
    bins: (
        jax.Array
    )  # int32[3], of progress, time and epochs; powers of two but the last


class Log(NamedTuple):
    """N labels; the first `count` are there."""

    cost: jax.Array  # float32[N]
    used: jax.Array  # int32[N], ticks
    progress: jax.Array  # int32[N], ticks
    place: jax.Array  # int32[N], version * C + cluster
    epoch: jax.Array  # int32[N]
    parent: jax.Array  # int32[N]
    choice: jax.Array  # int32[N], version * P + action, at the parent's cluster
    count: jax.Array  # int32
    best: jax.Array  # int32, the cheapest label at the target; -1 for none
    full: jax.Array  # bool, whether labels were dropped for lack of room


def arrays(
    graph: Graph,
    bound: Bounds,
    upper_j: float,
    bins: tuple[int, int, int],
    snap: bool = False,
) -> Arrays:
    """Arrays for `solve`, energies as costs and times as what is used."""
    problem, tables = graph.problem, graph.tables
    tick = (graph.high - graph.low)[:, None, None] / TICKS
    step = np.floor(np.minimum(graph.progress / tick, TICKS))
    # Uniform in loss, as they were first described, and not in progress.
    losses = np.linspace(problem.top_loss, problem.max_loss, bins[0] + 1 if snap else 2)
    # As many for all resolutions, so that one program serves them; none is beyond.
    room = FINEST + 1 if snap else 2
    edges = np.full((len(problem.versions), room), np.iinfo(np.int32).max, np.int32)
    for m in np.flatnonzero(graph.reachable):
        at = graph.ticks(m, problem.versions[m].curve.progress(losses))
        edges[m, : len(losses)] = at
    weights = np.asarray(bound.weights, np.float64)
    fixed = weights @ [0.0, 1.0, problem.max_epochs]
    allowed = graph.allowed()[..., None]
    unit = bound.energy_unit_j
    return Arrays(
        np.float32(graph.energy_j / unit),
        ticks(graph.seconds / problem.deadline_s),
        step.astype(np.int32),
        graph.destination,
        np.float32(np.where(allowed, tables.switch_j / unit, np.inf)),
        ticks(tables.switch_s / problem.deadline_s),
        graph.switch_ticks(KNOTS, up=False).astype(np.int32),
        graph.goal,
        edges,
        bound.weights,
        np.float32(fixed * (1 + SLACK)),
        bound.value,
        bound.stay,
        np.array([*tables.start, start_ticks(graph)], np.int32),
        np.float32(upper_j / unit),
        np.int32(problem.max_epochs),
        np.int32(MIDDLE),
        np.array(bins, np.int32),
    )


def ticks(share: np.ndarray) -> np.ndarray:
    """Shares of a budget in ticks, rounded up; above it one tick too many."""
    # A sum that meets the deadline exactly must not miss it by its last digit.
    ticks = np.ceil(np.minimum(share, 2.0) * (1 - 1e-12) * TICKS)
    return np.minimum(ticks, TICKS + 1).astype(np.int32)


@partial(
    jax.jit,
    static_argnames=("capacity", "snap", "guided", "improve", "axis_name"),
)
def solve(
    a: Arrays,
    capacity: int,
    *,
    snap: bool = False,
    guided: bool = True,
    improve: bool = True,
    axis_name: str | None = None,
) -> Log:
    """Works off the queue.

    Args:
      a: What is searched.
      capacity: Labels that the log has room for.
      snap: Round labels to the worse end of their cells.
      guided: A cell's best label is the one from which the whole plan is bounded to
        cost least, by the middle weight of the bounds, and not the cheapest so far.
      improve: Lower `upper` to the best plan on the way, which drops dearer labels.
      axis_name: Of `jax.vmap` over several problems, if any.
    """
    search = _Search(a, capacity, snap, guided, improve, axis_name)
    return search.run()


class _Search:
    """The loop of `solve`; a class only so that its parts share what is fixed."""

    def __init__(self, a, capacity, snap, guided, improve, axis_name):
        self.a, self.capacity = a, capacity
        self.snap, self.guided, self.improve = snap, guided, improve
        self.axis_name = axis_name
        self.size, self.clusters, self.actions = a.cost.shape
        # Labels that share a slot by chance compete, so slots are many more.
        self.slot_bits = min((64 * capacity - 1).bit_length(), _MOST_SLOT_BITS)
        self.cells = 1 << self.slot_bits
        # Ticks are a power of two, and so are bins.
        self.unit = TICKS // a.bins[:2]
        self.bound_shift = (TICKS // (a.value.shape[2] - 1)).bit_length() - 1
        self.per_turn = _PAIRS * self.actions

    def run(self) -> Log:
        a = self.a
        # The last turn that has room may exceed `capacity`; later ones, whose labels
        # are dropped, still write where nothing is.
        room = self.capacity + 2 * self.per_turn
        zeros = partial(jnp.zeros, (room,), jnp.int32)
        place = a.start[0] * self.clusters + a.start[1]
        log = Log(
            jnp.zeros((room,), jnp.float32),
            zeros(),
            zeros().at[0].set(a.start[2]),
            zeros().at[0].set(place),
            zeros(),
            zeros().at[0].set(-1),
            zeros().at[0].set(-1),
            jnp.int32(1),
            jnp.int32(-1),
            jnp.bool_(False),
        )
        key = jnp.full((self.cells,), jnp.inf, jnp.float32)
        owner = jnp.full((self.cells,), -1, jnp.int32)
        first = self._cell(place, a.start[2], jnp.int32(0), jnp.int32(0))
        owner = owner.at[first].set(0)
        state = jnp.int32(0), log, key, owner, a.upper, jnp.bool_(True)
        return lax.while_loop(lambda s: s[5], self._block, state)[1]

    def _everywhere(self, count):
        """The same number of turns for all problems of a batch: no branch differs."""
        return lax.pmax(count, self.axis_name) if self.axis_name else count

    def _cell(self, place, progress, used, epoch):
        if self.snap:
            i = self._edge(place // self.clusters, progress)
        else:
            i = progress // self.unit[0]
        h = used // self.unit[1]
        k = epoch * self.a.bins[2] // (self.a.max_epochs + 1)
        # Cells lie in a table by their hash; two that share a slot compete.
        mixed = place.astype(jnp.uint32)
        for part in (i, h, k):
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
            mixed = mixed ^ part.astype(jnp.uint32)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0x297A2D39)
        return (mixed >> (32 - self.slot_bits)).astype(jnp.int32)

    def _edge(self, m, progress):
        """Number of the last edge at or below `progress`, by bisection."""
        size = self.a.edges.shape[1]
        low = jnp.zeros_like(progress)
        high = jnp.full_like(progress, size)
        for _ in range(size.bit_length()):
            middle = (low + high) // 2
            below = self.a.edges[m, jnp.minimum(middle, size - 1)] <= progress
            below &= middle < size
            low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
        return low

    def _total(self, table, at, cost, used, epoch):
        """Bounds on the whole plan, [..., W]."""
        w = self.a.weights
        share = used.astype(jnp.float32) / TICKS
        # Later than the place in the table is better than it: rounded up.
        n, c, progress = at
        j = (progress + ((1 << self.bound_shift) - 1)) >> self.bound_shift
        return (
            table[n, c, j]
            + cost[..., None] * w[:, 0]
            + share[..., None] * w[:, 1]
            + epoch.astype(jnp.float32)[..., None] * w[:, 2]
        )

    def _within(self, total, upper):
        w = self.a.weights[:, 0]
        part = jnp.where(w > 0, w * upper, 0) * (1 + SLACK)
        return jnp.all(total <= self.a.fixed + part, axis=-1)

    def _block(self, state):
        """Takes a block of labels off the queue."""
        at, log, key, owner, upper, _ = state
        a, size, end = self.a, self.size, jnp.minimum(at + _BLOCK, log.count)
        i = at + jnp.arange(_BLOCK, dtype=jnp.int32)
        cost, used, x = log.cost[i], log.used[i], log.progress[i]
        place, epoch = log.place[i], log.epoch[i]
        live = (i < log.count) & (owner[self._cell(place, x, used, epoch)] == i)
        m, c = place // self.clusters, place % self.clusters
        live &= (epoch < a.max_epochs) & ~(a.goal[m] & (x >= TICKS))

        # All versions that may come next, [block, M].
        n = jnp.arange(size, dtype=jnp.int32)
        cost = cost[:, None] + a.switch_cost[m, :, c]
        used = used[:, None] + a.switch_used[m, :, c]
        knot = x // (TICKS // KNOTS)
        x = jnp.where(n == m[:, None], x[:, None], a.switch[m, :, knot])
        where = (jnp.broadcast_to(n, x.shape), c[:, None], x)
        total = self._total(a.stay, where, cost, used, epoch[:, None])
        ok = live[:, None] & self._within(total, upper) & (used <= TICKS)
        pairs = cost, used, x, jnp.broadcast_to(i[:, None], x.shape)
        order, count = _compact(ok.reshape(-1))
        turns = self._everywhere((count + _PAIRS - 1) // _PAIRS)

        def turn(k, carry):
            chosen = lax.dynamic_slice(order, (k * _PAIRS,), (_PAIRS,))
            valid = k * _PAIRS + jnp.arange(_PAIRS, dtype=jnp.int32) < count
            chosen = jnp.where(valid, chosen, 0)
            taken = [p.reshape(-1)[chosen] for p in pairs]
            return self._expand(valid, chosen % size, *taken, carry)

        carry = lax.fori_loop(0, turns, turn, (log, key, owner, upper))
        more = self._everywhere((end < carry[0].count).astype(jnp.int32)) > 0
        return end, *carry, more

    def _expand(self, valid, n, cost, used, x, parent, carry):
        """Appends what follows from (label, version) pairs and is best of its cell."""
        log, key, owner, upper = carry
        a = self.a
        c, epoch = log.place[parent] % self.clusters, log.epoch[parent] + 1
        cost = cost[:, None] + a.cost[n, c]
        used = used[:, None] + a.used[n, c]
        x = jnp.minimum(x[:, None] + a.step[n, c], TICKS)
        to, n = a.destination[n, c], jnp.broadcast_to(n[:, None], x.shape)
        ok = valid[:, None] & (used <= TICKS) & (cost < jnp.inf)
        if self.snap:
            x = a.edges[n, self._edge(n, x)]
            used = -(-used // self.unit[1]) * self.unit[1]
        total = self._total(a.value, (n, to, x), cost, used, epoch[:, None])
        ok &= self._within(total, upper)
        has_room = log.count <= self.capacity
        full = log.full | (jnp.any(ok) & ~has_room)
        ok &= has_room

        place = n * self.clusters + to
        cell = self._cell(place, x, jnp.minimum(used, TICKS), epoch[:, None])
        rank = total[..., a.guide] if self.guided else cost
        ok &= rank < key[cell]
        key = key.at[jnp.where(ok, cell, self.cells)].min(rank, mode="drop")
        ok &= key[cell] == rank
        order, count = _compact(ok.reshape(-1))
        number = jnp.cumsum(ok.reshape(-1).astype(jnp.int32)).reshape(ok.shape) - 1
        owner = owner.at[jnp.where(ok, cell, self.cells)].set(
            log.count + number, mode="drop"
        )
        done = ok & a.goal[n] & (x >= TICKS)
        reached = jnp.where(done, cost, jnp.inf)
        winner = jnp.argmin(reached.reshape(-1))
        least = reached.reshape(-1)[winner]
        held = jnp.where(log.best < 0, jnp.inf, log.cost[jnp.maximum(log.best, 0)])
        best = jnp.where(least < held, log.count + number.reshape(-1)[winner], log.best)
        if self.improve:
            upper = jnp.minimum(upper, least)
        p = jnp.arange(self.actions, dtype=jnp.int32)
        wide = partial(jnp.broadcast_to, shape=x.shape)
        columns = (
            cost,
            used,
            x,
            place,
            wide(epoch[:, None]),
            wide(parent[:, None]),
            n * self.actions + p,
        )
        written = [
            lax.dynamic_update_slice(old, new.reshape(-1)[order], (log.count,))
            for old, new in zip(log[:7], columns, strict=True)
        ]
        log = Log(*written, log.count + count, best, full)
        return log, key, owner, upper


def _compact(mask):
    """Places of the true ones, in order and then zeros; and how many there are."""
    number = jnp.cumsum(mask.astype(jnp.int32))
    places = jnp.arange(mask.shape[0], dtype=jnp.int32)
    to = jnp.where(mask, number - 1, mask.shape[0])
    order = jnp.zeros_like(places).at[to].set(places, mode="drop")
    return order, number[-1]


def trace(graph: Graph, log: Log, i: int) -> list[tuple[int, int]]:
    """Versions and actions that led to label i of the log."""
    choices, clusters = [], graph.energy_j.shape[1]
    parent, choice, place = (np.asarray(x) for x in (log.parent, log.choice, log.place))
    while parent[i] >= 0:
        n, p = divmod(int(choice[i]), graph.action.shape[2])
        c = int(place[parent[i]]) % clusters
        choices.append((n, int(graph.action[n, c, p])))
        i = int(parent[i])
    return choices[::-1]
