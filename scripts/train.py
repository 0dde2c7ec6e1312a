"""Trains what a config describes and writes one record for each of its methods.

python scripts/train.py --config=configs/quickstart.py --config.learning_rate=0.05
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

# Configs import each other as `configs.base`, wherever the command is given.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, report, results, train  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for records; default: workdir/<experiment>."
)


def main() -> None:
    """Runs all methods of the config, one after the other."""
    config = CONFIG.value
    workdir = Path(WORKDIR.value or Path("workdir") / config.experiment)
    records = []
    for method in config.methods:
        folder = workdir
        if len(config.methods) > 1:
            folder = workdir / results.slug(results.label(config, method))
        records.append(train.train(config, method, folder))
    print(report.summary(records))
    if len(records) > 1:
        report.run_figure(records, workdir / "figure.png")
    print(f"records and figure in {workdir}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
