"""Print the channel groups of a model, from a checkout: `python tools/inspect_groups.py MODEL [options]`.

Takes the same options as `graphzip inspect`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphzip.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "inspect")
    main()
