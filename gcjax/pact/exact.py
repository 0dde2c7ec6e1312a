"""Exact solvers: Pareto labels in order of energy, and brute force for tests."""

import heapq
import math
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gcjax.pact.graph import MIDDLE, SLACK, TICKS, Bounds, Graph, build, estimate
from gcjax.pact.problem import Problem
from gcjax.pact.proof import proved
from gcjax.pact.schedule import (
    TOLERANCE,
    InfeasibleError,
    NoneFoundError,
    Plan,
    feasible,
    replay,
)
from gcjax.pact.tables import advance, switched, tabulate

# Sums over the same epochs in another order differ in their last digits; labels closer
# than this count as equal, or every order of the same epochs would be kept.
_EQUAL = 1e-12


class _Staircase:
    """Points (seconds, loss) of which none is at least as good as another in both."""

    def __init__(self, equal_s: float, equal_loss: float):
        self.equal_s, self.equal_loss = equal_s, equal_loss
        self.seconds: list[float] = []  # ascending
        self.losses: list[float] = []  # descending

    def covers(self, seconds: float, loss: float) -> bool:
        """Whether a point is at least as good."""
        i = bisect_right(self.seconds, seconds + self.equal_s) - 1
        return i >= 0 and self.losses[i] <= loss + self.equal_loss

    def add(self, seconds: float, loss: float) -> None:
        """Adds a point that is not covered, and drops what it covers."""
        i = j = bisect_left(self.seconds, seconds)
        while j < len(self.losses) and self.losses[j] >= loss:
            j += 1
        self.seconds[i:j] = [seconds]
        self.losses[i:j] = [loss]


class _Label(NamedTuple):
    energy_j: float
    seconds: float
    loss: float
    version: int
    cluster: int
    epoch: int
    parent: int
    choice: tuple[int, int] | None


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
      bound: Completion bounds of it.
      upper_j: Energy that some plan is known to reach; looks for no dearer ones.
      capped: Heed `max_epochs`, in dominance too. Without, it is ignored.
      energy_free: Take all energies for zero and search in order of time.
      limit_s: Processor time after which to stop.
      progress: Show a progress bar.
    """
    problem, tables = graph.problem, graph.tables
    expand = _Expansion(graph, bound, capped, energy_free)
    expand.cap(upper_j)
    if bound.proof and (capped or "max_epochs" not in bound.proof):
        return Search(None, True, math.inf, 0)
    equal = _EQUAL * problem.deadline_s, _EQUAL * problem.top_loss
    settled: dict[tuple, _Staircase] = {}
    goal = problem.max_loss + TOLERANCE * problem.top_loss

    def covered(label: _Label) -> bool:
        at = label.version, label.cluster
        epochs = range(label.epoch + 1) if capped else (0,)
        return any(
            (stairs := settled.get((*at, k))) and stairs.covers(*label[1:3])
            for k in epochs
        )

    (m, c), loss = tables.start, problem.start_loss
    labels = [_Label(0.0, 0.0, loss, m, c, 0, -1, None)]
    heap, expanded, best = [(0.0, 0, 0.0)], 0, None
    stop = time.process_time() + limit_s
    with tqdm(disable=not progress, unit=" labels", desc="labels") as bar:
        while heap:
            key, i, _ = heapq.heappop(heap)
            label = labels[i]
            if label.loss <= goal:
                return Search(_trace(labels, i), True, label.energy_j, expanded)
            if covered(label):
                continue
            at = label.version, label.cluster, label.epoch if capped else 0
            settled.setdefault(at, _Staircase(*equal)).add(label.seconds, label.loss)
            expanded += 1
            if expanded % 1024 == 0:
                bar.update(1024)
                if time.process_time() > stop:
                    lower = min(f for _, _, f in [*heap, (key, i, key)])
                    lower = max(lower * bound.energy_unit_j, bound.root_j)
                    return Search(best, False, lower, expanded)
            for new, order, total in expand(label, i):
                if new.loss > goal and covered(new):
                    continue
                if new.loss <= goal:
                    expand.cap(new.energy_j)
                labels.append(new)
                heapq.heappush(heap, (order, len(labels) - 1, total))
                if new.loss <= goal:
                    best = _trace(labels, len(labels) - 1)
    return Search(None, True, math.inf, expanded)


class _Expansion:
    """All that may follow a label, and survives the completion bounds."""

    def __init__(self, graph: Graph, bound: Bounds, capped: bool, energy_free: bool):
        self.graph, self.energy_free = graph, energy_free
        problem, tables = graph.problem, graph.tables
        self.value = np.asarray(bound.value) * (1 - SLACK)
        self.stay = np.asarray(bound.stay) * (1 - SLACK)
        self.bins = self.value.shape[2] - 1
        used = np.ones(len(bound.weights), bool)
        used[2] = capped
        if energy_free:
            used &= bound.weights[:, 0] == 0
        self.used = np.flatnonzero(used)
        scale = [1 / bound.energy_unit_j, 1 / problem.deadline_s, 1.0]
        self.weights = (bound.weights.astype(float) * scale)[self.used]
        self.value, self.stay = self.value[..., self.used], self.stay[..., self.used]
        self.unit_j = bound.energy_unit_j
        self.switch = -(-graph.switch_ticks(self.bins, up=True) * self.bins // TICKS)
        # Impossible actions come last and are not looked at; impossible switches are
        # known by `exists`.
        free = 0.0 if energy_free else 1.0
        self.energy_j = free * np.where(graph.energy_j < np.inf, graph.energy_j, 0)
        self.switch_j = free * np.where(tables.switch_j < np.inf, tables.switch_j, 0)
        self.exists = np.isfinite(tables.switch_j)
        self.count = np.isfinite(graph.energy_j).sum(-1)
        self.range = graph.high - graph.low

    def cap(self, upper_j: float) -> None:
        """Sets the energy above which partial plans are dropped."""
        problem = self.graph.problem
        limits = np.array([0.0, problem.deadline_s, problem.max_epochs])
        fixed = self.weights @ limits * (1 + TOLERANCE)
        with np.errstate(invalid="ignore"):
            energy = np.where(self.weights[:, 0] > 0, self.weights[:, 0] * upper_j, 0)
        self.limit = fixed + energy * (1 + TOLERANCE)
        self.multiplier = np.where(self.weights[:, 0] > 0, fixed, np.inf)

    def __call__(self, label: _Label, parent: int):
        """Yields (label, its place in the order, least energy of the whole plan)."""
        graph, tables = self.graph, self.graph.tables
        problem, (m, c) = graph.problem, (label.version, label.cluster)
        curve = problem.versions[m].curve
        here = float(curve.progress(label.loss))
        j = self._bin(m, here)
        spent = np.array([label.energy_j, label.seconds, label.epoch])
        for n in np.flatnonzero(self.exists[m, :, c]):
            at = spent + [self.switch_j[m, n, c], tables.switch_s[m, n, c], 0]
            base = self.weights @ at
            if (base + self.stay[n, c, self.switch[m, n, j]] > self.limit).any():
                continue
            start, loss = here, label.loss
            if n != m:
                loss = float(switched(problem, m, n, label.loss))
                start = float(problem.versions[n].curve.progress(loss))
            k = self.count[n, c]
            later = start + graph.progress[n, c, :k]
            cost = np.stack(
                [
                    at[0] + self.energy_j[n, c, :k],
                    at[1] + graph.seconds[n, c, :k],
                    np.full(k, at[2] + 1),
                ],
                axis=1,
            )
            total = cost @ self.weights.T
            total += self.value[n, graph.destination[n, c, :k], self._bin(n, later)]
            curve = problem.versions[n].curve
            for p in np.flatnonzero((total <= self.limit).all(1)):
                if np.isfinite(later[p]):
                    new_loss = float(curve.loss(later[p]))
                else:
                    new_loss = loss
                least = float((total[p] - self.multiplier).max())
                order = float(total[p, 0]) if self.energy_free else float(cost[p, 0])
                yield (
                    _Label(
                        float(cost[p, 0]),
                        float(cost[p, 1]),
                        new_loss,
                        int(n),
                        int(graph.destination[n, c, p]),
                        label.epoch + 1,
                        parent,
                        (int(n), int(graph.action[n, c, p])),
                    ),
                    order,
                    least,
                )

    def _bin(self, m: int, progress):
        """The point of progress at or after `progress`."""
        share = (progress - self.graph.low[m]) / self.range[m] * self.bins
        share = np.minimum(np.maximum(share, 0), self.bins)
        return np.ceil(share * (1 - 1e-12)).astype(int)


def _trace(labels: list[_Label], i: int) -> list[tuple[int, int]]:
    found = []
    while labels[i].choice is not None:
        found.append(labels[i].choice)
        i = labels[i].parent
    return found[::-1]


def labels(
    graph: Graph,
    upper_j: float = math.inf,
    limit_s: float = math.inf,
    progress: bool = False,
) -> Search:
    """The optimum, or a proved lower bound where `limit_s` runs out.

    `max_epochs` is first ignored; only where the optimum then has too many epochs is
    it heeded, at the price of dominance in epochs too.

    Args:
      graph: What is searched.
      upper_j: Energy of a known plan; one as good as it is still found.
      limit_s: Processor time after which to stop.
      progress: Show a progress bar.
    """
    options = dict(limit_s=limit_s, progress=progress)
    upper_j *= 1 + 1e-7
    free = Search(None, False, 0.0, 0)
    bound = completion(graph)
    cap = graph.problem.max_epochs
    if bound.weights[MIDDLE, 2] * cap * bound.energy_unit_j < 1e-3 * bound.root_j:
        loose = completion(graph, capped=False)
        free = search(graph, loose, upper_j, capped=False, **options)
        if free.choices is None or len(free.choices) <= cap:
            return free
    capped = search(graph, bound, upper_j, **options)
    return replace(
        capped,
        lower_j=max(capped.lower_j, free.lower_j),
        labels=capped.labels + free.labels,
    )


def completion(graph: Graph, capped: bool = True, floats: int = 1 << 22) -> Bounds:
    """Proved completion bounds in tables of about so many numbers."""
    bins = floats // (12 * graph.energy_j.shape[0] * graph.energy_j.shape[1])
    # Epochs of a plan with few lead over many points anyway.
    bins = min(max(bins, 512), 2048, 64 * graph.problem.max_epochs)
    return proved(graph, estimate(graph, 1 << (bins.bit_length() - 1), capped))


def fastest(graph: Graph, limit_s: float = math.inf) -> Search:
    """A plan that meets the target in the least time, whatever its energy."""
    options = dict(energy_free=True, limit_s=limit_s)
    loose = completion(graph, capped=False)
    found = search(graph, loose, capped=False, **options)
    if found.choices is None or len(found.choices) <= graph.problem.max_epochs:
        return found
    return search(graph, completion(graph), **options)


def refuse(problem: Problem, limit_s: float = 60.0) -> None:
    """Raises for a problem whose infeasibility is proved, with the nearest targets.

    Raises:
      InfeasibleError: with the least time for the loss, and the least loss in time.
      NoneFoundError: where `limit_s` did not suffice to find these.
    """
    stop = time.process_time() + limit_s

    def least_time(max_loss: float, deadline_s: float) -> float | None:
        """Seconds to a loss; None: not within the deadline."""
        changed = problem.with_target(max_loss=max_loss, deadline_s=deadline_s)
        if max_loss >= problem.start_loss:
            return 0.0
        graph = build(changed)
        found = fastest(graph, max(stop - time.process_time(), 1e-3))
        if not found.complete:
            raise NoneFoundError(
                f"no plan was found for a loss of {max_loss:.4g} in {deadline_s:.4g} s "
                "within the time given to the search"
            )
        if found.choices is None:
            return None
        return replay(changed, found.choices, graph.tables).seconds

    tables = tabulate(problem)
    longest = (
        tables.seconds[tables.possible].max()
        + tables.switch_s[np.isfinite(tables.switch_s)].max()
    )
    ever = least_time(problem.max_loss, float(longest * problem.max_epochs))
    low, high = problem.max_loss, problem.start_loss
    while high - low > 1e-3 * problem.start_loss:
        middle = (low + high) / 2
        if least_time(middle, problem.deadline_s) is None:
            low = middle
        else:
            high = middle
    deadline = math.inf if ever is None else ever
    hint = (
        f"it takes {deadline:.4g} s at least"
        if ever is not None
        else f"no plan of {problem.max_epochs} epochs reaches it"
    )
    raise InfeasibleError(
        f"a loss of {problem.max_loss:.4g} within {problem.deadline_s:.4g} s is "
        f"infeasible: {hint}; within the deadline {high:.4g} can be reached",
        deadline,
        high,
    )


def brute_force(problem: Problem) -> Plan | None:
    """The optimum by trying everything; for at most about 6 epochs.

    Knows nothing of bounds, dominance or progress: it applies the predictor to losses.
    """
    tables = tabulate(problem)
    best: tuple[float, list] = (math.inf, [])
    stack = [(0.0, 0.0, problem.start_loss, *tables.start, ())]
    while stack:
        energy, seconds, loss, m, c, taken = stack.pop()
        if loss <= problem.max_loss + TOLERANCE * problem.top_loss:
            if energy < best[0]:
                best = energy, list(taken)
            continue
        if len(taken) == problem.max_epochs:
            continue
        for n in np.flatnonzero(np.isfinite(tables.switch_j[m, :, c])):
            for a in np.flatnonzero(np.isfinite(tables.energy_j[n, c])):
                e = energy + tables.switch_j[m, n, c] + tables.energy_j[n, c, a]
                t = seconds + tables.switch_s[m, n, c] + tables.seconds[n, c, a]
                if t > problem.deadline_s * (1 + TOLERANCE) or e >= best[0]:
                    continue
                new = advance(problem, m, n, loss, tables.progress[n, c, a])
                to = int(tables.destination[a])
                choice = int(n), int(a)
                stack.append((e, t, float(new), int(n), to, (*taken, choice)))
    if not math.isfinite(best[0]):
        return None
    plan = replay(problem, best[1], tables, "brute_force")
    assert feasible(problem, plan)
    return plan
