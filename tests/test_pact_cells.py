"""Bucket, grid and cost scaling against exact labels; frontiers; batches."""

import functools

import jax
import numpy as np
import pytest
from pact_cases import small

from gcjax import pact
from gcjax.pact import bucket, cells, exact, graph, scaled

# Planning takes longer without optimisations.
pytestmark = pytest.mark.usefixtures("optimised")


@functools.cache
def problems():
    """Problems of three to sixteen epochs with their optimum, of one shape."""
    found = []
    for seed in range(700, 717):
        problem = small(seed, 2, 3, 12)
        problem = problem.with_target(
            max_loss=0.62, deadline_s=3 * problem.deadline_s, max_epochs=16
        )
        best = exact.labels(graph.build(problem))
        assert best.complete
        if best.choices is not None:
            found.append((problem, pact.replay(problem, best.choices).joules))
    assert len(found) > 12
    return found


def test_bucket_is_near_the_optimum_and_never_below():
    gaps = []
    for problem, best in problems():
        plan = pact.plan(problem)
        assert pact.feasible(problem, plan)
        gaps.append(plan.joules / best - 1)
    assert min(gaps) > -1e-9
    assert np.mean(gaps) < 0.01 and max(gaps) < 0.03


def test_grid_is_within_its_proved_bound_and_never_below_the_optimum():
    """E <= OPT(max_loss - K delta_loss, deadline - K delta_time), K epochs."""
    bounded = 0
    for problem, best in problems()[:6]:
        previous = np.inf
        for bins in ((512, 256), (1024, 1024)):
            lost = problem.max_epochs * (problem.top_loss - problem.max_loss) / bins[0]
            tightened = problem.with_target(
                max_loss=problem.max_loss - lost,
                deadline_s=problem.deadline_s * (1 - problem.max_epochs / bins[1]),
            )
            search = exact.labels(graph.build(tightened))
            if search.choices is None:
                continue
            bounded += 1
            bound = pact.replay(tightened, search.choices).joules
            assert bound <= previous * (1 + 1e-9)  # refining tightens what is proved
            previous = bound
            found = graph.build(problem)
            # Dearer labels than the bound may be dropped: it must be kept without.
            proved = exact.completion(found)
            a = cells.arrays(found, proved, bound, (*bins, 1), snap=True)
            log = bucket.run(a, snap=True, guided=False)
            plan = pact.replay(problem, cells.trace(found, log, int(log.best)))
            assert pact.feasible(problem, plan)
            assert best * (1 - 1e-9) <= plan.joules <= bound * (1 + 1e-5)
    assert bounded >= 4


def test_grid_plans_are_feasible():
    problem, best = problems()[3]
    plan = pact.plan(problem, "grid", (64, 64))
    assert pact.feasible(problem, plan) and plan.joules >= best * (1 - 1e-9)


def test_scaled_costs_are_within_the_factor_of_the_rounded_optimum():
    """For a target that is tightened by a loss bin for every epoch the factor holds."""
    checked = 0
    for problem, best in problems()[:4]:
        bins = 512
        lost = problem.max_epochs * (problem.top_loss - problem.max_loss) / bins
        tightened = problem.with_target(max_loss=problem.max_loss - lost)
        search = exact.labels(graph.build(tightened))
        for error in (0.5, 0.1):
            plan = scaled.solve(graph.build(problem), error, bins)
            if search.choices is not None:
                bound = pact.replay(tightened, search.choices).joules
                assert plan.joules <= (1 + error) * bound
                checked += 1
            if plan is not None:
                assert pact.feasible(problem, plan)
                assert plan.joules >= best * (1 - 1e-9)
    assert checked >= 3


def test_solvers_on_rounded_states_say_when_they_give_up():
    problem, best = problems()[3]
    coarse = functools.partial(pact.plan, problem, "grid", (2, 2))
    with pytest.raises(pact.NoneFoundError, match="grid gave up after .* labels"):
        coarse(limit_labels=1)
    plan = coarse()  # none survives two bins, so that the fastest has to do
    assert plan.solver == "fastest" and plan.joules >= best * (1 - 1e-9)
    with pytest.raises(pact.NoneFoundError, match="cost_scaled gave up after"):
        scaled.solve(graph.build(problem), 0.5, 2, limit_labels=1)
    finer = scaled.solve(graph.build(problem), 0.5, 2)
    assert finer.resolution[0] > 2 and finer.labels > 0


def test_cells_hide_nothing_when_they_are_fine_enough():
    for problem, best in problems()[:4]:
        found = graph.build(problem)
        bound = graph.estimate(found)
        bins = 8192, 8192, problem.max_epochs
        log = bucket.run(cells.arrays(found, bound, 1.05 * best, bins))
        plan = pact.replay(problem, cells.trace(found, log, int(log.best)))
        np.testing.assert_allclose(plan.joules, best, rtol=1e-6)


@pytest.mark.parametrize("solver", ["bucket", "grid"])
def test_frontiers_are_monotone_and_reached(solver):
    problem, best = problems()[0]
    losses, deadlines, joules = pact.frontier(problem, solver, (64, 64))
    assert joules.shape == (len(losses), len(deadlines))
    finite = np.isfinite(joules)
    assert finite.any() and np.all(np.diff(losses) < 0)
    up = np.where(finite, joules, 1e300)
    assert np.all(np.diff(up, axis=0) >= 0)  # lower losses cost more
    assert np.all(np.diff(up, axis=1) <= 0)  # later deadlines cost less
    if solver == "bucket":
        assert joules[-1, -1] < 1.1 * best
    assert np.all(joules[-1] >= best * (1 - 1e-5))
    # A point in the middle is no cheaper than the optimum for its own targets.
    i, j = np.argwhere(finite & (joules > 0))[len(np.argwhere(finite)) // 3]
    middle = problem.with_target(max_loss=float(losses[i]), deadline_s=deadlines[j])
    found = exact.labels(graph.build(middle))
    assert joules[i, j] >= pact.replay(middle, found.choices).joules * (1 - 1e-5)


def test_a_batch_of_problems_is_solved_as_one_by_one():
    problem, best = problems()[1]
    found = graph.build(problem)
    bound = graph.estimate(found)
    uppers = best * np.array([1.001, 1.2, 1.5])
    bins = 256, 16, 1
    singles = [cells.arrays(found, bound, u, bins) for u in uppers]
    stacked = jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *singles)
    solve = functools.partial(cells.solve, capacity=1 << 14)
    together = jax.vmap(
        functools.partial(solve, axis_name="problems"), axis_name="problems"
    )(stacked)
    for i, a in enumerate(singles):
        alone = solve(a)
        assert int(alone.count) == int(together.count[i])
        n = int(alone.count)
        np.testing.assert_array_equal(alone.parent[:n], together.parent[i, :n])
        np.testing.assert_allclose(alone.cost[:n], together.cost[i, :n], rtol=1e-6)


def test_plans_of_a_batch_are_as_good_as_single_ones():
    chosen = [p for p, _ in problems()[:5]]
    met = chosen[0].with_target(max_loss=chosen[0].start_loss)
    never = chosen[1].with_target(deadline_s=1e-3 * chosen[1].deadline_s)
    before = bucket._solve_batch._cache_size()
    *plans, of_met, of_never = pact.plan_batch([*chosen, met, never])
    assert bucket._solve_batch._cache_size() == before + 1  # one program for all
    assert of_met.steps == () and of_never is None
    for problem, plan, (_, best) in zip(chosen, plans, problems(), strict=False):
        assert pact.feasible(problem, plan)
        assert best * (1 - 1e-9) <= plan.joules <= 1.03 * best
        assert 0 < plan.lower_bound_j <= best * (1 + 1e-9)
    assert pact.plan_batch([]) == []
    with pytest.raises(ValueError, match="equally many versions"):
        pact.plan_batch([chosen[0], small(1, 3, 3, 12)])


def test_a_full_log_stays_true():
    """What had no room is dropped; the labels that are there can be traced back."""
    problem, best = problems()[0]
    found = graph.build(problem)
    bound = graph.estimate(found)
    a = cells.arrays(found, bound, 3 * best, (8192, 1024, 1))
    a = a._replace(upper=np.float32(np.inf))
    log = jax.device_get(cells.solve(a, 64, improve=False))
    assert log.full and log.count > 64
    for i in range(1, int(log.count)):
        plan = pact.replay(problem, cells.trace(found, log, i))
        joules = log.cost[i] * bound.energy_unit_j
        np.testing.assert_allclose(plan.joules, joules, rtol=1e-5)


def test_no_second_compilation_for_another_resolution_or_target():
    problem, best = problems()[2]
    found = graph.build(problem)
    bound = graph.estimate(found)
    bucket.run(cells.arrays(found, bound, best * 1.1, (256, 16, 1)))
    size = cells.solve._cache_size()
    bucket.run(cells.arrays(found, bound, best * 1.3, (1024, 4, 2)))
    assert cells.solve._cache_size() == size
