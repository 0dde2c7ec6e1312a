"""Writes all tables and figures from the committed records, and nothing else does.

python scripts/report.py
"""

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import report  # noqa: E402


def main(argv: list[str]) -> None:
    """Writes tables and figures for every experiment that has records."""
    if len(argv) > 1:
        raise app.UsageError(f"what does {argv[1]!r} mean? Flags start with --")
    runs, out = Path(flags.FLAGS.runs), Path(flags.FLAGS.out)
    for path in report.tables(runs, out) + report.figures(runs, out):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("out", "results", "Folder of tables/ and figures/.")
    try:
        app.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
