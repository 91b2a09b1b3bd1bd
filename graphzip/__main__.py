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


if __name__ == "__main__":
    main()
