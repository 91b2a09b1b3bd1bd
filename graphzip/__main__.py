"""`python -m graphzip` is the `graphzip` command."""

from __future__ import annotations

from graphzip.cli import main

if __name__ == "__main__":
    main()
