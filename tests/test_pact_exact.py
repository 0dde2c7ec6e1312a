"""Exact solvers: brute force agrees, laws of monotonicity, proofs of infeasibility."""

import dataclasses

import numpy as np
import pytest
from conftest import slow
from pact_cases import small

from gcjax import pact
from gcjax.pact import exact, graph, labels

# Planning takes longer without optimisations.
pytestmark = pytest.mark.usefixtures("optimised")


def optimum(problem, filtered=True):
    """Joules of labels without the bucket's help; None where infeasible is proved."""
    if problem.start_loss <= problem.max_loss:
        return 0.0
    found = exact.labels(graph.build(problem, filtered))
    assert found.complete
    if found.choices is None:
        return None
    plan = pact.replay(problem, found.choices)
    assert pact.feasible(problem, plan)
    np.testing.assert_allclose(plan.joules, found.lower_j, rtol=1e-9)
    return plan.joules


def agrees(problem):
    """Whether brute force finds a plan; labels find one as good, or none either."""
    best, found = exact.brute_force(problem), optimum(problem)
    assert (best is None) == (found is None)
    if best is not None:
        np.testing.assert_allclose(found, best.joules, rtol=1e-9)
    return best is not None


@pytest.mark.parametrize("block", range(8))
def test_labels_agree_with_brute_force(block):
    feasible = 0
    for seed in range(30 * block, 30 * block + 30):
        versions = 1 + seed % 3  # few shapes, so that few programs are compiled
        feasible += agrees(small(seed, versions, 2, 3 if versions == 3 else 4))
    assert 5 < feasible < 30


def test_labels_agree_with_brute_force_where_many_places_compete():
    assert sum(agrees(small(seed, 2, 4, 3)) for seed in range(240, 264)) > 5


def test_labels_agree_with_brute_force_where_energy_is_free_somewhere():
    feasible = 0
    for seed in range(264, 276):
        problem = small(seed, 2, 2, 4)
        free = dataclasses.replace(problem.nodes[0], joules_per_flop=0.0)
        nodes = free, *problem.nodes[1:]
        feasible += agrees(dataclasses.replace(problem, nodes=nodes))
    assert feasible > 3


@pytest.fixture(scope="module")
def many():
    """A problem of a few hundred labels, and its optimum."""
    problem = pact.scenario("slow storage", 3, 5, 24, 1)
    longest = pact.BASELINES["static"](problem.with_target(max_loss=0.8)).seconds
    problem = problem.with_target(max_loss=0.8, deadline_s=0.5 * longest)
    found = exact.labels(graph.build(problem))
    assert found.complete and found.labels > 200
    return problem, found


@pytest.mark.parametrize("batch, pairwise", [(1, 1), (7, 3), (10**9, 10**9)])
def test_batches_never_change_the_optimum(many, monkeypatch, batch, pairwise):
    """One label at a time is label setting as in the books."""
    problem, expected = many
    monkeypatch.setattr(labels, "_BATCH", batch)
    monkeypatch.setattr(labels, "_PAIRWISE", pairwise)
    found = exact.labels(graph.build(problem))
    assert found.complete
    np.testing.assert_allclose(found.lower_j, expected.lower_j, rtol=1e-9)


def test_a_search_that_is_stopped_gives_a_lower_bound(many):
    problem, expected = many
    found = exact.labels(graph.build(problem), limit_s=0.0)
    assert not found.complete and found.labels < expected.labels
    assert 0 < found.lower_j <= expected.lower_j * (1 + 1e-9)


def test_dropped_actions_never_change_the_optimum():
    dropped = 0
    for seed in range(300, 320):
        problem = small(seed, 2, 3, 4)
        kept, every = graph.build(problem), graph.build(problem, filtered=False)
        dropped += np.isfinite(every.energy_j).sum() - np.isfinite(kept.energy_j).sum()
        found, reference = optimum(problem), optimum(problem, filtered=False)
        assert (found is None) == (reference is None)
        if found is not None:
            np.testing.assert_allclose(found, reference, rtol=1e-9)
    assert dropped > 20


def joules_or_inf(problem):
    found = optimum(problem)
    return np.inf if found is None else found


@pytest.mark.parametrize("seed", range(400, 406))
def test_looser_targets_and_more_epochs_never_cost_more(seed):
    problem = small(seed, 2, 2, 5)
    here = joules_or_inf(problem)
    looser = (
        problem.with_target(max_loss=problem.max_loss * 1.1),
        problem.with_target(deadline_s=problem.deadline_s * 1.3),
        problem.with_target(max_epochs=problem.max_epochs + 1),
    )
    for other in looser:
        assert joules_or_inf(other) <= here * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(410, 416))
def test_fewer_actions_never_cost_less(seed):
    problem = small(seed, 3, 2, 4)
    here = joules_or_inf(problem)
    without_switch = dataclasses.replace(problem, switches=problem.switches[1:])
    without_cluster = dataclasses.replace(problem, clusters=problem.clusters[:-1])
    for other in (without_switch, without_cluster):
        assert joules_or_inf(other) >= here * (1 - 1e-9)


@pytest.mark.parametrize(
    "solver",
    ["labels", "bucket", slow("grid"), slow("cost_scaled")],
)
def test_one_version_and_one_node_count_epochs(solver):
    problem = small(0, 1, 1, 40)
    problem = dataclasses.replace(problem, data_fractions=(1.0,), max_loss=0.9)
    problem = problem.with_target(deadline_s=1e6, max_epochs=1000)
    tables = pact.tabulate(problem)
    curve = problem.versions[0].curve
    needed = float(curve.progress(0.9) - curve.progress(problem.start_loss))
    epochs = int(np.ceil(needed / tables.progress[0, 0, 0]))
    assert epochs > 5
    plan = pact.plan(problem, solver)
    # Rounding may add epochs to what works on rounded states.
    extra = {"grid": epochs, "cost_scaled": epochs}.get(solver, 0)
    assert epochs <= len(plan.steps) <= epochs + extra
    np.testing.assert_allclose(plan.joules, len(plan.steps) * tables.energy_j[0, 0, 0])


def test_infeasible_is_proved_with_the_nearest_targets():
    problem = next(p for p in (small(s) for s in range(500, 600)) if optimum(p) is None)
    with pytest.raises(pact.InfeasibleError, match="is infeasible") as caught:
        pact.plan(problem)
    error = caught.value
    if np.isfinite(error.nearest_deadline_s):
        later = problem.with_target(deadline_s=error.nearest_deadline_s * (1 + 1e-6))
        assert exact.brute_force(later) is not None
        sooner = problem.with_target(deadline_s=error.nearest_deadline_s * (1 - 1e-6))
        assert exact.brute_force(sooner) is None
    reachable = problem.with_target(max_loss=error.nearest_loss)
    assert reachable.max_loss >= problem.start_loss or exact.brute_force(reachable)
    lower = error.nearest_loss - 2e-3 * problem.start_loss
    assert exact.brute_force(problem.with_target(max_loss=lower)) is None


def test_bounds_hold_for_random_plans():
    checked = 0
    for seed in range(600, 620):
        problem = small(seed, 3, 2, 4)
        best = exact.brute_force(problem)
        bound = pact.lower_bound(problem)
        if best is None:
            continue
        checked += 1
        assert bound <= best.joules * (1 + 1e-9)
    assert checked > 5


def test_more_gradient_levels_never_cost_more():
    ones = (1.0, 1.0)
    none = pact.GradientLevel("none", ones, ones, ones)
    few = pact.GradientLevel("few", (0.1, 0.1), (0.1, 0.1), (0.95, 0.9), 0.1, 0.1)
    used = 0
    for seed in range(800, 812):
        alone = small(seed, 2, 2, 4, levels=(none,))
        # Only the cluster that exchanges gradients is left.
        alone = dataclasses.replace(
            alone, clusters=alone.clusters[2:], start_cluster="both"
        )
        alone = alone.with_target(deadline_s=5 * alone.deadline_s)
        both = dataclasses.replace(alone, gradient_levels=(none, few))
        joint, separate = exact.brute_force(both), joules_or_inf(alone)
        assert joules_or_inf(both) == pytest.approx(joint.joules if joint else np.inf)
        if joint:
            assert joint.joules <= separate * (1 + 1e-9)
            used += any(step.level == "few" for step in joint.steps)
    assert used > 0
