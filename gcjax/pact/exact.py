"""Exact answers: optima, fastest plans, proofs that there is none; and brute force."""

import math
import time
from dataclasses import replace

import numpy as np

from gcjax.pact.graph import MIDDLE, Bounds, Graph, build, estimate
from gcjax.pact.labels import Search, search
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
from gcjax.pact.tables import advance, tabulate


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
