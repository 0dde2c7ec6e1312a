"""Baselines keep to their rules and are never below the optimum; scripts run."""

import itertools
import sys
from pathlib import Path

import pytest
from pact_cases import small

from gcjax import pact, report
from gcjax.pact import exact

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pact_plan  # noqa: E402
import pact_study  # noqa: E402


@pytest.mark.parametrize("name", pact.BASELINES)
def test_baselines_are_feasible_and_never_below_the_optimum(name):
    found = 0
    for seed in range(900, 930):
        problem = small(seed, 2, 2, 4)
        plan = pact.BASELINES[name](problem)
        if plan is None or not plan.steps:
            continue
        found += 1
        assert pact.feasible(problem, plan)
        assert plan.joules >= exact.brute_force(problem).joules * (1 - 1e-9)
        versions = [step.version for step in plan.steps]
        switches = sum(a != b for a, b in itertools.pairwise(versions))
        if name in ("static", "no compression", "prune at start"):
            assert len({step[:3] for step in plan.steps}) == 1
        if name == "no compression":
            assert set(versions) == {"v0"}
        if name == "one switch":
            assert switches <= 1
    assert found > 0


def test_static_is_the_best_of_all_static_plans():
    for seed in range(900, 910):
        problem = small(seed, 2, 2, 4)
        tables = pact.tabulate(problem)
        best = []
        shape = tables.energy_j.shape
        for m, a, count in itertools.product(
            range(shape[0]), range(shape[2]), range(1, problem.max_epochs + 1)
        ):
            try:
                plan = pact.replay(problem, [(m, a)] * count, tables)
            except ValueError:  # impossible
                continue
            if pact.feasible(problem, plan):
                best.append(plan.joules)
        found = pact.BASELINES["static"](problem)
        assert (found.joules if found else None) == (
            pytest.approx(min(best)) if best else None
        )


def test_the_example_config_plans_and_prints():
    config = report.load_config_file(ROOT / "configs" / "pact_tiers.py").get_config()
    problem = pact.from_config(config)
    plan = pact.plan(problem)
    assert pact.feasible(problem, plan)
    assert plan.joules < pact.BASELINES["static"](problem).joules
    lines = pact_plan.text(plan).splitlines()
    assert len({step.cluster for step in plan.steps}) > 1 and len(lines) > 3


def test_choices_of_a_plan_replay_to_the_plan():
    config = report.load_config_file(ROOT / "configs" / "pact_tiers.py").get_config()
    problem = pact.from_config(config)
    plan = pact.BASELINES["one switch"](problem)
    tables = pact.tabulate(problem)
    choices = pact_study.choices_of(problem, tables, plan)
    assert pact.replay(problem, choices, tables).steps == plan.steps


def test_scenarios_vary_and_wrong_predictors_stay_legal():
    for kind in pact.KINDS:
        problem = pact.scenario(kind, 3, 6, 10, 0)
        tables = pact.tabulate(problem)
        there = tables.possible[0, 0]
        rates = tables.seconds[0, 0][there] / tables.progress[0, 0][there]
        joules = tables.energy_j[0, 0][there] / tables.progress[0, 0][there]
        # The fastest action is not the most frugal one.
        assert rates.argmin() != joules.argmin()
        wrong = pact.perturbed(problem, 0.2, 1)
        assert wrong.versions != problem.versions
        assert pact.perturbed(problem, 0.0, 1) == problem
    with pytest.raises(ValueError, match="kind must be one of"):
        pact.scenario("magic", 3, 6, 10, 0)
