"""The exact search: Pareto labels in order of energy, thousands at a time.

A *label* is a partial plan that ends at a place, a (version, cluster), with so much
energy, time, loss and so many epochs. One that is at least as good as another in all of
these can replace it. Taken in order of energy, labels that come later can only be
better in time and loss, so that for each place a *staircase* is kept of the best losses
by time.

All labels within the least energy of an epoch of the cheapest one are independent:
nothing that follows from any of them comes before the others. They are taken off
together, and compared, expanded and bounded as arrays.

A label at one place can replace one at another place too, if it is ahead by all that
following epochs may cost more from there (`gcjax.pact.graph.worse_places`). Where
moving a model is cheap against training it, that leaves little more to look at than if
there were one place only.

References:
  Martins, "On a multicriteria shortest path problem", European Journal of Operational
  Research 16, 1984, for label setting with several criteria; labels that are taken off
  in batches are those of Dial, "Algorithm 360: shortest-path forest with topological
  ordering", Communications of the ACM 12, 1969. That places compete is ours.
"""

import heapq
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gcjax.pact.graph import MIDDLE, SLACK, TICKS, Bounds, Graph, worse_places
from gcjax.pact.schedule import TOLERANCE
from gcjax.pact.tables import switched

# Sums over the same epochs in another order differ in their last digits; labels closer
# than this count as equal, or every order of the same epochs would be kept.
_EQUAL = 1e-12
_BATCH = 4096  # labels that are taken off together, at most
_PAIRWISE = 256  # labels of a place that are compared each with each


@dataclass
class Search:
    """How a label search ended.

    Attributes:
      choices: Versions and actions of the best plan; None if there is none.
      complete: Whether the search ended by itself: then the plan is optimal, and
        where there is none, none exists.
      lower_j: No plan needs less energy.
      labels: Labels that were expanded.
    """

    choices: list[tuple[int, int]] | None
    complete: bool
    lower_j: float
    labels: int


class Labels(NamedTuple):
    """N labels, one array each."""

    energy_j: np.ndarray  # float64
    seconds: np.ndarray  # float64
    loss: np.ndarray  # float64
    epoch: np.ndarray  # int32
    place: np.ndarray  # int32, version * C + cluster
    parent: np.ndarray  # int64, number of an expanded label; -1 at the start
    choice: np.ndarray  # int32, version * A + action
    least: np.ndarray  # float64, bound on the whole plan, in units of the bounds

    def take(self, which) -> "Labels":
        """Those at an index, or where a mask is true."""
        return Labels(*(x[which] for x in self))


def _grouped(keys: np.ndarray) -> Iterator[tuple]:
    """Each of the keys, ascending, and where it stands, in order."""
    order = np.argsort(keys, kind="stable")
    values, starts = np.unique(keys[order], return_index=True)
    yield from zip(values.tolist(), np.split(order, starts)[1:], strict=True)


def _joined(parts: list[Labels]) -> Labels:
    if len(parts) == 1:
        return parts[0]
    return Labels(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def search(
    graph: Graph,
    bound: Bounds,
    upper_j: float = math.inf,
    *,
    capped: bool = True,
    energy_free: bool = False,
    limit_s: float = math.inf,
    progress: bool = False,
) -> Search:
    """Label setting in order of energy, with dominance in time, loss and epochs.

    Args:
      graph: What is searched.
      bound: Completion bounds of it, proved.
      upper_j: Energy that some plan is known to reach; looks for no dearer ones.
      capped: Heed `max_epochs`, in dominance too. Without, it is ignored.
      energy_free: Take all energies for zero and look for the least time.
      limit_s: Processor time after which to stop.
      progress: Show a progress bar.
    """
    problem, tables = graph.problem, graph.tables
    if bound.proof and (capped or "max_epochs" not in bound.proof):
        return Search(None, True, math.inf, 0)
    expansion = _Expansion(graph, bound, capped, energy_free)
    expansion.cap(upper_j)
    settled = _Settled(graph, capped, energy_free)
    queue = _Queue(expansion.apart)
    goal = problem.max_loss + TOLERANCE * problem.top_loss
    (m, c), actions = tables.start, len(tables.destination)
    if problem.start_loss <= goal:
        return Search([], True, 0.0, 0)
    floats = (np.array([x]) for x in (0.0, 0.0, problem.start_loss))
    ints = (np.array([i]) for i in (0, m * len(problem.clusters) + c, -1, -1))
    queue.add(Labels(*floats, *ints, np.zeros(1)), np.zeros(1))
    ways: list[tuple[np.ndarray, np.ndarray]] = []  # parents and choices
    expanded, best, last = 0, math.inf, None
    stop = time.process_time() + limit_s
    with tqdm(disable=not progress, unit=" labels", desc="labels") as bar:
        while queue and queue.least < best:
            batch, order = queue.pop()
            if time.process_time() > stop:
                lower = min(batch.least.min(), queue.bound())
                lower = max(lower * bound.energy_unit_j, bound.root_j)
                way = last and _trace(ways, *last, actions)
                return Search(way, False, min(lower, best), expanded)
            batch = batch.take(order < best)
            batch = batch.take(settled.new(batch))
            ways.append((batch.parent, batch.choice))
            for new, order in expansion(batch, expanded):
                met = new.loss <= goal
                if met.any():
                    i = np.flatnonzero(met)[np.argmin(order[met])]
                    if order[i] < best:
                        best, last = float(order[i]), (new.parent[i], new.choice[i])
                        if not energy_free:
                            expansion.cap(best)
                    new, order = new.take(~met), order[~met]
                queue.add(new, order)
            expanded += len(batch.loss)
            bar.update(len(batch.loss))
    if last is None:
        return Search(None, True, math.inf, expanded)
    way = _trace(ways, *last, actions)
    return Search(way, True, 0.0 if energy_free else best, expanded)


def _trace(ways, parent: int, choice: int, actions: int) -> list[tuple[int, int]]:
    """Versions and actions from the start to a label."""
    parents, choices = (np.concatenate(x) for x in zip(*ways, strict=True))
    found = []
    while choice >= 0:
        found.append(divmod(int(choice), actions))
        parent, choice = parents[parent], choices[parent]
    return found[::-1]


class _Queue:
    """Open labels, in buckets by their order."""

    def __init__(self, width: float):
        self.width = width
        self.buckets: dict[float, list[tuple[Labels, np.ndarray]]] = {}
        self.heap: list[float] = []

    def __bool__(self) -> bool:
        return bool(self.heap)

    @property
    def least(self) -> float:
        """No label comes before this in the order."""
        return self.heap[0] * (self.width or 1.0)

    def bound(self) -> float:
        """The least bound on a whole plan."""
        waiting = (labels for parts in self.buckets.values() for labels, _ in parts)
        return min((labels.least.min() for labels in waiting), default=math.inf)

    def add(self, labels: Labels, order: np.ndarray) -> None:
        """Adds labels at their places of the order."""
        keys = np.floor(order / self.width) if self.width else order
        for key, part in _grouped(keys):
            if key not in self.buckets:
                self.buckets[key] = []
                heapq.heappush(self.heap, key)
            self.buckets[key].append((labels.take(part), order[part]))

    def pop(self) -> tuple[Labels, np.ndarray]:
        """Takes off the first labels, in order; none leads to one before the last."""
        key = self.heap[0]
        parts = self.buckets[key]
        labels = _joined([p for p, _ in parts])
        order = np.concatenate([o for _, o in parts])
        by_order = np.lexsort((labels.loss, labels.seconds, order))
        labels, order = labels.take(by_order), order[by_order]
        if len(order) > _BATCH:
            rest = slice(_BATCH, None)
            self.buckets[key] = [(labels.take(rest), order[rest])]
            return labels.take(slice(_BATCH)), order[:_BATCH]
        del self.buckets[key]
        heapq.heappop(self.heap)
        return labels, order


class _Staircase:
    """Points (seconds, loss) of which none is at least as good as another in both."""

    def __init__(self, seconds: np.ndarray, loss: np.ndarray):
        self.seconds = seconds  # ascending
        self.loss = loss  # descending

    def covers(self, seconds: np.ndarray, loss: np.ndarray) -> np.ndarray:
        """Whether there is a point at least as good, elementwise."""
        if not len(self.seconds):
            return np.zeros(len(seconds), bool)
        i = np.searchsorted(self.seconds, seconds, side="right") - 1
        return (i >= 0) & (self.loss[i] <= loss)

    def add(self, seconds: np.ndarray, loss: np.ndarray) -> None:
        """Adds points, and drops what is covered."""
        seconds = np.concatenate([self.seconds, seconds])
        loss = np.concatenate([self.loss, loss])
        order = np.lexsort((loss, seconds))
        seconds, loss = seconds[order], loss[order]
        lowest = np.minimum.accumulate(loss)
        kept = np.append(True, loss[1:] < lowest[:-1])
        self.seconds, self.loss = seconds[kept], loss[kept]


class _Settled:
    """What labels so far cover, place by place."""

    def __init__(self, graph: Graph, capped: bool, energy_free: bool):
        problem, tables = graph.problem, graph.tables
        self.clusters, self.capped = len(problem.clusters), capped
        self.equal = _EQUAL * np.array([problem.deadline_s, problem.top_loss])
        # Of each place the staircases of labels of at most so many epochs.
        self.stairs: dict[int, dict[int, _Staircase]] = {}
        # Of each place, heaps of what others have announced, by the energy from which
        # it counts.
        self.waiting: dict[int, list[tuple]] = {}
        self.announced = 0
        self.more = []
        for m in range(len(problem.versions)):
            more_j, more_s = worse_places(tables, m)
            if energy_free:
                more_j = np.where(more_j < np.inf, 0.0, np.inf)
            np.fill_diagonal(more_j, np.inf)  # a place's own points count at once
            self.more.append((more_j, more_s))

    def new(self, batch: Labels) -> np.ndarray:
        """Settles the labels of a batch that nothing covers; tells which these are."""
        lowest, kept = batch.energy_j.min(initial=np.inf), [np.empty(0, int)]
        for place, own in _grouped(batch.place):
            self._release(place, lowest)
            epochs = batch.epoch[own] if self.capped else np.zeros(len(own), int)
            points = batch.seconds[own], batch.loss[own], epochs
            left = np.flatnonzero(~self._covers(place, *points))
            for i in range(0, len(left), _PAIRWISE):
                some = left[i : i + _PAIRWISE]
                if i:  # by those before it
                    some = some[~self._covers(place, *(x[some] for x in points))]
                some = some[self._not_covered(*(x[some] for x in points))]
                self._add(place, *(x[some] for x in points))
                kept.append(own[some])
                self._announce(
                    place, batch.energy_j[own[some]], *(x[some] for x in points)
                )
        return np.sort(np.concatenate(kept))

    def _covers(self, place: int, seconds, loss, epoch) -> np.ndarray:
        equal_s, equal_loss = self.equal
        found = np.zeros(len(seconds), bool)
        for k in np.unique(epoch).tolist():
            mine = epoch == k
            found[mine] = self._within(place, k).covers(
                seconds[mine] + equal_s, loss[mine] + equal_loss
            )
        return found

    def _within(self, place: int, epochs: int) -> _Staircase:
        """The staircase of a place's labels of at most so many epochs."""
        stairs = self.stairs.get(place, {})
        levels = [level for level in stairs if level <= epochs]
        return stairs[max(levels)] if levels else _Staircase(np.empty(0), np.empty(0))

    def _not_covered(self, seconds, loss, epoch) -> np.ndarray:
        """Which labels, in order of energy, none before them is as good as."""
        equal_s, equal_loss = self.equal
        # [i, j]: i stands before j and is as good.
        better = seconds[:, None] <= seconds + equal_s
        better &= loss[:, None] <= loss + equal_loss
        if self.capped:
            better &= epoch[:, None] <= epoch
        return ~np.triu(better, 1).any(0)

    def _add(self, place: int, seconds, loss, epoch) -> None:
        if not len(seconds):
            return
        stairs = self.stairs.setdefault(place, {})
        for k in np.unique(epoch).tolist():
            if k not in stairs:
                below = self._within(place, k)
                stairs[k] = _Staircase(below.seconds, below.loss)
        for k, stair in stairs.items():
            mine = epoch <= k
            if mine.any():
                stair.add(seconds[mine], loss[mine])

    def _announce(self, place: int, energy_j, seconds, loss, epoch) -> None:
        """Tells other places what they may be covered by, later on."""
        if not len(seconds):
            return
        m, c = divmod(place, self.clusters)
        more_j, more_s = self.more[m]
        for other in np.flatnonzero(more_j[:, c] < np.inf).tolist():
            self.announced += 1
            points = seconds + more_s[other, c], loss, epoch
            heapq.heappush(
                self.waiting.setdefault(m * self.clusters + other, []),
                (energy_j[-1] + more_j[other, c], self.announced, points),
            )

    def _release(self, place: int, energy_j: float) -> None:
        """Adds what others have announced, as far as it counts at an energy."""
        waiting, ready = self.waiting.get(place, []), []
        while waiting and waiting[0][0] <= energy_j:
            ready.append(heapq.heappop(waiting)[2])
        if ready:
            self._add(place, *(np.concatenate(x) for x in zip(*ready, strict=True)))


class _Expansion:
    """All that may follow labels, and survives the completion bounds."""

    def __init__(self, graph: Graph, bound: Bounds, capped: bool, energy_free: bool):
        self.graph, self.energy_free = graph, energy_free
        problem, tables = graph.problem, graph.tables
        self.bins = bound.value.shape[2] - 1
        used = np.ones(len(bound.weights), bool)
        used[2] = capped
        if energy_free:
            used &= bound.weights[:, 0] == 0
        used = np.flatnonzero(used)
        self.first = int(np.argmin(np.abs(used - MIDDLE)))
        scale = [1 / bound.energy_unit_j, 1 / problem.deadline_s, 1.0]
        self.weights = (bound.weights.astype(float) * scale)[used]
        self.value, self.stay = (
            np.asarray(x)[..., used] * (1 - SLACK) for x in (bound.value, bound.stay)
        )
        self.unit_j = bound.energy_unit_j
        self.switch = -(-graph.switch_ticks(self.bins, up=True) * self.bins // TICKS)
        # Impossible actions come last and are not looked at; impossible switches are
        # known by `exists`.
        free = 0.0 if energy_free else 1.0
        possible = graph.energy_j < np.inf
        self.energy_j = free * np.where(possible, graph.energy_j, 0)
        self.switch_j = free * np.where(tables.switch_j < np.inf, tables.switch_j, 0)
        self.exists = np.isfinite(tables.switch_j)
        self.count = possible.sum(-1)
        self.range = graph.high - graph.low
        # Labels of one bucket are independent where no epoch costs less than its width.
        cost = graph.seconds if energy_free else graph.energy_j
        self.apart = float(cost[possible].min(initial=np.inf)) * (1 - 1e-9)

    def cap(self, upper_j: float) -> None:
        """Sets the energy above which partial plans are dropped."""
        problem = self.graph.problem
        limits = np.array([0.0, problem.deadline_s, problem.max_epochs])
        fixed = self.weights @ limits * (1 + TOLERANCE)
        priced = self.weights[:, 0] > 0
        energy = np.zeros(len(fixed))
        energy[priced] = self.weights[priced, 0] * upper_j
        self.limit = fixed + energy * (1 + TOLERANCE)
        self.multiplier = np.where(priced, fixed, np.inf)

    def __call__(self, batch: Labels, first: int) -> Iterator[tuple]:
        """Yields labels and their order; the batch's own numbers begin at `first`."""
        clusters = len(self.graph.problem.clusters)
        for place, own in _grouped(batch.place):
            m, c = divmod(place, clusters)
            yield from self._from(m, c, batch.take(own), first + own)

    def _from(self, m: int, c: int, labels: Labels, number: np.ndarray):
        """What follows from labels of one place."""
        problem, tables = self.graph.problem, self.graph.tables
        here = problem.versions[m].curve.progress(labels.loss)
        j = self._bin(m, here)
        spent = np.stack([labels.energy_j, labels.seconds, labels.epoch], 1)
        for n in np.flatnonzero(self.exists[m, :, c]).tolist():
            at = spent + [self.switch_j[m, n, c], tables.switch_s[m, n, c], 0]
            total = at @ self.weights.T + self.stay[n, c, self.switch[m, n, j]]
            some = np.flatnonzero((total <= self.limit).all(1))
            if not len(some):
                continue
            start, loss = here[some], labels.loss[some]
            if n != m:
                loss = switched(problem, m, n, loss)
                start = problem.versions[n].curve.progress(loss)
            parents = number[some]
            yield from self._train(n, c, at[some], start, loss, parents)

    def _train(self, n: int, c: int, at, start, loss, parents):
        """An epoch of version n from cluster c, for all actions."""
        graph, k = self.graph, self.count[n, c]
        clusters = graph.energy_j.shape[1]
        cost = np.stack(
            np.broadcast_arrays(
                at[:, 0, None] + self.energy_j[n, c, :k],
                at[:, 1, None] + graph.seconds[n, c, :k],
                at[:, 2, None] + 1,
            ),
            axis=2,
        )
        later = start[:, None] + graph.progress[n, c, :k]
        to = np.broadcast_to(graph.destination[n, c, :k], later.shape)
        bins = self._bin(n, later)
        # The weight that drops the most comes first, and then the others.
        i = self.first
        total = cost @ self.weights[i] + self.value[n, to, bins, i]
        row, p = np.nonzero(total <= self.limit[i])
        cost, bins, to = cost[row, p], bins[row, p], to[row, p]
        total = cost @ self.weights.T + self.value[n, to, bins]
        inside = (total <= self.limit).all(1)
        if not inside.any():
            return
        row, p, cost, total, to = (x[inside] for x in (row, p, cost, total, to))
        new = later[row, p]
        new_loss = loss[row]
        moves = np.isfinite(new)
        new_loss[moves] = graph.problem.versions[n].curve.loss(new[moves])
        least = (total - self.multiplier).max(1)
        order = total[:, 0] if self.energy_free else cost[:, 0]
        choice = n * len(graph.tables.destination) + graph.action[n, c, p]
        labels = Labels(
            cost[:, 0],
            cost[:, 1],
            new_loss,
            cost[:, 2].astype(np.int32),
            (n * clusters + to).astype(np.int32),
            parents[row],
            choice.astype(np.int32),
            least,
        )
        yield labels, order

    def _bin(self, m: int, progress):
        """The point of progress at or after `progress`."""
        share = (progress - self.graph.low[m]) / self.range[m] * self.bins
        share = np.minimum(np.maximum(share, 0), self.bins)
        return np.ceil(share * (1 - 1e-12)).astype(int)
