"""Measures what plans need to know of a model, by short real training runs.

    python scripts/pact_profile.py --config=configs/pact_fashion.py

Writes one JSON file, where the config says: curves, jumps and costs of all versions,
efficiencies of clusters and gradient levels. Plans are then carried out by
scripts/train.py, tables and figures written by scripts/report.py.
"""

import sys
from pathlib import Path

from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, results  # noqa: E402
from gcjax.pact import profiling  # noqa: E402


def main() -> None:
    """Profiles and writes the record."""
    config = CONFIG.value
    results.write(profiling.profile(config), Path(config.profile))
    print(config.profile)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
    command.run(main)
