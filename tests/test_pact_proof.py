"""Bounds from potentials: never above the optimum, whatever the potential; tight."""

import numpy as np
import pytest
from pact_cases import small

from gcjax import pact
from gcjax.pact import exact, graph, proof


@pytest.mark.parametrize("block", range(4))
def test_no_plan_is_below_the_bound(block):
    proved = 0
    for seed in range(2000 + 20 * block, 2020 + 20 * block):
        problem = small(seed, 1 + seed % 3, 2, 4)
        best = exact.brute_force(problem)
        expanded = graph.build(problem)
        estimated = graph.estimate(expanded, 256)
        bound = proof.least_joules(expanded, estimated)
        if best is None:
            continue
        if not best.steps:
            continue
        proved += 1
        assert bound <= best.joules * (1 + 1e-9)
    assert proved > 4


def test_any_potential_is_legal():
    """Estimates that are wrong make the bound worse, never false."""
    rng = np.random.default_rng(0)
    worse = 0
    for seed in range(2100, 2116):
        problem = small(seed, 2, 2, 4)
        best = exact.brute_force(problem)
        if best is None or not best.steps:
            continue
        expanded = graph.build(problem)
        estimated = graph.estimate(expanded, 256)
        good = proof.least_joules(expanded, estimated)
        value = np.asarray(estimated.value)
        noisy = value * rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
        bad = proof.least_joules(expanded, estimated._replace(value=noisy))
        assert bad <= best.joules * (1 + 1e-9)
        worse += bad < good
    assert worse > 3


def test_bounds_are_tight_for_many_epochs():
    """Where nothing binds, multipliers lose nothing: only rounding would."""
    for kind in ("tiers", "slow storage"):
        problem = pact.scenario(kind, 3, 5, 60, 0)
        problem = problem.with_target(max_loss=0.8, max_epochs=1000)
        plan = pact.plan(problem)
        assert len(plan.steps) > 5
        lower = [pact.lower_bound(problem, bins) for bins in (128, 2048)]
        assert all(joules <= plan.joules * (1 + 1e-9) for joules in lower)
        assert 0.98 * plan.joules < lower[1]
        assert 0.98 * plan.joules < plan.lower_bound_j <= plan.joules * (1 + 1e-9)


def test_proved_completion_bounds_hold_along_optimal_plans():
    checked = 0
    for seed in range(2200, 2215):
        problem = small(seed, 3, 2, 4)
        best = exact.brute_force(problem)
        if best is None or not best.steps:
            continue
        found = graph.build(problem, filtered=False)
        bound = exact.completion(found)
        value, bins = bound.value, bound.value.shape[2] - 1
        names = [v.name for v in problem.versions], [c.name for c in problem.clusters]
        for k, step in enumerate(best.steps):
            m, c = names[0].index(step.version), names[1].index(step.cluster)
            at = float(problem.versions[m].curve.progress(step.loss))
            j = int(np.ceil(min(found.ticks(m, at) / graph.TICKS * bins, bins)))
            left = np.array(
                [
                    (best.joules - step.joules) / bound.energy_unit_j,
                    (best.seconds - step.seconds) / problem.deadline_s,
                    len(best.steps) - 1 - k,
                ]
            )
            assert np.all(value[m, c, j] <= bound.weights @ left + 1e-4)
            checked += 1
    assert checked > 10


def test_plans_of_the_default_solver_carry_a_proved_bound():
    problem = small(700, 2, 3, 12)
    problem = problem.with_target(max_loss=0.9, deadline_s=3 * problem.deadline_s)
    plan = pact.plan(problem)
    assert 0 < plan.lower_bound_j <= plan.joules * (1 + 1e-9)
    assert pact.lower_bound(problem) <= plan.joules * (1 + 1e-9)
