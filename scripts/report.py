"""Writes all tables and figures from the committed records, and nothing else does.

python scripts/report.py
"""

import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, report  # noqa: E402


def main() -> None:
    """Writes tables and figures for every experiment that has records."""
    runs, out = Path(flags.FLAGS.runs), Path(flags.FLAGS.out)
    for path in report.tables(runs, out) + report.figures(runs, out):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("out", "results", "Folder of tables/ and figures/.")
    command.run(main)
