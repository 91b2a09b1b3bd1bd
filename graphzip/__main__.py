"""The `graphzip` command, and `python -m graphzip`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point: Ctrl-C ends it quietly from the first import on."""
    try:
        from graphzip.commands.cli import main as run

        run()
    except KeyboardInterrupt:
        print("graphzip: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        # Python remembers an interrupt that left text under `exec`, as dataclasses run theirs, and would end
        # `python -m` by the signal whatever the exit status is, until other text is run.
        eval("None")


if __name__ == "__main__":
    main()
