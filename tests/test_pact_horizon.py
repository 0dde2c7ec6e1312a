"""Predictors that err: what margins promise, and planning again after every epoch."""

import dataclasses
import functools

import numpy as np
import pytest
from pact_cases import small

from gcjax import pact
from gcjax.pact import exact, horizon

# Planning takes longer without optimisations.
pytestmark = pytest.mark.usefixtures("optimised")

SEEDS = range(3000, 3030)


@pytest.fixture(autouse=True)
def planner(monkeypatch):
    """The optimum by brute force: remedies must not depend on who plans."""
    monkeypatch.setattr(
        horizon, "attempt", lambda problem, _: exact.brute_force(problem)
    )


def believed(real, error, seed):
    """The problem with floors, scales and jumps off by factors in 1 +- error."""
    rng = np.random.default_rng(seed)
    off = lambda: 1 + error * rng.uniform(-1, 1)

    def curve(c):
        return dataclasses.replace(c, floor=c.floor * off(), scale=c.scale * off())

    def jump(j):
        return dataclasses.replace(j, height=j.height * off())

    change = dataclasses.replace
    return change(
        real,
        versions=tuple(change(v, curve=curve(v.curve)) for v in real.versions),
        switches=tuple(change(s, jump=jump(s.jump)) for s in real.switches),
    )


@functools.cache
def wrong():
    """(real, believed, error) where plans exist and several epochs are needed."""
    found = []
    for seed in SEEDS:
        real, error = (
            small(seed, 1 + seed % 2, 2 - seed % 2, 5),
            (0.05, 0.2)[seed % 3 > 1],
        )
        done = pact.replay(real, [(0, 0)] * 4)
        targets = dict(max_loss=done.loss * 1.002, deadline_s=1.3 * done.seconds)
        real = real.with_target(**targets)
        guess = believed(real, error, seed)
        if exact.brute_force(guess):
            found.append((real, guess, error))
    assert len(found) > 10
    return found


def test_what_is_planned_with_caution_is_reached_with_all_that_the_error_allows():
    missed = kept = 0
    for real, guess, error in wrong():
        missed += not pact.feasible(
            real, horizon.carried_out(real, exact.brute_force(guess))
        )
        plan = exact.brute_force(pact.cautious(guess, error))
        if plan:
            done = horizon.carried_out(real, plan)
            kept += 1
            assert pact.feasible(real, done)
            assert done.loss <= plan.loss * (1 + 1e-9)
    assert missed > 2 and kept > 5


def test_no_error_changes_nothing_and_impossible_ones_are_refused():
    problem = small(3000, 3, 2, 4)
    assert pact.cautious(problem, 0.0) == problem
    for error in (-0.1, 1.0):
        with pytest.raises(ValueError, match="relative error must be in"):
            pact.cautious(problem, error)


def test_caution_is_lowered_to_what_the_target_has_room_for():
    lowered = 0
    for _, guess, error in wrong():
        plan, withstood = pact.widest(guess, error, 0.0)
        assert 0 <= withstood <= error
        assert pact.feasible(pact.cautious(guess, withstood), plan)
        steps = round(8 * withstood / error)
        assert withstood == pytest.approx(error * steps / 8)
        if steps < 8:
            lowered += 1
            more = pact.cautious(guess, error * (steps + 1) / 8)
            assert exact.brute_force(more) is None
    assert lowered > 0
    never = small(3000, 2, 2, 4).with_target(deadline_s=1e-9)
    assert pact.widest(never, 0.2, 0.0) == (None, 0.0)


def test_a_margin_is_lowered_to_what_the_deadline_has_room_for():
    kept = []
    for _, guess, _ in wrong():
        plan, margin = pact.with_margin(guess, 0.2, 0.0)
        aimed = guess.with_target(max_loss=guess.max_loss * (1 - margin))
        assert pact.feasible(aimed, plan)
        kept.append(round(4 * margin / 0.2))
        assert margin == pytest.approx(0.2 * kept[-1] / 4)
        if kept[-1] < 4:
            more = guess.max_loss * (1 - 0.2 * (kept[-1] + 1) / 4)
            assert exact.brute_force(guess.with_target(max_loss=more)) is None
        same, none = pact.with_margin(guess, 0.0, 0.0)
        assert same == exact.brute_force(guess) and none == 0
    assert min(kept) < max(kept)
    never = small(3000, 2, 2, 4).with_target(deadline_s=1e-9)
    assert pact.with_margin(never, 0.2, 0.0) == (None, 0.0)
    with pytest.raises(ValueError, match="margin must be a share"):
        pact.with_margin(never, 1.0, 0.0)


def test_planning_again_with_the_right_predictor_keeps_the_optimum():
    for real, _, _ in wrong():
        done, lost = pact.follow(real, lambda _, real=real: [real], 0.0)
        best = exact.brute_force(real).joules
        assert lost == 0 and done.joules == pytest.approx(best, rel=1e-9)


def test_with_caution_some_plan_is_left_at_every_epoch():
    checked = 0
    for real, guess, error in wrong():
        sure = pact.cautious(guess, error)
        if exact.brute_force(sure) is None:
            continue
        done, lost = pact.follow(real, lambda _, sure=sure: [sure], 0.0)
        assert lost == 0 and pact.feasible(real, done)
        checked += 1
    assert checked > 5


def test_histories_hold_what_was_seen():
    real, guess, _ = next(w for w in wrong() if len(exact.brute_force(w[0]).steps) > 2)
    seen = []

    def candidates(history):
        seen.append({name: [*lines] for name, lines in history.items()})
        return [guess, real]

    done, _ = pact.follow(real, candidates, 0.0)
    curves = {v.name: v.curve for v in real.versions}
    lines = [(name, *line) for name, found in seen[-1].items() for line in found]
    assert len(lines) == len(done.steps) and not seen[0]
    for name, before, samples, after in lines:
        assert pact.next_loss(curves[name], before, samples) == pytest.approx(after)


def test_a_plan_stops_when_the_target_is_met():
    stopped = 0
    for real, guess, _ in wrong():
        whole = horizon.carried_out(real, exact.brute_force(guess))
        done = pact.until_met(real, exact.brute_force(guess))
        assert done.steps == whole.steps[: len(done.steps)]
        assert all(s.loss > real.max_loss for s in done.steps[:-1])
        assert done.loss <= real.max_loss or done.steps == whole.steps
        eased = real.with_target(max_loss=whole.steps[0].loss)
        assert len(pact.until_met(eased, whole).steps) == 1
        stopped += len(whole.steps) > 1
    assert stopped > 0


def test_where_nothing_has_a_plan_the_loss_is_brought_down():
    real = small(3000, 2, 2, 4)
    hopeless = real.with_target(max_loss=0.01)
    done, lost = pact.follow(hopeless, lambda _: [hopeless], 0.0)
    assert lost == len(done.steps) > 0 and done.loss < real.start_loss
    assert done.seconds <= real.deadline_s


def test_actions_are_found_by_their_epochs():
    ones = (1.0, 1.0)
    levels = (
        pact.GradientLevel("none", ones, ones, ones),
        pact.GradientLevel("few", (0.1, 0.1), (0.1, 0.1), (0.95, 0.9)),
    )
    problem = dataclasses.replace(
        small(3001, 2, 2, 4, levels=levels), data_fractions=(0.5, 1.0)
    )
    tables = pact.tabulate(problem)
    for a in range(len(tables.destination)):
        plan = pact.replay(problem, [(0, a), (1, a)], tables)
        choices = pact.choices_of(problem, plan.steps, tables)
        assert pact.replay(problem, choices, tables) == plan
    step = plan.steps[0]._replace(fraction=0.7)
    with pytest.raises(ValueError, match="the problem has no epoch on 0.7"):
        pact.choices_of(problem, [step], tables)
