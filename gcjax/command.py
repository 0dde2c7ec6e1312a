"""What all scripts share: flags parsed, and bad input told in one line."""

import sys
from collections.abc import Callable

from absl import app, logging


def run(main: Callable[..., None], takes_words: bool = False) -> None:
    """Parses the command line and calls `main`.

    With `takes_words` main gets the words after the flags, or after --. Unknown
    fields, bad values and missing files end the program with one line that names the
    cause, and exit status 1.
    """

    def start(argv: list[str]) -> None:
        if len(argv) > 1 and not takes_words:
            raise app.UsageError(f"what does {argv[1]!r} mean? Flags start with --")
        logging.set_verbosity(logging.WARNING)  # JAX tells of backends it looked for
        main(*([argv[1:]] if takes_words else []))

    try:
        app.run(start, flags_parser=_parse)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # from ml_collections, over several lines
        sys.exit(f"error: no such field: {' '.join(str(error).split())}")
