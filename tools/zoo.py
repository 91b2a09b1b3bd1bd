"""Run models through the whole compiler, and print for each how much of it shrinks and whether that is lossless.

    python tools/zoo.py torchvision:resnet18 timm:vit_tiny_patch16_224@2x3x224x224
    python tools/zoo.py --families --out timm.jsonl              # one model of every architecture family of timm
    python tools/zoo.py --transformers
    python tools/zoo.py --wild --out wild.jsonl                  # the models of tools/wild, which lists their libraries

A model is what the command line of graphzip takes, with the shapes of its inputs after an `@` where they are not the
usual ones, or `wild:NAME`. Each runs in a process of its own with bounded time and memory. In float64, duplicates are
planted in every group that can shrink and merged; "worst" is the largest relative difference of the outputs, at two
batch sizes. The cuts are those of keep 0.5; of the models of `tools/wild` what is left is also exported and verified.
With `--out` results are appended to a file, and models that it has are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from each_model import add_options, child, main_loop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / each) for each in (".", "tests/support", "tests/support/networks", "tests")]
ASIDE = re.compile(r"\boutputs?\b|is indexed by the data")
"""Why channels stay that do not count: outputs, and the words of vocabularies, which a tied head has as outputs."""


def examine(spec: str) -> dict[str, Any]:
    """Everything about one model; raises what tracing raises, and tells what later stages refuse."""
    import torch
    from planting import assert_lossless, mergeable_share

    import graphzip as gz

    torch.manual_seed(0)
    model, inputs = _found(spec)
    times, refused = dict[str, float](), dict[str, str]()
    gz.trace(torch.nn.Linear(2, 2), (torch.randn(2, 2),))  # what is done once in a process does not count
    times["trace"], traced = _timed(lambda: gz.trace(model, inputs))
    times["analyse"], groups = _timed(lambda: gz.channel_groups(traced))
    row = {
        "channels": sum(group.size for group in groups),
        "mergeable": mergeable_share(groups, ASIDE),
        "seconds": times,
        "refused": refused,
        "pinned": _pinned(groups),
    }
    try:
        times["compile"], half = _timed(
            lambda: gz.compile(traced, gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even")]))
        )
        row["params"] = 1 - half.report.after.params / half.report.before.params
        row["macs"] = 1 - half.report.after.macs / max(half.report.before.macs, 1)
        if spec.startswith("wild:"):
            row["exported"] = _exported(half)
    except Exception as error:
        refused["export" if "macs" in row else "compile"] = _told(error)
    try:
        with _grouped_in_float64():
            lossless = assert_lossless(model, inputs, trains=False, alive=False, unused=lambda key: True)
        row["worst"] = lossless.worst
    except Exception as error:
        refused["lossless"] = _told(error)
    return row


@contextlib.contextmanager
def _grouped_in_float64() -> Iterator[None]:
    """Let experts of transformers multiply without torch's grouped product, which takes no float64."""
    experts = sys.modules.get("transformers.integrations.moe")
    if experts is None:
        yield
        return
    with mock.patch.object(experts, "_can_use_grouped_mm", return_value=False):
        yield


def _found(spec: str) -> tuple[Any, tuple[Any, ...]]:
    """The model and two samples of its inputs."""
    import torch

    from graphzip.commands.models import find_model, make_inputs, parse_shape
    from tools.wild import MODELS

    source, _, key = spec.partition(":")
    if source == "wild":
        model, shapes = MODELS[key].build().eval(), MODELS[key].inputs
        return model, make_inputs(model, [parse_shape(text) for text in shapes.split(",")])
    name, _, shapes = spec.partition("@")
    found = find_model(name)
    model = found.build().eval()
    given = tuple(parse_shape(text) for text in shapes.split(",")) if shapes else found.inputs(model)
    if given is None:
        raise SystemExit(f"{spec}: give the shapes of its inputs after an @")
    return model, tuple(torch.cat([x, x.flip(0)])[:2] for x in make_inputs(model, given))


def _pinned(groups: Any) -> list[str]:
    """Why channels stay, the reasons of most channels first."""
    why = Counter[str]()
    for group in groups:
        why[group.reason or ""] += group.size
    return [f"{count}: {reason}" for reason, count in why.most_common() if reason][:8]


def _exported(compiled: Any) -> bool | str:
    """Whether the file was verified, or what about it is not certain."""
    with tempfile.TemporaryDirectory() as folder:
        report = compiled.export(Path(folder) / "model.onnx")
    return True if report.verified else "; ".join(report.unchecked)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error) or repr(error)}"[:400]


def _timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


_SMALL = [
    "test", "atto", "femto", "pico", "nano", "zepto", "xxs", "xxtiny", "xs", "micro", "tiny", "mini", "ti", "t", "t0",
    "s0", "b0", "a0", "0", "m0", "0p5", "050", "18", "10", "26", "34", "small", "s",
]  # fmt: skip
"""What names of small models have in them, the smallest first."""


def families() -> Iterator[str]:
    """A small model of every module of timm that has any, by the looks of its name."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module, pretrained=False)
        if names:
            yield f"timm:{min(names, key=_looks_large)}"


def _looks_large(name: str) -> tuple[int, int, str]:
    parts = re.split(r"[_.\-]|(?<=[a-z])(?=\d)", name)
    return min((_SMALL.index(part) for part in parts if part in _SMALL), default=len(_SMALL)), len(name), name


def transformers() -> Iterator[str]:
    """Every model of `transformers_zoo.py`."""
    from transformers_zoo import MODELS

    for name, shapes in MODELS.items():
        yield f"{ROOT / 'tools' / 'transformers_zoo.py'}:{name}@{shapes}"


def wild() -> Iterator[str]:
    """Every model of `tools/wild`."""
    from tools.wild import MODELS

    return (f"wild:{name}" for name in MODELS)


HEADS = (
    "model",
    "channels",
    "mergeable",
    "params",
    "MACs",
    "worst",
    "file",
    "trace",
    "analyse",
    "compile",
    "refused because",
)


def cells(row: dict[str, Any]) -> list[str]:
    """What the table says of one model."""
    name = row["model"].rpartition("/")[2]
    if "error" in row:
        return [name, *[""] * 9, f"{row['error']}: {row['reason']}"]
    cuts = (f"{row[key]:.1%}" if key in row else "" for key in ("mergeable", "params", "macs"))
    worst = f"{row['worst']:.0e}" if "worst" in row else ""
    file = {True: "verified", None: ""}.get(row.get("exported"), "not certain")
    times = (f"{row['seconds'].get(stage, 0):.1f} s" for stage in ("trace", "analyse", "compile"))
    why = "; ".join(f"{stage}: {reason}" for stage, reason in row["refused"].items())
    return [name, str(row["channels"]), *cuts, worst, file, *times, why]


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per model."""
    result = Table()
    for heading in HEADS:
        words = heading in (HEADS[0], HEADS[-1])
        result.add_column(heading, **({"overflow": "fold"} if words else {"justify": "right"}))  # type: ignore[arg-type]
    for row in rows:
        result.add_row(*cells(row))
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """The same as a table of a page, without times and without what is said of failures after their kind."""
    lines = [HEADS[:7], ("---", *["---:"] * 5, "---")]
    for row in rows:
        found = cells(row)[:7]
        found[6] = row["error"] if "error" in row else found[6]
        lines.append(tuple(found))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--families", action="store_true", help="add the smallest model of every family of timm")
    parser.add_argument("--transformers", action="store_true", help="add the models of transformers_zoo.py")
    parser.add_argument("--wild", action="store_true", help="add the models of tools/wild")
    parser.add_argument("--markdown", action="store_true", help="print the table of a page")
    add_options(parser)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.child:
        return child(options, examine)
    specs = [
        *options.models,
        *(families() if options.families else ()),
        *(transformers() if options.transformers else ()),
        *(wild() if options.wild else ()),
    ]
    rows = main_loop(__file__, options, specs)
    if options.json or options.markdown:
        print(markdown(rows) if options.markdown else "\n".join(map(json.dumps, rows)))
    else:
        Console(width=160).print(table(rows))
    return 1 if any("error" in row or row["refused"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
