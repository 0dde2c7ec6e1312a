"""What plans are compared with: simpler rules, each at its best.

Every baseline returns a replayed plan, or None where its rule meets no target. None of
them is the authors' code; sources are named where a rule stands for published work.
"""

from collections.abc import Callable, Iterator

import numpy as np

from gcjax.pact.problem import Problem
from gcjax.pact.schedule import Plan, feasible, replay
from gcjax.pact.tables import Tables, advance, tabulate

Choice = tuple[int, int]


def static(problem: Problem) -> Plan | None:
    """One version and one action from start to end, the cheapest that works."""
    tables = tabulate(problem)
    return _cheapest(problem, tables, _constant(tables), "static")


def full(problem: Problem) -> Plan | None:
    """No compression: the start version throughout, on its best action."""
    tables = tabulate(problem)
    start = tables.start[0]
    rules = (rule for m, rule in _constant_with_version(tables) if m == start)
    return _cheapest(problem, tables, rules, "no compression")


def prune_at_start(problem: Problem) -> Plan | None:
    """The smallest version that can reach the loss at all, on its best action."""
    tables = tabulate(problem)
    rules = [*_constant_with_version(tables)]
    for m in reversed(range(len(problem.versions))):
        plan = _cheapest(
            problem, tables, (r for n, r in rules if n == m), "prune at start"
        )
        if plan:
            return plan
    return None


def one_switch(problem: Problem) -> Plan | None:
    """The start version, then one other, each on one action; the epoch is tuned."""
    tables = tabulate(problem)
    epochs = np.unique(np.geomspace(1, problem.max_epochs, 12).round().astype(int))
    start = tables.start[0]
    actions = range(len(tables.destination))

    def rules():
        for m in range(len(problem.versions)):
            if m == start or not np.isfinite(tables.switch_j[start, m]).any():
                continue
            for a in actions:
                for at in epochs:
                    yield lambda k, *_, a=a, m=m, at=at: (start if k < at else m, a)

    return _cheapest(problem, tables, rules(), "one switch")


def greedy(problem: Problem) -> Plan | None:
    """Each epoch the largest drop of the loss per joule."""
    return _greedy(problem, "greedy per joule", lambda drop, joules, _: drop / joules)


def greedy_in_time(problem: Problem) -> Plan | None:
    """Each epoch the largest drop of the loss per second."""
    return _greedy(problem, "greedy per second", lambda drop, _, s: drop / s)


def greedy_weighted(problem: Problem) -> Plan | None:
    """Each epoch the largest drop per joule plus price of time, at the best price."""
    tables = tabulate(problem)
    prices = np.geomspace(1e-3, 1e3, 13) * _price(tables)
    plans = [
        _greedy(problem, "greedy, priced", lambda d, j, s, p=p: d / (j + p * s))
        for p in prices
    ]
    return min((p for p in plans if p), key=lambda p: p.joules, default=None)


def prune_fl(problem: Problem, every: int = 5) -> Plan | None:
    """Joules for seconds in the rule of PruneFL, with versions for masks.

    Every so many epochs the version is chosen that promises the largest drop of the
    loss per joule until the next choice; training stays on the cluster where the
    whole plan is cheapest. (Jiang et al., 2019, "Model Pruning Enables Efficient
    Federated Learning on Edge Devices", arXiv:1909.12326; its masks shrink and grow,
    versions here only shrink.)
    """
    tables = tabulate(problem)

    def rule_for(a):
        def rule(k, m, c, loss):
            if k % every and tables.possible[m, c, a]:
                return m, a
            best, ratio = None, 0.0
            for n in _targets(tables, m, c):
                joules = tables.switch_j[m, n, c] + every * tables.energy_j[n, c, a]
                if not np.isfinite(joules):
                    continue
                gained = every * tables.progress[n, c, a]
                drop = loss - float(advance(problem, m, n, loss, gained))
                if drop / joules > ratio:
                    best, ratio = (int(n), a), drop / joules
            return best

        return rule

    rules = (rule_for(a) for a in range(len(tables.destination)))
    return _cheapest(problem, tables, rules, "PruneFL-like")


def hetero_fl(problem: Problem) -> Plan | None:
    """A static version for each cluster, by its capability; epochs in turn.

    The fastest third of the clusters trains the largest version that the start allows,
    the middle third a middle one, the slowest the smallest, from large to small. How
    many epochs each third gets is tuned. (After Diao, Ding and Tarokh, 2020,
    "HeteroFL", arXiv:2010.01264, where clients hold nested parts of one model at the
    same time; here clusters take turns.)
    """
    tables = tabulate(problem)
    start, c0 = tables.start
    last = len(problem.versions) - 1
    rate = np.where(
        np.isfinite(tables.energy_j[start, c0]),
        tables.progress[start, c0] / tables.seconds[start, c0],
        0,
    )
    thirds = np.array_split(np.argsort(-rate, kind="stable"), 3)
    widths = [start, (start + last) // 2, last]
    steps = np.unique(np.geomspace(1, problem.max_epochs, 8).round().astype(int))

    def rules():
        for first in (0, *steps):
            for second in (0, *steps):
                bounds = first, first + second
                yield lambda k, *_, b=bounds: _turn(k, b, thirds, widths)

    return _cheapest(problem, tables, rules(), "HeteroFL-like")


BASELINES: dict[str, Callable[[Problem], Plan | None]] = {
    "static": static,
    "no compression": full,
    "prune at start": prune_at_start,
    "one switch": one_switch,
    "greedy per joule": greedy,
    "greedy per second": greedy_in_time,
    "greedy, priced": greedy_weighted,
    "PruneFL-like": prune_fl,
    "HeteroFL-like": hetero_fl,
}


def _turn(k: int, bounds: tuple[int, int], thirds, widths) -> Choice | None:
    third = sum(k >= b for b in bounds)
    actions = thirds[third]
    if not len(actions):
        return None
    return widths[third], int(actions[k % len(actions)])


def _targets(tables: Tables, m: int, c: int) -> np.ndarray:
    return np.flatnonzero(np.isfinite(tables.switch_j[m, :, c]))


def _constant_with_version(tables: Tables) -> Iterator:
    for m in range(tables.energy_j.shape[0]):
        for a in range(len(tables.destination)):
            yield m, lambda *_, m=m, a=a: (m, a)


def _constant(tables: Tables) -> Iterator:
    return (rule for _, rule in _constant_with_version(tables))


def _price(tables: Tables) -> float:
    """Joules per second of a typical epoch."""
    possible = tables.possible
    return float(np.median(tables.energy_j[possible] / tables.seconds[possible]))


def _greedy(problem: Problem, name: str, score: Callable) -> Plan | None:
    tables = tabulate(problem)

    def rule(_, m, c, loss):
        best, ratio = None, 0.0
        for n in _targets(tables, m, c):
            possible = tables.possible[n, c]
            joules = tables.switch_j[m, n, c] + tables.energy_j[n, c]
            seconds = tables.switch_s[m, n, c] + tables.seconds[n, c]
            after = advance(problem, m, n, loss, tables.progress[n, c])
            with np.errstate(invalid="ignore"):
                value = np.where(possible, score(loss - after, joules, seconds), 0)
            a = int(np.argmax(value))
            if value[a] > ratio:
                best, ratio = (int(n), a), value[a]
        return best

    return _cheapest(problem, tables, [rule], name)


def _cheapest(problem: Problem, tables: Tables, rules, name: str) -> Plan | None:
    """Follows each rule and keeps the cheapest plan that meets the target."""
    best = None
    for rule in rules:
        choices = _follow(problem, tables, rule, best.joules if best else np.inf)
        if choices is None:
            continue
        plan = replay(problem, choices, tables, name)
        if feasible(problem, plan) and (best is None or plan.joules < best.joules):
            best = plan
    return best


def _follow(
    problem: Problem, tables: Tables, rule: Callable, most_j: float
) -> list[Choice] | None:
    """Takes (epoch, version, cluster, loss) -> (version, action) to the target."""
    (m, c), loss = tables.start, problem.start_loss
    joules = seconds = 0.0
    choices = []
    while loss > problem.max_loss:
        if len(choices) == problem.max_epochs:
            return None
        choice = rule(len(choices), m, c, loss)
        if choice is None:
            return None
        n, a = choice
        joules += tables.switch_j[m, n, c] + tables.energy_j[n, c, a]
        seconds += tables.switch_s[m, n, c] + tables.seconds[n, c, a]
        if not (joules < most_j and seconds <= 1.000001 * problem.deadline_s):
            return None
        loss = float(advance(problem, m, n, loss, tables.progress[n, c, a]))
        choices.append((n, a))
        m, c = n, int(tables.destination[a])
    return choices
