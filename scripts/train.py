"""Trains what a config describes and writes one record for each of its methods.

Configs with nodes are plans, which are made and carried out; see gcjax.pact.execution.

python scripts/train.py --config=configs/quickstart.py --config.learning_rate=0.05

As one of several processes, one worker on each device of all of them, so that
num_workers must be their number. By scripts/launch.py on one machine; under Slurm, with
one task for each GPU, where JAX finds the other processes by itself,

srun --ntasks=8 --gpus-per-node=4 python scripts/train.py \
    --config=configs/quickstart.py --config.num_workers=8

or by hand, with the same command for each process but --process_id,

python scripts/train.py --config=configs/quickstart.py --config.num_workers=2 \
    --coordinator=node0:29500 --num_processes=2 --process_id=0

The first process writes the record; checkpoints need a folder that all processes see.
"""

import sys
from pathlib import Path

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

# Configs import each other as `configs.base`, wherever the command is given.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import cluster, command, report, results  # noqa: E402
from gcjax.pact import execution, outcomes  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for records; default: workdir/<experiment>."
)


COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port where the first of several processes listens."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")


def main() -> None:
    """Runs all methods of the config, alone or as one of several processes."""
    config, given = CONFIG.value, (COORDINATOR, PROCESS_ID, NUM_PROCESSES)
    with cluster.process(*(flag.value for flag in given)) as several:
        if several:
            config.mapping = "processes"
        run(config)


def run(config: ml_collections.ConfigDict) -> None:
    """Runs all methods of the config, one after the other."""
    workdir = Path(WORKDIR.value or Path("workdir") / config.experiment)
    records = []
    for method in config.methods:
        folder = workdir
        if len(config.methods) > 1:
            folder = workdir / results.slug(results.label(config, method))
        records.append(execution.trainer_for(config)(config, method, folder))
    if jax.process_index() > 0:
        return
    if "nodes" in config:
        print(outcomes.summary(records))
        return
    print(report.summary(records))
    if len(records) > 1:
        report.run_figure(records, workdir / "figure.png")
    print(f"records and figure in {workdir}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
