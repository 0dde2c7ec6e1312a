"""Plans that are carried out: real training, honest counting, re-planning."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcjax import experiment, pact, report, results, train
from gcjax.pact import (
    compressors,
    execution,
    horizon,
    outcomes,
    predictor,
    profiling,
    training,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = report.load_config_file(ROOT / "configs" / "pact_fashion.py")
SHARES = (1.0, 0.25)
DENSE = training.UNCOMPRESSED


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        yield


# Planning takes longer without optimisations.
planning = pytest.mark.usefixtures("optimised")


def quick(model="small_cnn", **changed):
    config = CONFIG.get_config("quick")
    config.task = f"image_classification('digits', '{model}', validation_size=200)"
    config.update(changed)
    return config


def nodes_of(config):
    task, compressor = experiment.build_task(config), profiling.compressor_of(config)
    return task, compressor, training.trainer(config, task, compressor)


# --- Training on nodes. ---------------------------------------------------------------


@pytest.fixture(scope="module")
def logistic():
    return nodes_of(quick("logistic"))


def test_nodes_share_the_training_samples(logistic):
    _, _, trainer = logistic
    counts = trainer.histograms.sum(1)
    assert counts.sum() == 1_437 - 200  # digits, less the held-out ones
    np.testing.assert_allclose(counts / counts.sum(), (0.4, 0.35, 0.25), atol=1e-3)


def test_a_cluster_averages_gradients_by_the_samples_of_its_members(logistic):
    """Uncompressed: SGD on the mean of the members' gradients, by hand."""
    task, _, trainer = logistic
    config, seen, rounds = quick("logistic"), np.zeros(3, int), 24
    params = task.init(jax.random.key(0))[0]
    done = trainer.epoch(params, (0, 2), 1.0, rounds, DENSE, seen)
    sizes = trainer.histograms.sum(1)[[0, 2]]
    own = np.round(sizes / rounds).astype(int)
    assert own[0] > own[1] > 0
    assert done.samples == tuple(own * rounds) and done.rounds == rounds
    tx = optax.sgd(config.learning_rate)
    gradient = jax.jit(jax.grad(lambda p, x: task.loss(p, {}, x, None)[0]))
    at, state, (a, b) = params, tx.init(params), sizes / sizes.sum()
    first, second = (task.batches(config.seed, 3, int(n)) for n in own)
    for i in range(rounds):
        x, y = first(i), second(i)
        x, y = ({k: v[n] for k, v in z.items()} for z, n in ((x, 0), (y, 2)))
        mean = lambda g, h: np.float32(a) * g + np.float32(b) * h
        grads = jax.tree.map(mean, gradient(at, x), gradient(at, y))
        updates, state = tx.update(grads, state)
        at = optax.apply_updates(at, updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, done.params, at)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, params, at))
    assert float(moved) > 0.1


def test_bits_are_those_that_the_aggregator_declares(logistic):
    task, _, trainer = logistic
    params, seen = task.init(jax.random.key(0))[0], np.zeros(3, int)
    size = sum(x.size for x in jax.tree.leaves(params))
    found = {}
    for method in ("dense", "uniform(0.01)"):
        done = trainer.epoch(params, (0, 1), 0.5, 40, {"method": method}, seen)
        assert done.rounds == 20
        assert done.up_bits[0] == done.down_bits[0] == 0  # the coordinator's own
        found[method] = done.up_bits[1] / done.rounds
        # Values of all, and whether all gradients are finite.
        assert done.down_bits[1] == done.rounds * 32 * (size + 1)
    assert 32 * size < found["dense"] < 1.2 * 32 * size
    assert 6 * 32 < found["uniform(0.01)"] < 0.1 * found["dense"]
    level = {"method": "dense", "aggregator": "parameter_server(download=qsgd(8))"}
    done = trainer.epoch(params, (0, 1), 0.1, 40, level, seen)
    # So few entries, and scales for each tensor.
    assert 8 * size < done.down_bits[1] / done.rounds < 0.5 * 32 * size


def test_an_epoch_alone_goes_on_where_the_last_one_stopped(logistic):
    task, _, trainer = logistic
    params, size = task.init(jax.random.key(0))[0], 25
    first = trainer.epoch(params, (1,), 0.5, 1, DENSE, np.array([0, 0, 0]))
    steps = first.samples[0] // size
    assert steps == round(0.5 * trainer.histograms[1].sum() / size)
    seen = np.array([0, first.samples[0], 0])
    second = trainer.epoch(first.params, (1,), 0.5, 1, "dense", seen)
    batches = task.batches(0, 3, size)
    rows = lambda i: {k: v[1] for k, v in batches(i).items()}
    expected = trainer.fit(first.params, [rows(i) for i in range(steps, 2 * steps)])
    same = jax.tree.map(
        lambda a, b: bool(jnp.array_equal(a, b)), second.params, expected
    )
    assert jax.tree.all(same)


def test_a_batch_must_fit_into_memory(logistic):
    task, _, trainer = logistic
    params = task.init(jax.random.key(0))[0]
    with pytest.raises(ValueError, match="raise rounds_per_epoch"):
        trainer.epoch(params, (0, 1), 1.0, 2, DENSE, np.zeros(3, int))


def test_removed_entries_stay_removed():
    config = quick("logistic", compressor="entries()")
    task, compressor, trainer = nodes_of(config)
    params = task.init(jax.random.key(0))[0]
    params = compressor.compress(params, params, 0.25)
    before = np.asarray(params["dense1"]["kernel"]) != 0
    for members in ((1,), (0, 1)):
        done = trainer.epoch(params, members, 0.5, 40, DENSE, np.zeros(3, int))
        after = np.asarray(done.params["dense1"]["kernel"]) != 0
        assert not (after & ~before).any() and after.sum() > 0.9 * before.sum()


# --- The predictor. -------------------------------------------------------------------


@pytest.mark.parametrize(
    "curve", [pact.PowerLaw(0.3, 40.0, 0.5), pact.Exponential(0.3, 2.0, 3e-4)]
)
def test_a_refit_finds_how_much_faster_a_run_is(curve):
    power = isinstance(curve, pact.PowerLaw)
    truth = (
        dataclasses.replace(curve, scale=curve.scale * 0.6**-curve.exponent)
        if power
        else dataclasses.replace(curve, rate=0.6 * curve.rate)
    )
    losses = [1.5]
    for _ in range(6):
        losses.append(float(pact.next_loss(truth, losses[-1], 1_000.0)))
    samples, before, after = np.full(6, 1_000.0), losses[:-1], losses[1:]
    found = predictor.refit_curve(curve, before, samples, after, 0.002)
    ahead = [float(pact.next_loss(c, losses[-1], 4e3)) for c in (found, truth, curve)]
    assert abs(ahead[0] - ahead[1]) < 0.15 * abs(ahead[2] - ahead[1])
    # One noisy epoch moves it only a little; a run as promised does not move it.
    careful = predictor.refit_curve(curve, before[:1], samples[:1], after[:1], 0.5)
    once = float(pact.next_loss(careful, losses[-1], 4e3))
    assert abs(once - ahead[2]) < 0.3 * abs(ahead[1] - ahead[2])
    promised = pact.next_loss(curve, np.array(before), 1_000.0)
    same = predictor.refit_curve(curve, before, samples, promised, 0.01)
    for name, value in dataclasses.asdict(curve).items():
        np.testing.assert_allclose(getattr(same, name), value, rtol=1e-3)
    with pytest.raises(ValueError, match="not finite"):
        predictor.refit_curve(curve, [np.nan], [1.0], [1.0], 0.1)


def test_efficiency_is_the_share_of_samples_that_counted():
    curve, before = pact.PowerLaw(0.3, 40.0, 0.5), np.array([1.2, 0.7])
    samples = np.array([5_000, 9_000])
    for share in (0.02, 0.4, 0.9):
        after = pact.next_loss(curve, before, share * samples)
        found, error = pact.fit_efficiency(curve, before, samples, after)
        assert found == pytest.approx(share, rel=5e-3) and error < 0.01
        # The early epoch decides, where the curve is steep.
        noisy = pact.fit_efficiency(curve, before, samples, after * [1.0, 1.03])
        late = pact.fit_efficiency(curve, before[1:], samples[1:], after[1:] * 1.03)
        assert abs(noisy[0] - share) < abs(late[0] - share) and noisy[1] > error
    for after, share in (([1.3, 0.8], 0.0), ([0.4, 0.35], 1.0)):
        assert pact.fit_efficiency(curve, before, samples, after)[0] == share
    assert np.isinf(pact.fit_efficiency(curve, [1.2], [5_000], [1.0])[1])
    with pytest.raises(ValueError, match="not finite"):
        pact.fit_efficiency(curve, before, samples, [np.nan, 1.0])


def test_prediction_errors_look_so_many_points_ahead():
    curve, x = pact.PowerLaw(0.3, 40.0, 0.5), np.array([1e3, 2e3, 4e3, 8e3])
    y = curve.loss(x)
    for points, count in ((1, 3), (3, 1), (5, 0), (None, 3)):
        off = profiling.prediction_errors(curve, x, y, points)
        assert len(off) == count
        np.testing.assert_allclose(off, 0, atol=1e-9)
    off = profiling.prediction_errors(curve, x, y + [0, 0, 0, 0.1], None)
    np.testing.assert_allclose(off, -0.1, atol=1e-9)


# --- Whole runs. ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A profile with counted costs and made-up curves, in the form of a real one."""
    config = quick()
    task, compressor, trainer = nodes_of(config)
    whole = task.init(jax.random.key(0))[0]
    versions, curves = [], ((0.05, 30.0), (0.15, 45.0))
    for share, (floor, scale) in zip(SHARES, curves, strict=True):
        params = compressor.compress(whole, whole, share)
        batch, tx = trainer.pooled(0), trainer.optimizer
        counted = compressors.costs(compressor, task, params, batch, tx)
        curve = dict(kind="power", floor=floor, scale=scale, exponent=0.5)
        name = profiling.version_name(share)
        versions.append(dict(name=name, share=share, curve=curve, residual=0.05))
        versions[-1]["late_residual"] = 0.04 if share == 1.0 else 0.05
        versions[-1] |= counted._asdict()
    jump = {"height": 0.4, "rate": 1.0, "top": 2.6}
    ends = {"source": versions[0]["name"], "target": versions[1]["name"]}
    ones = {"up_fraction": [1.0, 1.0], "down_fraction": [1.0, 1.0]}
    record = results.new_record(config, "profile") | {
        "versions": versions,
        "switches": [ends | {"flops": 1e5, "jump": jump}],
        "clusters": [{"name": c["name"], "efficiency": 1.0} for c in config.clusters],
        "gradient_levels": [
            {"name": g["name"], **ones, "efficiency": [1.0, 1.0]}
            for g in config.gradient_levels
        ],
        "top_loss": 2.6,
    }
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    results.write(record, path)
    return path


def alone(config):
    """Without cooperation, whose steps take longest to compile."""
    config.clusters = config.clusters[:3]
    config.gradient_levels = ()
    return config


@pytest.fixture(scope="module")
def records(profiled, tmp_path_factory):
    """A rule's plan, carried out as it is, and one that is made again each epoch."""
    made = {}
    for replan, method in ((False, "static"), (True, "plan")):
        folder = tmp_path_factory.mktemp(f"replan{replan}")
        config = alone(quick(profile=str(profiled), replan=replan, max_loss=1.4))
        made[replan] = execution.execute(config, method, folder)
        assert results.read(folder / "record.json")["status"] == "done"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == len(made[replan]["epochs"])
    return made


def test_a_plan_costs_what_it_promised(records):
    """What is priced is what was done: alike but for whole batches."""
    run = records[False]
    steps = [pact.Step(*step) for step in run["plan"]]
    assert len(run["epochs"]) == len(steps) > 1
    assert run["margin"] == 0 and run["aimed_loss"] == run["final"]["max_loss"]
    before, loss = 0.0, run["start_loss"]
    for step, epoch in zip(steps, run["epochs"], strict=True):
        assert (step.version, step.cluster) == (epoch["version"], epoch["cluster"])
        np.testing.assert_allclose(epoch["joules"], step.joules, rtol=0.05)
        np.testing.assert_allclose(epoch["seconds"], step.seconds, rtol=0.05)
        own = epoch["joules"] - before
        assert 0 < sum(epoch["node_joules"].values()) <= own * (1 + 1e-9)
        if not epoch["moved_bytes"] and epoch["loss_after_switch"] == loss:
            np.testing.assert_allclose(sum(epoch["node_joules"].values()), own)
        before, loss = epoch["joules"], epoch["loss"]


def test_a_run_switches_and_moves_for_real(records):
    """The start is the whole network at the server, which the sensor cannot hold."""
    for run in records.values():
        versions = {e["version"]: e["parameters"] for e in run["epochs"]}
        assert versions["25 %"] == 4_074
        assert versions.get("100 %", 33_546) == 33_546
        moved = [e for e in run["epochs"] if e["moved_bytes"]]
        assert moved and {e["moved_bytes"] for e in moved} <= {4 * 4_074, 4 * 33_546}
        assert run["epochs"][-1]["loss"] < run["start_loss"]
        for before, after in zip(run["epochs"], run["epochs"][1:], strict=False):
            assert after["joules"] > before["joules"]
            assert after["seconds"] > before["seconds"]
            assert after["loss_before"] == before["loss"]
            if after["version"] == before["version"]:
                assert after["loss_after_switch"] == after["loss_before"]


def test_planning_again_stops_at_the_target_or_the_end(records):
    run, config = records[True], quick()
    final, last = run["final"], run["epochs"][-1]
    assert run["epochs"][0]["how"] == "planned"
    assert {e["how"] for e in run["epochs"][1:]} <= {
        "re-planned",
        "from the profile",
        "fall-back",
    }
    reached = last["loss"] <= 1.4
    assert reached == (final["first_met"] is not None)
    assert (
        reached
        or last["seconds"] > 0.5 * config.deadline_s
        or (len(run["epochs"]) == config.max_epochs)
    )
    assert all(e["loss"] > 1.4 for e in run["epochs"][:-1])


@planning
def test_a_missed_target_is_told(profiled, tmp_path, monkeypatch):
    """Where no plan is left: the best epochs in time, until none is."""
    plans = [3, 0, 1, 0, 0]  # epochs at the gateway that each search finds

    def plan(problem, limit_s):
        if not (epochs := plans.pop(0)):
            return None
        tables = pact.tabulate(problem)
        at_gateway = (tables.destination == 1) & (tables.fraction == 1.0)
        choices = [(1, int(np.flatnonzero(at_gateway)[0]))] * epochs
        return pact.replay(problem, choices, tables)

    monkeypatch.setattr(execution, "attempt", plan)
    monkeypatch.setattr(horizon, "attempt", plan)
    config = alone(quick(profile=str(profiled), max_loss=0.9, deadline_s=2.0))
    config.max_epochs = 3
    run = execution.execute(config, "plan", tmp_path)
    final = run["final"]
    assert not final["met_in_time"] and final["first_met"] is None
    assert final["planned"]["epochs"] == len(run["epochs"]) == 3
    assert final["loss"] > 0.9
    assert [e["how"] for e in run["epochs"]] == [
        "planned",
        "from the profile",
        "fall-back",
    ]
    assert final["seconds"] <= 2.0
    assert "missed" in outcomes.summary([run])


@planning
def test_plans_with_a_margin_aim_lower(profiled, tmp_path):
    """By what the profile says; or less, where nothing reaches so low."""
    config = alone(quick(profile=str(profiled), max_loss=1.4, replan=False))
    config.max_epochs = 3
    made = {}
    for margin in (2.0, 15.0):
        config.margin = margin
        made[margin] = execution.execute(config, "plan", tmp_path)
    below, far = made.values()
    assert below["margin"] == pytest.approx(2 * 0.05)
    assert below["aimed_loss"] == pytest.approx(1.4 * 0.9)
    for run in made.values():
        assert (
            run["plan"][-1][4] <= run["aimed_loss"] <= run["final"]["max_loss"] == 1.4
        )
        assert {e["aimed_loss"] for e in run["epochs"]} == {run["aimed_loss"]}
        assert run["label"] == "plan with margin"
    assert far["margin"] == 0.75 and 1.4 * 0.25 < far["aimed_loss"] < 1.4 * 0.9
    # Training stops at the target itself.
    config.replan = True
    run = execution.execute(config, "plan", tmp_path)
    assert run["label"] == "plan again each epoch with margin"
    assert all(e["loss"] > 1.4 for e in run["epochs"][:-1])
    assert all(1.4 * 0.25 < e["aimed_loss"] <= 1.4 for e in run["epochs"])
    with pytest.raises(ValueError, match="margin goes with plans"):
        execution.execute(quick(replan=False, margin=1.0), "static", tmp_path)
    config.margin = 20.0
    with pytest.raises(ValueError, match="config.margin = 20.0 aims 100 % below"):
        execution.execute(config, "plan", tmp_path)


@planning
def test_one_way_to_plan_is_carried_out(profiled, tmp_path):
    config = alone(quick(profile=str(profiled), replan=True, max_loss=1.8))
    run = execution.execute(config, "gradients only", tmp_path)
    assert run["label"] == "gradients only again each epoch" and run["margin"] == 0
    assert {e["version"] for e in run["epochs"]} == {"100 %"}
    assert all(e["loss"] > 1.8 for e in run["epochs"][:-1])
    config.max_loss = 0.01
    for way in ("neither", "model, then gradients"):
        assert execution.execute(config, way, tmp_path)["plan"] is None


@planning
def test_without_a_plan_nothing_is_trained(profiled, tmp_path):
    config = alone(quick(profile=str(profiled), max_loss=0.16, deadline_s=1e-3))
    run = execution.execute(config, "plan", tmp_path)
    assert run["status"] == "done" and run["plan"] is None and not run["epochs"]
    assert "no plan meets the target" in outcomes.summary([run])
    with pytest.raises(ValueError, match="replan goes with plans"):
        execution.execute(config, "static", tmp_path)
    with pytest.raises(ValueError, match="config.methods may be plan, static"):
        execution.execute(config, "magic", tmp_path)
    config.profile = "nowhere.json"
    with pytest.raises(FileNotFoundError, match="scripts/pact_profile.py"):
        execution.execute(config, "plan", tmp_path)


@planning
def test_least_loss_is_the_best_epoch_in_time(profiled):
    config = alone(quick(profile=str(profiled)))
    record = results.read(profiled)
    histograms = np.full((3, 10), 40)
    problem = profiling.problem(config, record, histograms, 2.0)
    for deadline in (60.0, 0.3, 0.05):
        eased = problem.with_target(deadline_s=deadline)
        tables = pact.tabulate(eased)
        plans = []
        for m in range(2):
            for a in np.flatnonzero(tables.possible[m, 0]).tolist():
                plans.append(pact.replay(eased, [(m, a)], tables))
        plans = [p for p in plans if p.seconds <= deadline]
        found = horizon.least_loss(eased)
        assert found.loss == min(p.loss for p in plans)
        assert found.seconds <= deadline
    assert horizon.least_loss(problem.with_target(deadline_s=1e-6)) is None
    config.shares = (1.0, 0.5)
    with pytest.raises(ValueError, match="profile again"):
        profiling.problem(config, record, histograms, 2.0)


def test_a_profile_is_measured_and_can_be_planned_with(tmp_path):
    """A model of one layer, whose versions are all alike: the path, in seconds."""
    config = quick("logistic", last_samples=1_500)
    config.clusters = config.clusters[::3]
    record = profiling.profile(config, tell=lambda line: None)
    results.write(record, tmp_path / "bench_pact_profile" / "toy.json")
    record = results.read(tmp_path / "bench_pact_profile" / "toy.json")
    assert [(r["version"], r["seed"]) for r in record["runs"]] == [
        (v, s) for s in (1, 2, 3) for v in ("100 %", "25 %")
    ]
    for run in record["runs"]:
        assert run["losses"][-1] < run["losses"][0] < run["first_loss"]
    for part in record["clusters"] + record["gradient_levels"]:
        assert len(part["efficiency"]) == len(part["error"]) == 2
        assert all(0 <= share <= 1 for share in part["efficiency"])
    for version in record["versions"]:  # fitted to both seeds, not to the third
        runs = [r for r in record["runs"] if r["version"] == version["name"]][:2]
        points = [[r[k] for r in runs] for k in ("samples", "losses")]
        curve, off = pact.fit_curve(*points, config.curve)
        assert version["curve"]["floor"] == pytest.approx(curve.floor, rel=1e-5)
        late = np.sqrt(np.mean(off[:, off.shape[1] // 2 :] ** 2))
        assert version["late_residual"] == pytest.approx(late, rel=1e-5)
    switch = record["switches"][0]
    assert len(switch["before"]) == len(switch["effective"]) == 2 * config.jump_points
    levels = {g["name"]: g for g in record["gradient_levels"]}
    assert levels["top-k 10 %"]["up_fraction"][0] < 0.2
    assert levels["none"]["efficiency"] == [1.0, 1.0]
    problem = profiling.problem(config, record, np.full((3, 10), 40), 3.0)
    assert problem.start_loss == record["top_loss"]
    assert pact.tabulate(problem).possible.any((1, 2)).all()
    written = outcomes.write_report(tmp_path, tmp_path / "out")
    names = [p.name for p in written]
    assert names == ["toy_profile.md", "toy_profile.png"]
    text = written[0].read_text()
    assert "| 100 % | 1, 2 (fitted) |" in text and "| 25 % | 3 (unseen) |" in text
    assert written[1].read_bytes()[:4] == b"\x89PNG"


def test_the_report_of_runs(records, tmp_path):
    folder = tmp_path / "runs" / "bench_pact_toy"
    for replan, run in records.items():
        results.write(run, folder / f"{replan}.json")
    empty = dict(records[True], epochs=[], plan=None, label="greedy", method="greedy")
    empty["final"] = empty["final"] | {"planned": None, "first_met": None}
    results.write(empty, folder / "none.json")
    written = outcomes.write_report(tmp_path / "runs", tmp_path / "a")
    again = outcomes.write_report(tmp_path / "runs", tmp_path / "b")
    assert [p.name for p in written] == [
        "pact_toy.md",
        "pact_toy_plan_again_each_epoch.png",
    ]
    assert written[0].read_bytes() == again[0].read_bytes()
    text = written[0].read_text()
    assert "| greedy | 0 | no plan |" in text
    met = "met" if records[True]["final"]["met_in_time"] else "missed"
    assert f"| plan again each epoch | 0 | {met} |" in text
    end = records[False]["final"] | {"met_in_time": True, "loss": 1.5}
    assert (
        outcomes.table("x", [records[False] | {"final": end}]).count("then lost") == 1
    )
    # The planned total is that of the first plan's last step.
    assert f"{records[False]['plan'][-1][6]:.0f}" in text


def test_committed_tables_are_those_of_the_records(tmp_path):
    written = outcomes.write_report(ROOT / "results" / "runs", tmp_path)
    tables = [path for path in written if path.suffix == ".md"]
    assert tables
    for path in tables:
        committed = ROOT / "results" / "tables" / path.name
        same = path.read_bytes() == committed.read_bytes()
        assert same, f"run scripts/report.py: {path.name} is not up to date"


def test_the_config_and_its_sweep():
    config, module = CONFIG.get_config(), CONFIG
    assert config.experiment == "bench_pact_fashion"
    assert "Command: python scripts/train.py" in module.__doc__
    assert execution.trainer_for(config) is execution.execute
    runs = report.sweep_runs(config, module)
    assert len({results.file_name(*run) for run in runs}) == len(runs) == 66
    for one, method in runs:
        assert method == "plan" or method in pact.BASELINES and not one.replan
        assert method == "plan" or not one.margin
        assert one.seed not in (*one.profile_seeds, *one.test_seeds)
    for variant, count in (("trained", 18), ("skewed", 18), ("joint", 24)):
        module = report.load_config_file(
            ROOT / "configs" / f"pact_fashion_{variant}.py"
        )
        config = module.get_config()
        assert config.experiment == f"bench_pact_fashion_{variant}"
        runs = report.sweep_runs(config, module)
        assert len({results.file_name(*run) for run in runs}) == len(runs) == count
        assert module.get_config("quick").last_samples == 2_500
    base = report.load_config_file(ROOT / "configs" / "quickstart.py").get_config()
    assert execution.trainer_for(base) is train.train
    assert json.loads(config.to_json())["nodes"][0]["name"] == "server"
