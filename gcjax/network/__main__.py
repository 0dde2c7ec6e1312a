"""Prints which aggregators pay for a config's model, on which network."""

import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

# Configs import each other as `configs.base`; they lie beside the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gcjax import command, experiment, network  # noqa: E402
from gcjax.network import measure, survey  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
LINK = flags.DEFINE_enum("link", None, list(network.LINKS), "One link; default: all.")
NUM_WORKERS = flags.DEFINE_integer("num_workers", None, "Default: the config's.")
COMPUTE_SECONDS = flags.DEFINE_float(
    "compute_seconds", None, "Of a step without exchange; default: measured here."
)


def main() -> None:
    """Measures the codecs for the config's model and prints the table."""
    config = CONFIG.value
    n = config.num_workers if NUM_WORKERS.value is None else NUM_WORKERS.value
    if n < 2:
        raise ValueError(f"num_workers must be >= 2, got {n}: alone, nothing is sent")
    links = network.LINKS
    if LINK.value is not None:
        links = {LINK.value: network.LINKS[LINK.value]}
    task = experiment.build_task(config)
    compute = COMPUTE_SECONDS.value
    if compute is None:
        compute = survey.compute_seconds(config, task)
    params, _ = jax.eval_shape(task.init, jax.random.key(config.seed))
    size = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{size:,} parameters, {n} workers, {1e3 * compute:.1f} ms of computation on "
        f"{jax.devices()[0].device_kind}"
    )
    codecs = {
        name: measure.measure_codec(made, params, n, axis_name=experiment.AXIS)
        for name, made in survey.aggregators(config, task).items()
    }
    print(survey.table(codecs, n, links, compute))
    print(
        "Step times are predicted, nothing overlapping; in parentheses where dense "
        "bf16 is faster.\nBandwidths at the latency of "
        f"{LINK.value or '1gbit'}. Adaptive methods at their default level, without "
        "selections."
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
