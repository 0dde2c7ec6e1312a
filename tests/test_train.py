"""The training loop: records, checkpoints, resumption, mappings."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from gcjax import checkpoint, results, train


@pytest.fixture(autouse=True)
def standard_promotion():
    """The optax schedules mix integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def config():
    config = base.get_config()
    config.experiment = "test"
    config.aggregator = "compressed_mean(top_k((0.003, 0.01)), spacing=2.0)"
    config.steps = 6
    config.every = 2
    config.batch_size_per_worker = 4
    config.eval_every = 0
    config.log_every = 2
    return config


LGRECO = "lgreco(default=0.01, solver='dp')"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def final_state(config, method, workdir, monkeypatch):
    """Trains and returns the record and the state of the last step."""
    seen = {}
    finish = train.Log.evaluate

    def spy(self, task, state):
        seen["state"] = jax.device_get(state)
        return finish(self, task, state)

    monkeypatch.setattr(train.Log, "evaluate", spy)
    record = train.train(config, method, workdir)
    return record, seen["state"]


def test_killed_and_resumed_is_bit_identical(config, tmp_path, monkeypatch):
    """Errors, momentum, levels, snapshot and the bits counted so far all come back."""
    config.aggregator = (
        "compressed_mean(top_k((0.003, 0.01)), spacing=2.0, momentum=0.9)"
    )
    config.checkpoint_every = 3
    whole, expected = final_state(config, LGRECO, tmp_path / "whole", monkeypatch)

    kill_at, run_step = 5, train.worker_step
    del run_step
    real_build = train.build

    def dying(config, method):
        run = real_build(config, method)

        def step(state, batch):
            if int(state.step) == kill_at:
                raise KeyboardInterrupt
            return run.step(state, batch)

        return run._replace(step=step)

    monkeypatch.setattr(train, "build", dying)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, LGRECO, tmp_path / "cut")
    assert json.loads((tmp_path / "cut/record.json").read_text())["status"] == "failed"
    monkeypatch.setattr(train, "build", real_build)
    config.resume = True
    resumed, state = final_state(config, LGRECO, tmp_path / "cut", monkeypatch)
    same(state, expected)
    assert resumed["final"] == whole["final"]
    assert resumed["series"] == whole["series"]
    lines = (tmp_path / "cut/metrics.jsonl").read_text()
    assert lines == (tmp_path / "whole/metrics.jsonl").read_text()


def test_other_number_of_workers_keeps_the_mean_error(config, tmp_path, capsys):
    config.checkpoint_every = 3
    config.steps = 4
    train.train(config, LGRECO, tmp_path)
    config.num_workers = 2
    config.batch_size_per_worker = 16
    run = train.build(config, LGRECO)
    record = results.new_record(config, LGRECO)
    train.describe(run, config, record)
    saver = checkpoint.Saver(
        tmp_path / "checkpoints", train.Log(config, record).identity()
    )
    state, _ = saver.restore(run.state, run.specs)
    saver.close()
    assert "8 workers, this run 2" in capsys.readouterr().out
    error = state.opt_state[0].worker.value.error
    assert error.shape[0] == 2
    saved = state.params  # restored with it
    assert not np.array_equal(jax.tree.leaves(saved)[0], 0)
    config.resume = True
    assert train.train(config, LGRECO, tmp_path)["status"] == "done"


@pytest.mark.parametrize(("old", "new"), [(8, 2), (8, 3), (2, 8), (1, 4)])
def test_fold_keeps_the_mean(old, new):
    x = jax.random.normal(jax.random.key(0), (old, 5))
    folded = checkpoint.fold(x, new)
    assert folded.shape == (new, 5)
    np.testing.assert_allclose(folded.mean(0), x.mean(0), rtol=0, atol=1e-6)


def test_checkpoint_of_another_run_is_named(config, tmp_path):
    config.checkpoint_every = 2
    config.steps = 3
    train.train(config, "uniform(0.01)", tmp_path)
    config.resume = True
    config.aggregator = "compressed_mean(top_k((0.01, 0.1)), spacing=1.5)"
    with pytest.raises(ValueError, match="of another run: its aggregator is") as caught:
        train.train(config, "uniform(0.01)", tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_named(config, tmp_path):
    config.checkpoint_every = 2
    config.steps = 3
    train.train(config, "uniform(0.01)", tmp_path)
    step = tmp_path / "checkpoints" / "2"
    shutil.rmtree(step / "state")
    config.resume = True
    with pytest.raises(ValueError, match="damaged or incomplete") as caught:
        train.train(config, "uniform(0.01)", tmp_path)
    assert "\n" not in str(caught.value)
    assert step.exists(), "a damaged checkpoint is not deleted"


def test_devices_give_what_simulation_gives(config, tmp_path, monkeypatch):
    """Five whole steps under vmap and shard_map; no stochastic rounding."""
    config.steps = 5
    _, simulated = final_state(config, LGRECO, tmp_path / "a", monkeypatch)
    config.mapping = "devices"
    _, devices = final_state(config, LGRECO, tmp_path / "b", monkeypatch)
    for a, b in zip(
        jax.tree.leaves(simulated.params), jax.tree.leaves(devices.params), strict=True
    ):
        # Rounding of the dense mean, carried through five steps of training.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_micro_batches_give_the_same_step(config, tmp_path, monkeypatch):
    """Accumulated before the one exchange: as many bits, the same parameters."""
    config.steps = 2
    one, a = final_state(config, "dense", tmp_path / "a", monkeypatch)
    config.micro_batches = 2
    two, b = final_state(config, "dense", tmp_path / "b", monkeypatch)
    assert one["final"]["total_bits"] == two["final"]["total_bits"]
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_record_counts_bits(config, tmp_path):
    """A dense run sends 2 (N - 1) / N words per parameter, a flag and the loss."""
    record = train.train(config, "dense", tmp_path)
    assert record == json.loads(json.dumps(record))
    written = results.read(tmp_path / "record.json")
    final, words = written["final"], record["num_params"] + 2
    assert written["status"] == "done" and written["schema"] == results.SCHEMA
    assert final["payload_bits"] == 6 * 32 * words
    assert final["wire_bits"] == final["total_bits"] == 6 * 32 * words * 2 * 7 / 8
    assert final["bits_per_step"] == final["total_bits"] / 6
    assert final["compression_ratio"] == pytest.approx(1, abs=1e-3)
    assert final["compression_ratio_bf16"] == pytest.approx(0.5, abs=1e-3)
    assert 0 <= final["accuracy"] <= 1


def test_a_loss_that_is_not_finite_is_recorded_as_diverged(config, tmp_path):
    config.learning_rate = 1e30
    config.lr_schedule = "constant"
    record = train.train(config, "dense", tmp_path)
    assert results.read(tmp_path / "record.json")["status"] == "diverged"
    assert record["final"]["steps"] < config.steps


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("optimizer", "adagrad", "config.optimizer"),
        ("lr_schedule", "steps", "config.lr_schedule"),
        ("mapping", "magic", "config.mapping"),
        ("num_workers", 0, "num_workers"),
        ("micro_batches", 3, "micro_batches"),
        ("aggregator", "compressed_mean(top_k(0))", r"density: must be in \(0, 1\]"),
        ("aggregator", "compressed_mean(topk())", "unknown name topk"),
        ("aggregator", "__import__('os')", "unknown name __import__"),
        ("aggregator", "compressed_mean(top_k(ratio=0.1))", "ratio"),
        ("task", "image_classification('imagenet', 'small_cnn')", "imagenet"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config, field, value, cause, tmp_path):
    with config.unlocked():
        config[field] = value
    with pytest.raises(ValueError, match=cause) as caught:
        train.train(config, "uniform(0.01)", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_data_set_says_what_to_put_where(config, tmp_path, monkeypatch):
    monkeypatch.delenv("GCJAX_DATA", raising=False)
    config.task = "language_model('wikitext2')"
    config.data_dir = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="wikitext2") as caught:
        train.train(config, "dense", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_model_state_is_averaged_and_counted(config):
    """Batch statistics of all workers are shared; their words are counted."""
    from gcjax import exchange, tasks
    from gcjax.compressors import quantize

    def loss(params, model_state, batch, key):
        del key
        state = {"mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(batch["x"], 0)}
        return jnp.sum(params["w"] * jnp.mean(batch["x"], 0)), state

    task = tasks.Task(None, loss, None, None, "accuracy")
    tx = exchange.compressed_mean(quantize.identity())
    params = {"w": jnp.ones(3)}
    state = train.RunState(
        params, tx.init(params), {"mean": jnp.zeros(3)}, jnp.int32(0)
    )
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    step = jax.vmap(
        lambda b: train.worker_step(task, tx, config, None, state, b),
        axis_name="workers",
        out_axes=(None, None),
    )
    new, metrics = step({"x": x})
    np.testing.assert_allclose(
        new.model_state["mean"], 0.1 * x.mean((0, 1)), rtol=0, atol=1e-6
    )
    assert (
        int(metrics.words.reduced) == 3 + 1 + 3 + 1
    )  # gradient, flag, statistics, loss


@pytest.mark.parametrize("local_steps", [0, 2])
def test_a_parameter_server_weights_workers_and_counts_uploads(
    config, tmp_path, local_steps
):
    config.task = "image_classification('digits', 'logistic')"
    config.split = "skewed(arithmetic(10))"
    config.aggregator, config.num_workers = "parameter_server()", 4
    config.local_steps = local_steps
    record = train.train(config, "power_rule(0.05, 1.0)", tmp_path)
    assert sum(record["weights"]) == pytest.approx(1)
    assert record["weights"][0] == pytest.approx(10 * record["weights"][3], rel=0.02)
    assert np.sum(record["profile"]) == 1437 and len(record["profile"]) == 4
    uploads = record["final"]["upload_bits"]
    assert sorted(uploads, reverse=True) == uploads and uploads[0] > 5 * uploads[3]
    each = 32 * (record["num_params"] + 1)  # the flag of finite gradients
    assert record["final"]["download_bits"] == config.steps * each


def test_local_steps_send_the_change_of_the_weights(config, tmp_path):
    """One local step of rate r and a server's rate of 1 are one step of rate r."""
    config.task = "image_classification('digits', 'logistic')"
    config.split = "skewed(arithmetic(10))"
    config.aggregator, config.num_workers = "parameter_server()", 4
    config.momentum, config.lr_schedule = 0.0, "constant"
    config.learning_rate = 0.05
    plain = train.train(config, "uniform(0.05)", tmp_path / "plain")
    config.local_steps, config.local_learning_rate = 1, 0.05
    config.learning_rate = 1.0
    local = train.train(config, "uniform(0.05)", tmp_path / "local")
    np.testing.assert_allclose(
        plain["series"]["loss"], local["series"]["loss"], rtol=1e-5
    )
