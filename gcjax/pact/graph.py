"""The time-expanded graph of a problem: coordinates, useful actions, bounds.

**Coordinates.** Within a version an epoch adds its effective samples at any loss:
in *progress* X = phi_m^-1(loss) the loss map is a shift. So a vertex holds progress and
not loss, no solver evaluates a curve in its inner loop, and a bin of progress is a bin
of loss. Progress runs from that of `top_loss` to that of `max_loss`, in `TICKS` integer
ticks; time from 0 to the deadline likewise. Progress is rounded down and time up, so
that what is feasible in ticks is feasible, and K epochs lose K / TICKS of the range.

**Actions.** One action replaces another where it costs no more energy and time, gains
no less, and leads to a place from where every following action is so much as cheap
that nothing is lost. Replaced actions are dropped; that never changes the optimum.

**Completion bounds.** V_w(version, cluster, progress) bounds from below w_E energy +
w_T time + w_K epochs that are still needed, for several weights w. With an energy U
that some plan is known to reach, a partial plan can be dropped as soon as

    w_E E + w_T t + w_K k + V_w > w_E U + w_T deadline + w_K max_epochs  for any w.

One backward pass over a grid of progress estimates them; `proof.py` makes bounds of the
estimates. The weights with w_E = 1 are multipliers of the deadline; at the start of the
plan they give a lower bound on the optimum (Lagrangian relaxation, as Handler and Zang,
"A dual algorithm for the constrained shortest path problem", Networks 10, 1980).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax.pact.problem import Problem
from gcjax.pact.tables import Tables, advance, switched, tabulate

TICKS = 1 << 28  # of the deadline, and of each version's range of progress
KNOTS = 1 << 13  # at which switches are tabulated
# Float32 sums of a few hundred terms; bounds are lowered by this share.
SLACK = 5e-5


class Graph(NamedTuple):
    """M versions, C clusters, P actions that may be worth taking, padded with inf."""

    problem: Problem
    tables: Tables
    action: np.ndarray  # int[M, C, P], index into the tables
    energy_j: np.ndarray  # float64[M, C, P]
    seconds: np.ndarray  # float64[M, C, P]
    progress: np.ndarray  # float64[M, C, P], effective samples
    destination: np.ndarray  # int32[M, C, P]
    low: np.ndarray  # float64[M], progress at top_loss
    high: np.ndarray  # float64[M], at max_loss or as far as any plan can get
    goal: np.ndarray  # bool[M], whether `high` is at max_loss
    reachable: np.ndarray  # bool[M]

    def ticks(self, m: int, progress: np.ndarray | float) -> np.ndarray:
        """Progress of version m in ticks, rounded down."""
        share = (progress - self.low[m]) / (self.high[m] - self.low[m])
        # The goal is met at the same tolerance as in a replay.
        share = np.where(share > 1 - 1e-12, 1.0, np.maximum(share, 0.0))
        return np.floor(np.minimum(share, 1.0) * TICKS).astype(np.int64)

    def losses(self, m: int, bins: int) -> np.ndarray:
        """Loss at `bins` + 1 evenly spaced points of progress, float64[bins + 1]."""
        at = np.linspace(self.low[m], self.high[m], bins + 1)
        return np.minimum(
            self.problem.versions[m].curve.loss(at), self.problem.top_loss
        )

    def allowed(self) -> np.ndarray:
        """Whether a switch exists and starts from where plans lead, bool[M, M]."""
        exists = np.isfinite(self.tables.switch_j).any(-1)
        return exists & self.reachable[:, None]

    def switch_ticks(self, bins: int, up: bool) -> np.ndarray:
        """Progress after a switch, int64[M, M, bins + 1] ticks, at points of progress.

        With `up`, rounded up and thus optimistic, else down.
        """
        size = len(self.problem.versions)
        found = np.zeros((size, size, bins + 1), np.int64)
        for m, n in zip(*np.nonzero(self.allowed()), strict=True):
            losses = self.losses(m, bins)
            if up and not self.goal[m]:
                # A model may have come stalled into a version that cannot reach the
                # target, with a loss below that version's reach.
                losses[-1] = min(losses[-1], self.problem.max_loss)
            after = switched(self.problem, m, n, losses)
            progress = self.problem.versions[n].curve.progress(after)
            found[m, n] = self.ticks(n, progress)
            if m == n:
                found[m, n] = np.arange(bins + 1) * (TICKS // bins)
            elif up:
                found[m, n] = np.minimum(found[m, n] + 1, TICKS)
        return found


def build(problem: Problem, filtered: bool = True) -> Graph:
    """The graph of a problem.

    Args:
      problem: What is planned.
      filtered: Drop actions that others can always replace.

    Raises:
      ValueError: as `tabulate` does.
    """
    tables = tabulate(problem)
    keep = tables.possible & (tables.seconds <= problem.deadline_s)
    if filtered:
        keep &= ~_replaceable(tables, keep)
    most = max(int(keep.sum(-1).max()), 1)
    most = -(-most // 8) * 8  # few distinct shapes: compiled programs are reused
    action = np.argsort(~keep, axis=-1, kind="stable")[..., :most]
    if action.shape[-1] < most:
        action = np.pad(action, ((0, 0), (0, 0), (0, most - action.shape[-1])))
    count = keep.sum(-1)[..., None]
    valid = np.arange(most) < count
    take = partial(np.take_along_axis, indices=action, axis=-1)
    low, high, goal, reachable = _ranges(problem, tables)
    return Graph(
        problem,
        tables,
        action,
        np.where(valid, take(tables.energy_j), np.inf),
        np.where(valid, take(tables.seconds), np.inf),
        np.where(valid, take(tables.progress), 0.0),
        tables.destination[action].astype(np.int32),
        low,
        high,
        goal,
        reachable,
    )


def _replaceable(tables: Tables, keep: np.ndarray) -> np.ndarray:
    """Actions that another one can stand in for in every plan, bool[M, C, A]."""
    size, clusters, actions = keep.shape
    found = np.zeros_like(keep)
    energy = np.where(keep, tables.energy_j, np.inf)
    for m in range(size):
        more_j, more_s = worse_places(tables, m)
        to = tables.destination
        more_j, more_s = more_j[to[:, None], to], more_s[to[:, None], to]
        for c in range(clusters):
            e, s, x = energy[m, c], tables.seconds[m, c], tables.progress[m, c]
            with np.errstate(invalid="ignore"):  # inf - inf, among impossible ones
                # [a, b]: b instead of a, and whatever follows from b's place.
                ok = (e + more_j <= e[:, None]) & (s + more_s <= s[:, None])
            ok &= (x >= x[:, None]) & keep[m, c] & keep[m, c][:, None]
            first = np.arange(actions)[:, None] > np.arange(actions)
            found[m, c] = (ok & (~ok.T | first)).any(1)
    return found


def worse_places(tables: Tables, m: int) -> tuple[np.ndarray, np.ndarray]:
    """How much more the next epoch may cost from place b than from a, [a, b] each.

    In joules and seconds, at least 0; inf where b lacks an action or gains less.
    """
    clusters = tables.energy_j.shape[1]
    after = np.flatnonzero(np.isfinite(tables.switch_j[m]).any(-1))
    joules = tables.energy_j[after] + tables.switch_j[m, after][:, :, None]
    seconds = tables.seconds[after] + tables.switch_s[m, after][:, :, None]
    gained = tables.progress[after]
    possible = tables.possible[after]
    more_j, more_s = np.zeros((2, clusters, clusters))
    for a in range(clusters):
        there = possible[:, a, None]  # [versions, 1, A]
        lacks = (there & (~possible | (gained < gained[:, a, None]))).any((0, 2))
        lacks[a] = False
        for more, cost in ((more_j, joules), (more_s, seconds)):
            with np.errstate(invalid="ignore"):  # inf - inf, among impossible ones
                worse = np.where(there, cost - cost[:, a, None], 0).max((0, 2))
            more[a] = np.where(lacks, np.inf, np.maximum(worse, 0))
    return more_j, more_s


def _ranges(problem: Problem, tables: Tables):
    """Range of progress of each version: low, high, goal, reachable, [M] each."""
    curves = [v.curve for v in problem.versions]
    size = len(curves)
    low = np.array([float(c.progress(problem.top_loss)) for c in curves])
    high, entry = low.copy(), np.full(size, -np.inf)
    # Near the floor progress is endless; what lies beyond is rounded up to here.
    last = [float(c.progress(c.floor + 1e-6 * problem.top_loss)) for c in curves]
    entry[tables.start[0]] = float(curves[tables.start[0]].progress(problem.start_loss))
    at_goal = np.array([float(c.progress(problem.max_loss)) for c in curves])
    gain = np.where(tables.possible, tables.progress, 0).max((1, 2))
    exists = np.isfinite(tables.switch_j).any(-1)
    for m in range(size):  # switches lead to later versions only
        if np.isinf(entry[m]) and entry[m] < 0:
            continue
        entry[m] = min(entry[m], last[m])
        far = max(entry[m] + problem.max_epochs * gain[m], low[m] + gain[m])
        high[m] = min(at_goal[m], far)
        lowest = max(float(curves[m].loss(high[m])), problem.max_loss)
        for n in np.flatnonzero(exists[m]):
            if n > m:
                after = switched(problem, m, n, lowest)
                entry[n] = max(entry[n], float(curves[n].progress(after)))
    reachable = entry > -np.inf
    # Ranges need some length, also where max_loss is met from the start.
    high = np.where(high > low, high, low + np.maximum(gain, 1.0))
    return low, high, high >= at_goal, reachable


class Bounds(NamedTuple):
    """What is still needed at least, for W weights, at J + 1 points of progress.

    Energy is in units of `energy_unit_j`, time of the deadline.
    """

    weights: np.ndarray  # float32[W, 3], of energy, time and epochs
    value: jax.Array  # float32[M, C, J + 1, W], any version may come next
    stay: jax.Array  # float32[M, C, J + 1, W], the next epoch trains version M
    energy_unit_j: float
    root_j: float  # energy of a whole plan
    proof: str  # why no plan exists; "" if that is not known


MIDDLE = 7  # the weight whose bound on whole plans is the highest


def estimate(graph: Graph, bins: int = 1024, capped: bool = True) -> Bounds:
    """Completion bounds that are nearly right, but not proved; see `_backward`.

    Args:
      graph: What is searched.
      bins: Points of progress, a power of two.
      capped: Heed `max_epochs`; otherwise it has no multiplier.
    """
    # Multipliers of deadline and epochs: from those that make a typical epoch's time,
    # or the epoch itself, as dear as its energy, uphill to the highest bound.
    centre = np.array([1 / units(graph)[1], 0.1 if capped else 0.0])
    for size, factor in [*_SEARCH, (bins, 2.0)]:
        found, centre = _pass(graph, size, centre, factor)
    return found


# Points of progress and factor of each step uphill.
_SEARCH = [(256, f) for f in (30, 10, 10, 5, 3, 2, 2, 1.5, 1.3, 1.15, 1.05, 1.05)]
_AROUND = np.stack(np.meshgrid([-1.0, 0, 1], [-1.0, 0, 1]), -1).reshape(9, 2)


def units(graph: Graph) -> tuple[float, float]:
    """A typical epoch's energy in joules, and its time as a share of the deadline."""
    possible = np.isfinite(graph.energy_j)
    if not possible.any():
        return 1.0, 1.0
    energy = float(np.median(graph.energy_j[possible]))
    time = float(np.median(graph.seconds[possible])) / graph.problem.deadline_s
    return max(energy, 1e-30), max(time, 1e-9)


def _pass(graph: Graph, bins: int, centre: np.ndarray, factor: float):
    """Bounds for nine pairs of multipliers around one; and the best pair."""
    unit_j, _ = units(graph)
    around = centre * factor**_AROUND
    weights = np.zeros((12, 3), np.float32)
    weights[:3] = np.eye(3)
    weights[3:, 0], weights[3:, 1:] = 1, around
    value, stay = _backward(weights, bins, graph.goal, *_scaled(graph, unit_j, bins))
    at = int(-(-start_ticks(graph) * bins // TICKS))
    root = np.asarray(value[(*graph.tables.start, at)], float)
    lower = root[3:] - around @ [1, graph.problem.max_epochs]
    root_j = max(0.0, root[0], lower.max()) * unit_j
    proof = "no sequence of epochs leads to the target" if np.isinf(root[1]) else ""
    found = Bounds(weights, value, stay, unit_j, root_j, proof)
    return found, around[np.argmax(lower)]


def start_ticks(graph: Graph) -> int:
    """Progress in ticks at the start."""
    m = graph.tables.start[0]
    curve = graph.problem.versions[m].curve
    return int(graph.ticks(m, float(curve.progress(graph.problem.start_loss))))


def _scaled(graph: Graph, unit_j: float, bins: int) -> tuple:
    """Costs in units, steps and switches on a grid of progress."""
    problem, tables = graph.problem, graph.tables
    tick = (graph.high - graph.low)[:, None, None] / bins
    steps = graph.progress / tick * (1 - 1e-12)
    # Epochs that lead to between two points are repeated until they lead to the next.
    repeat = 1 / np.clip(steps, 1e-6, 1)
    steps = np.clip(steps, 1, bins)
    whole = np.floor(steps)
    switch = graph.switch_ticks(bins, up=True)
    switch = (switch - TICKS // bins // 2 + TICKS // bins - 1) * bins // TICKS
    size = len(problem.versions)
    switch[np.arange(size), np.arange(size)] = np.arange(bins + 1)
    to_f32 = partial(np.asarray, dtype=np.float32)
    costs = [graph.energy_j / unit_j, graph.seconds / problem.deadline_s]
    changes = [tables.switch_j / unit_j, tables.switch_s / problem.deadline_s]
    changes = np.where(graph.allowed()[..., None], changes, np.inf)
    return (
        to_f32(np.stack(costs)),
        whole.astype(np.int32),
        to_f32(steps - whole),
        to_f32(repeat),
        graph.destination,
        to_f32(changes),
        switch.astype(np.int32),
    )


@partial(jax.jit, static_argnames="bins")
def _backward(
    weights, bins, goal, costs, whole, part, repeat, destination, switch_costs, switch
):
    """Values [M, C, bins + 1, W] of `Bounds`, from the smallest version upwards.

    An epoch leads `whole + part` points further. The value between two points is
    interpolated, which is unbiased; rounding up would favour the epochs that gain the
    most by it.
    """
    size, clusters, _ = whole.shape
    epochs = weights[:, 2]

    def weighted(pair):  # [2, ...] -> [..., W]; inf stays inf at a weight of 0
        total = pair[0][..., None] * jnp.maximum(weights[:, 0], 1e-30)
        return total + pair[1][..., None] * jnp.maximum(weights[:, 1], 1e-30)

    def version(back, done):
        value, stay = done
        m = size - 1 - back
        cost = (weighted(costs[:, m]) + epochs) * repeat[m][..., None]
        # After a switch to a later version, [M, C, bins + 1, W].
        later = jnp.take_along_axis(stay, switch[m][:, None, :, None], axis=2)
        later = later + weighted(switch_costs[:, m])[:, :, None]
        others = (jnp.arange(size) > m)[:, None, None, None]
        switched = jnp.min(jnp.where(others, later, jnp.inf), axis=0)
        last = jnp.where(goal[m], 0.0, jnp.min(switched[:, bins], axis=0))
        own = jnp.full((bins + 1, clusters, weights.shape[0]), jnp.inf)
        own = own.at[bins].set(jnp.broadcast_to(last, own.shape[1:]))
        more, share = part[m][..., None], 1 / repeat[m][..., None]

        def point(i, tables):
            own, staying = tables
            j = bins - i
            near = own[jnp.minimum(j + whole[m], bins), destination[m]]
            far = own[jnp.minimum(j + whole[m] + 1, bins), destination[m]]
            following = near + jnp.where(more > 0, more * (far - near), 0)
            total = jnp.where(jnp.isnan(following), jnp.inf, following) + cost
            best = jnp.min(total, 1)
            # One short epoch elsewhere, and then whatever is best there.
            there = jnp.minimum(best, switched[:, j])[destination[m]]
            total = share * (cost + near) + (1 - share) * there
            best = jnp.minimum(best, jnp.min(jnp.where(share < 1, total, jnp.inf), 1))
            staying = staying.at[j].set(best)
            value = jnp.where(i == 0, own[bins], jnp.minimum(best, switched[:, j]))
            return own.at[j].set(value), staying

        own, staying = lax.fori_loop(0, bins + 1, point, (own, own))
        own, staying = own.swapaxes(0, 1), staying.swapaxes(0, 1)
        return value.at[m].set(own), stay.at[m].set(staying)

    shape = size, clusters, bins + 1, weights.shape[0]
    empty = jnp.full(shape, jnp.inf, jnp.float32)
    return lax.fori_loop(0, size, version, (empty, empty))


def rollouts(graph: Graph, bound: Bounds) -> list[list[tuple[int, int]]]:
    """Plans that follow the bounds greedily, one per weight.

    Returns:
      Lists of (version, action); whether they are feasible is for a replay to tell.
    """
    value = np.asarray(bound.value)
    plans = [_follow(graph, bound, value, w) for w in range(len(bound.weights))]
    return [plan for plan in plans if plan]


def _follow(graph: Graph, bound: Bounds, value: np.ndarray, w: int):
    """Takes the action with the least bound on the whole plan, epoch by epoch."""
    problem, tables = graph.problem, graph.tables
    bins = value.shape[2] - 1
    weight_j = bound.weights[w, 0] / bound.energy_unit_j
    weight_s = bound.weights[w, 1] / problem.deadline_s
    weight_k = bound.weights[w, 2]
    (m, c), loss, plan = tables.start, problem.start_loss, []
    while loss > problem.max_loss and len(plan) < problem.max_epochs:
        best = (np.inf,)
        for n in np.flatnonzero(np.isfinite(tables.switch_j[m, :, c])):
            after = switched(problem, m, n, loss)
            start = float(problem.versions[n].curve.progress(after))
            at = -(-graph.ticks(n, start + graph.progress[n, c]) * bins // TICKS)
            spent_j = tables.switch_j[m, n, c] + graph.energy_j[n, c]
            spent_s = tables.switch_s[m, n, c] + graph.seconds[n, c]
            valid = np.isfinite(spent_j)
            total = np.full(len(valid), np.inf)
            total[valid] = (
                weight_j * spent_j[valid] + weight_s * spent_s[valid] + weight_k
            )
            total += value[n, graph.destination[n, c], at, w]
            p = int(np.argmin(total))
            if total[p] < best[0]:
                best = total[p], int(n), p
        if not np.isfinite(best[0]):
            return None
        _, n, p = best
        loss = float(advance(problem, m, n, loss, graph.progress[n, c, p]))
        plan.append((n, int(graph.action[n, c, p])))
        m, c = n, int(graph.destination[n, c, p])
    return plan if loss <= problem.max_loss else None
