"""Begin a pass of your own: a file with its options and its function, and a test, both green at once.

    python tools/new_pass.py round_weights --folder .

writes `round_weights.py` and `test_round_weights.py`. Fill in what the function does; `graphzip compile --import
round_weights.py` knows the pass, and `pytest test_round_weights.py` says whether it still works.

    python tools/new_pass.py round_weights --built-in

writes a pass that graphzip is to bring, `passes/graphzip_passes/round_weights.py` and
`tests/passes/test_round_weights.py`, and says what to add to the table of passes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

__all__ = ["write", "write_built_in"]

ROOT = Path(__file__).resolve().parent.parent

PASS = '''"""What {name} does to a model, in a sentence. Source: the paper, its section and equation."""

from __future__ import annotations

import graphzip as gz


class {name}(gz.PassOptions):
    """What the options say, one by one. `least`: how many weights a layer has that takes part."""

    kind = "{kind}"

    least: int = 1


@gz.register_pass({name})
def {kind}(traced, options, context):
    """Change the graph and the tensors of `traced`, a `graphzip.graph.traced.Traced`; both are yours to change.

    `traced.module` is an `fx.GraphModule` with the parameters under the model's own names, trained if it was.
    Everything random comes from `context.seed`, and `context.where` begins every message.
    """
    layers = [
        name.removesuffix(".weight")
        for name, parameter in traced.module.named_parameters()
        if parameter.dim() == 2 and parameter.numel() >= options.least
    ]
    table = gz.Table(("layer", "changed"), tuple((name, "not yet") for name in layers))
    return gz.Outcome(traced, changed=bool(layers), tables=(table,), details={{"layers": layers}})
'''

TEST = '''"""{name}: what it does to a small model, in a plan file, a report and a saved model."""

from __future__ import annotations

import torch
from {kind} import {name}
from torch import nn

import graphzip as gz

INPUTS = (torch.randn(4, 6),)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_the_model_computes_what_it_should():
    model = network()
    compiled = gz.compile(model, gz.Plan([{name}()]), INPUTS)
    compiled.traced.graph.lint()
    assert compiled.report.changed
    assert set(compiled.module.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(compiled.module(*INPUTS), model(*INPUTS))


def test_it_stands_in_plan_files_reports_and_saved_models(tmp_path):
    plan = gz.Plan([{name}(least=2)])
    plan.save(tmp_path / "plan.yaml")
    assert gz.Plan.load(tmp_path / "plan.yaml") == plan
    compiled = gz.compile(network(), plan, INPUTS)
    assert compiled.report.passes == ({{"{kind}": {{"layers": ["0", "2"]}}}},)
    assert "not yet" in str(compiled.report)
    compiled.save(tmp_path / "model.graphzip")
    assert gz.load(tmp_path / "model.graphzip").report == compiled.report
    assert compiled.export(tmp_path / "model.onnx").verified
'''


IMPORTS = """from graphzip.graph.traced import Traced
from graphzip.plan.options import PassOptions
from graphzip.report.outcome import Outcome, Table
from graphzip_passes.base import PassContext, register_pass
"""


def write(kind: str, folder: Path) -> tuple[Path, Path]:
    """A pass of one's own, and its test. Raises `SystemExit` for a name that is none, and where files are there."""
    return _write(kind, folder / f"{kind}.py", folder / f"test_{kind}.py", PASS, TEST)


def write_built_in(kind: str, root: Path = ROOT) -> tuple[Path, Path]:
    """The same for a pass that graphzip brings, in the checkout `root`."""
    own = PASS.replace("import graphzip as gz\n", IMPORTS).replace("gz.", "")
    own = own.replace(
        "(traced, options, context):", "(traced: Traced, options: {name}, context: PassContext) -> Outcome:"
    )
    test = TEST.replace("from {kind} import {name}\n", "").replace("[{name}(", "[gz.{name}(")
    files = root / "passes" / "graphzip_passes" / f"{kind}.py", root / "tests" / "passes" / f"test_{kind}.py"
    return _write(kind, *files, own, test)


def _write(kind: str, pass_: Path, test: Path, *texts: str) -> tuple[Path, Path]:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
        raise SystemExit(f"{kind!r} is no name for a pass; write small letters, digits and '_': round_weights")
    name = "".join(part.capitalize() for part in kind.split("_"))
    for file in (pass_, test):
        if file.exists():
            raise SystemExit(f"{file} exists; remove it, or give the pass another name")
    for file, text in zip((pass_, test), texts, strict=True):
        file.write_text(text.format(name=name, kind=kind), encoding="utf-8")
    return pass_, test


def main() -> None:
    """Write them and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", help="name of the pass in a plan file, such as round_weights")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write the files; default: here")
    parser.add_argument("--built-in", action="store_true", help="a pass that graphzip brings, in this checkout")
    options = parser.parse_args()
    files = write_built_in(options.kind) if options.built_in else write(options.kind, options.folder)
    for file in files:
        print(file)
    if options.built_in:
        name = "".join(part.capitalize() for part in options.kind.split("_"))
        print(f'passes/graphzip_passes/registry.py lacks: "{options.kind}": "graphzip_passes.{options.kind}:{name}",')


if __name__ == "__main__":
    main()
