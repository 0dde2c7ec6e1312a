"""Every config builds, its sweep expands, and each of its aggregators takes a step."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gcjax import experiment, report, results, train

ROOT = Path(__file__).resolve().parents[1]
# Configs of plans describe no training run.
FILES = sorted(
    p
    for p in (ROOT / "configs").glob("*.py")
    if p.stem != "__init__" and not p.stem.startswith("pact_")
)
MODULES = {p.stem: report.load_config_file(p) for p in FILES}
each_config = pytest.mark.parametrize("name", MODULES)


def adaptive_runs():
    """A quick run of L-GreCo, or an allocation, for each distinct aggregator."""
    found = {}
    for module in MODULES.values():
        if not hasattr(module, "sweep"):
            continue
        for config, method in report.sweep_runs(module.get_config("quick"), module):
            if method.startswith(("lgreco(", "dagc_r(")):
                found.setdefault(config.aggregator, (config, method))
    # Those of layers compile for a quarter of a minute each; one stands for all.
    kept = next(a for a in found if a.startswith("compressed_mean(top_k("))
    return [
        pytest.param(
            *run,
            id=f"{run[0].experiment} {results.label(*run)}",
            marks=[pytest.mark.slow] * (not name.startswith("param") and name != kept),
        )
        for name, run in found.items()
    ]


@each_config
def test_config_builds(name):
    module = MODULES[name]
    assert "Command: python scripts/" in module.__doc__
    assert f"--config=configs/{name}.py" in module.__doc__
    config, quick = module.get_config(), module.get_config("quick")
    assert config.experiment == name
    assert set(config) == set(quick) == set(MODULES["base"].get_config())
    assert {k: type(v) for k, v in quick.items()} == {
        k: type(v) for k, v in config.items()
    }


@each_config
def test_sweep_parses(name):
    module = MODULES[name]
    runs = report.sweep_runs(module.get_config(), module)
    for config, method in runs:
        p = np.full(config.num_workers, 1 / config.num_workers)
        made = experiment.build_aggregator(config, method, p)
        names = ("identity", "parameter_server ratios")
        assert made.exchange.name in names or method != "dense"
        experiment.build_optimizer(config)
    # Two runs with one name would overwrite each other's records.
    assert len({results.file_name(*run) for run in runs}) == len(runs)


@pytest.mark.parametrize("config, method", adaptive_runs())
@jax.numpy_dtype_promotion("standard")  # optax's schedules mix types
def test_quick_variant_takes_a_step(config, method):
    # Few lengths of the message buffer: most of the time is compilation.
    if not config.aggregator.startswith("parameter_server("):
        config.aggregator = config.aggregator.removesuffix(")") + ", spacing=1.5)"
    config.warmup_steps = 0
    run = train.build(config, method)
    before = jax.device_get(run.state.params)
    state, metrics = run.step(run.state, run.place(run.batches(0)))
    assert int(metrics.skipped) == 0 and np.isfinite(metrics.loss)
    dense_bits = 32 * sum(x.size for x in jax.tree.leaves(before))
    assert 0 < results.payload_bits(metrics.words) < dense_bits
    assert int(state.step) == 1


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--config.lerning_rate=0.1", "learning_rate"),
        ("--config.steps=ten", "--config.steps=ten"),
    ],
)
def test_mistakes_on_the_command_line_are_named(flag, told):
    command = [sys.executable, "scripts/train.py", "--config=configs/quickstart.py"]
    done = subprocess.run([*command, flag], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    lines = [x for x in done.stderr.split("\n") if told in x]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
