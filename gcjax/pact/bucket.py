"""The default planner: windows above an estimated optimum, worked off in cells.

A *window* is a search of `cells` for plans whose bounded energy is at most so much. In
a narrow window few labels survive, so that cells can be fine. Windows widen until a
plan is found. Then progress and time are cut otherwise, as far as a number of labels
allows, or until the plan is as near as wanted to a proved lower bound. One label
survives in a cell, and now and then it is the wrong one: that other cells gained
nothing once does not say that they never will.
"""

import dataclasses
from collections.abc import Generator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from gcjax.pact import cells, proof
from gcjax.pact.graph import MIDDLE, Bounds, Graph, build, estimate, rollouts
from gcjax.pact.problem import Problem
from gcjax.pact.schedule import Plan, feasible, replay

# Labels of one window: at first, at most to improve a plan, and at most to find one.
CAPACITIES = 1 << 16, 1 << 18, 1 << 20
_LABELS = 500_000  # after which a plan is not improved further
# Labels of a cell are ranked by bounds that price time and epochs: few bins of these
# are enough for most problems.
_FIRST = 1024, 4
# Which labels lose their cells is a matter of luck that other cells change, and either
# progress or time may be what keeps a better plan out.
_OTHERS = (2048, 4), (256, 16), (64, 64), (2048, 16), (512, 64), (4096, 64), (8192, 256)
_COARSEST = 64
_SETTLED = 5e-4  # relative gain, or proved gap, that is not worth another window
# Bounds that are only estimates may be too high by this share: plans are looked for
# so much above them first, then in windows that double.
_WINDOW = 2.5e-3


class Window(NamedTuple):
    """What a search asks for: energy at most, and bins of progress, time, epochs."""

    upper_j: float
    bins: tuple[int, int, int]
    capacity: int  # labels at most


def search(graph: Graph, fixed: tuple[int, int] | None) -> Plan | None:
    """The best plan found; None for none.

    Args:
      graph: What is searched.
      fixed: Bins of progress and time; None refines progress.
    """
    bound = estimate(graph)
    if bound.proof:
        return None
    a = jax.device_put(cells.arrays(graph, bound, np.inf, (1, 1, 1)))
    windows = _windows(graph, bound, fixed)
    window, plan = _next(windows, None)
    while window:
        log = run(_narrowed(a, bound, window), window.capacity)
        window, plan = _next(windows, log)
    return plan


def search_batch(
    problems: Sequence[Problem], fixed: tuple[int, int] | None, capacity: int
) -> list[Plan | None]:
    """The same for several problems; see `gcjax.pact.plan_batch`."""
    plans: list[Plan | None] = [None] * len(problems)
    open_ = [i for i, p in enumerate(problems) if p.start_loss > p.max_loss]
    for i in set(range(len(problems))) - set(open_):
        plans[i] = replay(problems[i], [], solver="bucket")
    graphs = [build(problems[i]) for i in open_]
    most = max((g.action.shape[2] for g in graphs), default=0)
    graphs = [_padded(g, most) for g in graphs]
    bounds = [estimate(g) for g in graphs]
    searches = [_windows(g, b, fixed) for g, b in zip(graphs, bounds, strict=True)]
    asked: list[Window | None] = [None] * len(open_)
    for k, i in enumerate(open_):
        if not bounds[k].proof:
            asked[k], plans[i] = _next(searches[k], None)
    a = [cells.arrays(g, b, 0, (1, 1, 1)) for g, b in zip(graphs, bounds, strict=True)]
    if not a:
        return plans
    a = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *a))
    while any(asked):
        # Problems that ask for no more look for plans of no energy: there are none.
        now = [w or Window(0.0, (1, 1, 1), capacity) for w in asked]
        units = np.array([b.energy_unit_j for b in bounds])
        uppers = np.float32([w.upper_j for w in now] / units * (1 + 1e-6))
        bins = np.array([w.bins for w in now], np.int32)
        logs = jax.device_get(
            _solve_batch(a._replace(upper=uppers, bins=bins), capacity=capacity)
        )
        for k, i in enumerate(open_):
            if asked[k]:
                log = jax.tree.map(lambda x, k=k: x[k], logs)
                asked[k], plans[i] = _next(searches[k], log)
    return plans


@partial(jax.jit, static_argnames="capacity")
def _solve_batch(a: cells.Arrays, capacity: int) -> cells.Log:
    one = partial(cells.solve, capacity=capacity, axis_name="problems")
    return jax.vmap(one, axis_name="problems")(a)


def _padded(graph: Graph, actions: int) -> Graph:
    """The graph with so many actions in every place, the last ones impossible."""
    more = ((0, 0), (0, 0), (0, actions - graph.action.shape[2]))
    pad = partial(np.pad, pad_width=more)
    return graph._replace(
        action=pad(graph.action),
        energy_j=pad(graph.energy_j, constant_values=np.inf),
        seconds=pad(graph.seconds, constant_values=np.inf),
        progress=pad(graph.progress),
        destination=pad(graph.destination),
    )


def _narrowed(a: cells.Arrays, bound: Bounds, window: Window) -> cells.Arrays:
    upper = np.float32(window.upper_j * (1 + 1e-6) / bound.energy_unit_j)
    return a._replace(upper=upper, bins=np.array(window.bins, np.int32))


def run(a: cells.Arrays, most: int = CAPACITIES[-1], **options) -> cells.Log:
    """Works off the queue, with more room, up to `most`, where a log overflows."""
    for capacity in CAPACITIES:
        log = cells.solve(a, capacity, **options)
        if not log.full or capacity >= most:
            break
    return jax.device_get(log)


def _next(
    windows: Generator, log: cells.Log | None
) -> tuple[Window | None, Plan | None]:
    """The next window that is asked for; at the end None, and the plan."""
    try:
        return windows.send(log), None
    except StopIteration as end:
        return None, end.value


def _windows(
    graph: Graph, bound: Bounds, fixed: tuple[int, int] | None
) -> Generator[Window, cells.Log, Plan | None]:
    """Asks for windows, is sent their logs, and returns the best plan."""
    lower_j = proof.least_joules(graph, bound)
    best, count = _best_rollout(graph, bound), 0
    bins, window, finest = fixed or _FIRST, _WINDOW, cells.FINEST

    def joules(plan: Plan | None) -> float:
        return plan.joules if plan else np.inf

    def settled() -> bool:
        near = joules(best) <= lower_j * (1 + _SETTLED)
        return fixed is None and (near or (best is not None and count > _LABELS))

    # Wider and wider, to the first plan that is better than those of the estimate.
    while not settled():
        reach = bound.root_j * (1 + window) if window < np.inf else np.inf
        upper = min(joules(best), reach)
        plan, log = yield from _asked(graph, bound, upper, bins, CAPACITIES[-1])
        count += int(log.count)
        if joules(plan) < joules(best) or upper >= joules(best) < np.inf:
            best = min(best, plan, key=joules)
            break
        if log.full:
            if fixed or bins[0] <= _COARSEST:
                break
            finest = bins[0] // 2
            bins = finest, bins[1]
        elif window < np.inf:
            window = 2 * window if window < 0.5 else np.inf  # nothing is so cheap
        elif fixed or 2 * bins[0] > finest:
            break
        else:
            bins = 2 * bins[0], bins[1]
    # Other cells, finer in one way or both, in half the window first: the fewer labels,
    # the fewer compete for a cell.
    full = [(finest + 1, 1)]
    for bins in () if fixed or not best else _OTHERS:
        for share in (0.5, 1.0):
            crowded = any(f[0] <= bins[0] and f[1] <= bins[1] for f in full)
            if crowded or settled():
                break
            upper = joules(best) - (1 - share) * max(joules(best) - bound.root_j, 0)
            plan, log = yield from _asked(graph, bound, upper, bins, CAPACITIES[1])
            count += int(log.count)
            best = min(best, plan, key=joules)
            if log.full:
                full.append(bins)
    if best is None:
        return None
    return dataclasses.replace(best, labels=count, lower_bound_j=lower_j)


def _asked(
    graph: Graph, bound: Bounds, upper_j: float, bins: tuple[int, int], most: int
) -> Generator[Window, cells.Log, tuple[Plan | None, cells.Log]]:
    """Asks for one window; returns its plan, if any, and its log."""
    log = yield Window(upper_j, _three(graph, bound, bins), most)
    if log.best < 0:
        return None, log
    choices = cells.trace(graph, log, int(log.best))
    plan = replay(graph.problem, choices, graph.tables, "bucket", resolution=bins)
    if not feasible(graph.problem, plan):
        raise AssertionError("a plan in ticks fails its replay")
    return plan, log


def _best_rollout(graph: Graph, bound: Bounds) -> Plan | None:
    plans = [
        replay(graph.problem, choices, graph.tables, "bucket")
        for choices in rollouts(graph, bound)
    ]
    plans = [p for p in plans if feasible(graph.problem, p)]
    return min(plans, key=lambda p: p.joules, default=None)


def _three(graph: Graph, bound: Bounds, bins: tuple[int, int]) -> tuple[int, int, int]:
    """Bins of progress, time and epochs: of what does not bind one is enough."""
    weight = bound.weights[MIDDLE]
    cap = graph.problem.max_epochs
    total = bound.root_j / bound.energy_unit_j
    return (
        bins[0],
        bins[1] if weight[1] > 1e-3 * total else 1,
        min(bins[1], cap) if weight[2] * cap > 1e-3 * total else 1,
    )
