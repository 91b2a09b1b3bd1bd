"""The command line: what goes to stdout and to stderr, exit codes, and that failures write nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner, Result

import graphzip as gz
from graphzip.commands import cli
from graphzip.formats.huggingface import ADVICE
from graphzip.plan.passes import PASS_OPTIONS
from graphzip_passes.base import PASSES

ROOT = Path(__file__).resolve().parents[2]
NETWORK = """
import torch
from torch import nn

print("this file prints when it is imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def net():
    return Net()


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def broken():
    raise RuntimeError("no such layer")
"""

Run = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return f"{path}:net"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text("version: 1\ninputs: [[2, 3, 8, 8]]\npasses:\n  - cluster_merge: {keep: 0.5}\n")
    return path


@pytest.fixture
def run() -> Run:
    runner = CliRunner()

    def invoke(*arguments: object) -> Result:
        return runner.invoke(cli.app, [str(argument) for argument in arguments])

    return invoke


def folder_of(model: str) -> set[str]:
    """The names of the files beside the model's source."""
    return {path.name for path in Path(model.rpartition(":")[0]).parent.iterdir() if path.name != "__pycache__"}


# ------------------------------------------------------------------------------------------------- inspect


def test_inspect(run: Run, model: str) -> None:
    result = run("inspect", model, "--input", "1x3x8x8")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["group", "channels", "producers", "consumers", "mergeable"]
    assert lines[2].split() == ["body.0", "8", "body.0", "body.3", "yes,", "exact"]
    assert lines[3].split() == ["body.3", "6", "body.3", "head", "yes,", "exact"]
    assert lines[4].split()[:4] == ["head", "5", "head", "no:"]
    assert lines[-1].startswith("2 of 3 groups can shrink: 73.7 % of the channels, ")


def test_stdout_is_for_data(run: Run, model: str) -> None:
    result = run("inspect", model, "--input", "1x3x8x8", "--json")
    assert json.loads(result.stdout)
    assert "this file prints when it is imported" in result.stderr


def test_inspect_json(run: Run, model: str) -> None:
    result = run("inspect", model, "--input", "2x3x8x8", "--json")
    groups = json.loads(result.stdout)["groups"]
    assert [(group["name"], group["size"], group["mergeable"]) for group in groups] == [
        ("body.0", 8, True),
        ("body.3", 6, True),
        ("head", 5, False),
    ]


def test_inspect_a_submodule(run: Run, model: str) -> None:
    result = run("inspect", model, "--input", "1x3x8x8", "--scope", "body", "--json")
    names = [group["name"] for group in json.loads(result.stdout)["groups"]]
    assert names == ["body.0", "body.3"]


def test_inspect_explains_and_draws(run: Run, model: str, tmp_path: Path) -> None:
    options = ["--input", "1x3x8x8", "--explain", "body.0"]
    result = run("inspect", model, *options, "--graph", str(tmp_path / "groups.svg"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("body.0: ")
    assert "makes the channels (body.0.weight" in result.stdout
    assert (tmp_path / "groups.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert json.loads(run("inspect", model, *options, "--json").stdout)["group"] == "body.0"


def test_inspect_needs_no_input_for_torchvision(run: Run) -> None:
    pytest.importorskip("torchvision")
    result = run("inspect", "torchvision:squeezenet1_1")
    assert result.exit_code == 0, result.stderr
    assert "features.3.squeeze" in result.stdout


def test_the_script_in_tools_is_the_same_command(run: Run, model: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "inspect_groups.py"), model, "--input", "1x3x8x8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == run("inspect", model, "--input", "1x3x8x8").stdout


# ------------------------------------------------------------------------------------------------- compile


def test_compile(run: Run, model: str, plan: Path, tmp_path: Path) -> None:
    result = run("compile", model, "--plan", plan, "-o", tmp_path / "slim.onnx", "--save", tmp_path / "slim.gz")
    assert result.exit_code == 0, result.stderr
    assert onnx.load(tmp_path / "slim.onnx").graph.input[0].type.tensor_type.shape.dim[1].dim_value == 3
    assert gz.load(tmp_path / "slim.gz").module(torch.zeros(4, 3, 8, 8)).shape == (4, 5)
    assert "body.0" in result.stdout
    assert f"{tmp_path / 'slim.onnx'}: " in result.stdout
    assert f"{tmp_path / 'slim.gz'}: the trainable module; read it with graphzip.load" in result.stdout


def test_minimize(run: Run, model: str, tmp_path: Path) -> None:
    from graphzip.commands.models import load_model

    out = tmp_path / "slim.onnx"
    result = run("minimize", model, "-o", out, "--input", "2x3x8x8")
    assert result.exit_code == 4
    assert "the plan changes nothing" in result.stderr
    assert not out.exists()
    source = load_model(model)
    with torch.no_grad():
        source.head.weight[:, 1:] = 0.0
    torch.save(source.state_dict(), tmp_path / "w.pt")
    result = run("minimize", model, "-o", out, "--input", "2x3x8x8", "--weights", tmp_path / "w.pt", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["report"]["lossless"] is True
    assert data["export"]["verified"] is True
    assert data["report"]["after"]["params"] < data["report"]["before"]["params"]


def test_compile_json(run: Run, model: str, plan: Path, tmp_path: Path) -> None:
    result = run("compile", model, "--plan", plan, "-o", tmp_path / "slim.onnx", "--opset", 18, "--json")
    data = json.loads(result.stdout)
    assert data["report"]["changed"] is True
    assert data["report"]["after"]["params"] < data["report"]["before"]["params"]
    assert data["export"]["opset"] == 18
    assert data["export"]["path"] == str(tmp_path / "slim.onnx")
    assert data["saved"] is None


def test_input_option_goes_before_the_plan(run: Run, model: str, plan: Path, tmp_path: Path) -> None:
    plan.write_text("version: 1\ninputs: [[2, 7, 8, 8]]\npasses: [cluster_merge]\n")
    result = run("compile", model, "--plan", plan, "-o", tmp_path / "slim.onnx", "--input", "2x3x9x9")
    assert result.exit_code == 0, result.stderr


def test_weights_are_loaded(run: Run, model: str, plan: Path, tmp_path: Path) -> None:
    from graphzip.commands.models import load_model

    source = load_model(model)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    plan.write_text("version: 1\ninputs: [[2, 3, 8, 8]]\npasses: [fold_batch_norm]\n")
    out = tmp_path / "slim.onnx"
    assert run("compile", model, "--plan", plan, "-o", out, "--weights", tmp_path / "w.pt").exit_code == 0
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(out).graph.initializer}
    assert (stored["head.bias"] == source.head.bias.detach().numpy()).all()


def test_same_seed_same_file(run: Run, model: str, plan: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("compile", model, "--plan", plan, "-o", tmp_path / f"{name}.onnx", "--seed", seed)
    first, again, other = ((tmp_path / f"{name}.onnx").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_nothing_changed(run: Run, model: str, plan: Path, tmp_path: Path) -> None:
    plan.write_text("version: 1\ninputs: [[2, 3, 8, 8]]\npasses: [cluster_merge: {keep: 1.0}]\n")
    before = folder_of(model)
    result = run("compile", model, "--plan", plan, "-o", tmp_path / "slim.onnx", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["report"]["changed"] is False
    assert f"graphzip: the plan changes nothing in {model}; nothing was written" in result.stderr
    assert folder_of(model) == before


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["keras:net", "--input", "1x3"], 2, "'keras:net' is not a model: 'keras' is not torchvision, timm or a .py"),
        (["{folder}/network.py:nets", "--input", "1x3"], 2, "network.py has no function 'nets'; it has Net, net, "),
        (["{model}"], 2, "what net takes is not known; give the shape of every input: --input 1x3x224x224"),
        (["{model}", "--input", "1,3"], 2, "'1,3' is not an input shape; write 1x3x224x224"),
        (["{model}", "--input", "2x7x8x8"], 2, "Net itself fails on the example inputs"),
        (
            ["{model}", "--input", "2x3x8x8", "--scope", "bodi"],
            2,
            "network.py:net has no submodule 'bodi'; did you mean 'body'",
        ),
        (["{model}", "--input", "2x3x8x8", "--weights", "{folder}/w.pt"], 2, "w.pt does not exist or is not a file"),
        (
            ["{model}", "--input", "2x3x8x8", "--explain", "bodi.0"],
            2,
            "no channel group 'bodi.0'; did you mean 'body.0'",
        ),
        (["{model}", "--input", "2x3x8x8", "--graph", "{folder}/groups.txt"], 2, "groups.txt is no picture"),
        (["{folder}/network.py:broken", "--input", "1x3"], 1, "could not be built: RuntimeError: no such layer"),
        (["{folder}/network.py:Undecided", "--input", "2x3"], 1, "network.py:{line}"),
    ],
)
def test_inspect_fails(run: Run, model: str, arguments: list[str], code: int, message: str) -> None:
    folder = Path(model).parent
    line = NETWORK.splitlines().index("        return x if x.sum() > 0 else -x") + 1
    result = run("inspect", *[argument.format(model=model, folder=folder) for argument in arguments])
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert message.format(line=line) in result.stderr
    assert "graphzip: error: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "plan_text", "code", "message"),
    [
        ({"--plan": "no.yaml"}, None, 2, "no.yaml: cannot be read: No such file or directory"),
        ({}, "version: 1\npasses: [prune]\n", 2, "plan.yaml: passes[0].prune: unknown pass; "),
        ({}, "version: 1\npasses: [cluster_merge: {keep: 1.5}]\n", 2, "passes[0].cluster_merge.keep: 1.5 is out of"),
        ({}, "version: 1\npasses: [cluster_merge: {keep: {bodi.0: 0.5}}]\n", 2, "body.0"),
        ({"-o": "no/slim.onnx"}, None, 2, "the directory no does not exist; create it first"),
        ({"--save": "no/slim.gz"}, None, 2, "the directory no does not exist; create it first"),
        ({"--save": "slim.onnx"}, None, 2, "--output and --save both name slim.onnx"),
        ({"--weights": "plan.yaml"}, None, 2, "plan.yaml is not a weights file"),
        ({"--input": "2x3x2x2"}, None, 2, "Net itself fails on the example inputs"),
    ],
)
def test_compile_fails_and_writes_nothing(
    run: Run,
    model: str,
    plan: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    plan_text: str | None,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(plan.parent)
    if plan_text is not None:
        plan.write_text(plan_text)
    before = folder_of(model)
    given = {"--plan": "plan.yaml", "-o": "slim.onnx", "--input": "2x3x8x8", **options}
    result = run("compile", model, *[word for pair in given.items() for word in pair])
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert message in result.stderr
    assert "graphzip: error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert folder_of(model) == before


OWN_PASS = """
import graphzip as gz


class Zero(gz.PassOptions):
    kind = "zero"
    names: tuple[str, ...] = ("head.bias",)


@gz.register_pass(Zero)
def zero(traced, options, context):
    for name in options.names:
        traced.module.get_parameter(name).detach().zero_()
    table = gz.Table(("parameter", "is"), [(name, "zero") for name in options.names])
    return gz.Outcome(traced, changed=True, lossless=False, tables=(table,), details={"names": list(options.names)})
"""


@pytest.mark.parametrize("where", ["the file of the model", "a file that is imported"])
def test_a_pass_of_ones_own(run: Run, model: str, plan: Path, where: str) -> None:
    folder = plan.parent
    plan.write_text("version: 1\ninputs: [[2, 3, 8, 8]]\npasses:\n  - zero: {names: [head.weight]}\n")
    options: list[Any] = []
    if where == "the file of the model":
        (folder / "network.py").write_text(NETWORK + OWN_PASS)
    else:
        (folder / "own.py").write_text(OWN_PASS)
        options = ["--import", folder / "own.py"]
    try:
        slim, saved = folder / "slim.onnx", folder / "slim.graphzip"
        result = run("compile", model, "--plan", plan, "-o", slim, "--save", saved, *options)
        assert result.exit_code == 0, result.stderr
        assert ["head.weight", "zero"] in [line.split() for line in result.stdout.splitlines()]
        assert not gz.load(saved).module.get_parameter("head.weight").any()
    finally:
        del PASSES[PASS_OPTIONS.pop("zero")]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 2, "--import: {file} does not exist or is not a file"),
        ("1 / 0", 2, "--import: {file} cannot be imported: ZeroDivisionError"),
        ("", 2, "passes[0].zero: unknown pass; there are: 'cluster_merge'"),
    ],
)
def test_a_pass_of_ones_own_that_is_not_there(
    run: Run, model: str, plan: Path, text: str | None, code: int, message: str
) -> None:
    file = plan.parent / "own.py"
    if text is not None:
        file.write_text(text)
    plan.write_text("version: 1\npasses: [zero]\n")
    result = run("compile", model, "--plan", plan, "-o", plan.parent / "slim.onnx", "--import", file)
    assert result.exit_code == code, result.stderr
    assert message.format(file=file) in result.stderr
    assert not (plan.parent / "slim.onnx").exists()


@pytest.mark.parametrize("command", ["plan", "compile"])
def test_missing_option_is_wrong_usage(run: Run, model: str, command: str) -> None:
    result = run(command, model, "--macs", 0.5)
    assert result.exit_code == 2
    assert "Missing option" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give a budget, --macs, --params, --bytes or --latency; got none"),
        (["compile"], "give a budget, --macs, --params, --bytes or --latency; got none"),
        (
            ["plan", "--macs", 0.5, "--latency", 9],
            "--latency is met by measuring, alone; leave it out, or leave out --macs",
        ),
        (["compile", "--plan", "p.yaml", "--macs", 0.5], "--plan and a budget are both given; a plan has its widths"),
        (["plan", "--macs", 1e-9, "--input", "2x3x8x8"], "macs: 1e-09 is out of reach"),
        (
            ["plan", "--macs", 0.5, "--input", "2x3x8x8", "--calibration", "no.npz"],
            "cannot be read as calibration data",
        ),
    ],
)
def test_a_budget_that_makes_no_sense(
    run: Run, model: str, tmp_path: Path, arguments: list[object], message: str
) -> None:
    command, *rest = arguments
    result = run(command, model, "-o", tmp_path / "out", *rest)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_budget_becomes_a_plan_and_a_model(run: Run, model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((96, 3, 8, 8), np.float32))
    budget = ["--macs", 0.6, "--input", "2x3x8x8", "--calibration", tmp_path / "data.npz"]
    result = run("plan", model, *budget, "-o", tmp_path / "plan.yaml", "--plot", tmp_path / "plan.svg")
    assert result.exit_code == 0, result.stderr
    plan = gz.Plan.load(tmp_path / "plan.yaml")
    written, _, card = result.stdout.partition("\n#")
    assert written.strip() == (tmp_path / "plan.yaml").read_text().strip()
    assert "MACs per sample" in card
    assert all(line.startswith("#") for line in card.splitlines()[1:])
    assert plan.to_dict()["passes"][0]["cluster_merge"]["compensate"] == "data"
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    result = run("compile", model, *budget, "-o", tmp_path / "slim.onnx", "--tune", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    assert (report["tuning"]["samples"], report["tuning"]["held_out"]) == (84, 12)


def test_widths_keep_to_what_is_asked_of_them(run: Run, model: str, tmp_path: Path) -> None:
    asked = ["--macs", 0.6, "--input", "2x3x8x8", "--effort", "fast", "--uniform", "-o", tmp_path / "plan.yaml"]
    result = run("plan", model, *asked, "--target", "arm", "--min-width", 4)
    assert result.exit_code == 0, result.stderr
    widths = set(gz.Plan.load(tmp_path / "plan.yaml").to_dict()["passes"][0]["cluster_merge"]["keep"].values())
    assert widths <= {4, 6, 8}  # some groups are whole
    result = run("plan", model, *asked, "--target", "arm", "--round-to", 8)
    assert result.exit_code == 2
    assert "--round-to: what widths are multiples of is said by target too; leave one of them out" in result.stderr
    result = run("compile", model, "--plan", tmp_path / "plan.yaml", "-o", tmp_path / "slim.onnx", "--min-width", 8)
    assert result.exit_code == 2
    assert "--min-width is for widths that are found for a budget, and --plan has its own" in result.stderr


def test_tuning_needs_data(run: Run, model: str, tmp_path: Path) -> None:
    result = run("compile", model, "--macs", 0.6, "--input", "2x3x8x8", "-o", tmp_path / "slim.onnx", "--tune")
    assert result.exit_code == 2, result.stderr
    assert "--tune needs calibration data: give --calibration, or leave --tune out" in result.stderr


def test_calibration_data_needs_the_same_samples_for_every_input(run: Run, model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3, 8, 8)), y=np.zeros(3))
    result = run(
        "plan",
        model,
        "--macs",
        0.5,
        "--calibration",
        tmp_path / "data.npz",
        "-o",
        tmp_path / "p.yaml",
        "--input",
        "2x3x8x8",
    )
    assert result.exit_code == 2
    assert "holds arrays of [3, 4] samples; give one array per input, all with the same samples" in result.stderr


def test_missing_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = run("inspect", "torchvision:resnet18")
    assert result.exit_code == 1
    assert 'run: pip install "graphzip[models]"' in result.stderr


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(gz, "channel_groups", fail)
    monkeypatch.setattr(gz, "compile", fail)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (gz.VerificationError("outputs differ"), 3, "graphzip: error: outputs differ\n"),
        (gz.ExportError("no such opset"), 1, "graphzip: error: no such opset\n"),
        (
            gz.ArchiveError(f"the config cannot say it; {ADVICE}"),
            1,
            "graphzip: error: the config cannot say it; save it as one file (--save slim.graphzip, or a target that "
            "ends in '.graphzip'), or find widths that a config can say with --macs and --uniform\n",
        ),
        (KeyboardInterrupt(), 130, "graphzip: interrupted\n"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "graphzip: error: the model's code fails with ZeroDivisionError: division by zero; "
            "run again with -v to see where\n",
        ),
    ],
)
def test_exit_codes(
    run: Run,
    model: str,
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    fails_with(monkeypatch, error)
    result = run("compile", model, "--plan", plan, "-o", tmp_path / "slim.onnx")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.endswith(message)
    assert "Traceback" not in result.stderr


def test_a_fault_of_graphzip_is_said_to_be_one(
    run: Run, model: str, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gz, "compile", int)
    result = run("compile", model, "--plan", plan, "-o", tmp_path / "slim.onnx")
    assert result.exit_code == 1
    assert "error: unexpected TypeError: " in result.stderr
    assert result.stderr.endswith("; a fault of graphzip, run again with -v to see where\n")


def test_verbose_shows_where_an_error_came_from(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, gz.ExportError("no such opset"))
    result = run("inspect", model, "--input", "1x3x8x8", "-v")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("graphzip: error: no such opset\n")


@pytest.mark.parametrize(
    ("flags", "shown", "warned"),
    [([], {"warning"}, 0), (["-v"], {"warning", "info"}, 1), (["-vv"], {"warning", "info", "debug"}, 1)],
)
def test_logs_go_to_stderr(
    run: Run,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    flags: list[str],
    shown: set[str],
    warned: int,
) -> None:
    def groups(*_: Any, **__: Any) -> str:
        log = logging.getLogger("graphzip.test")
        log.debug("said: debug")
        log.info("said: info")
        log.warning("said: warning")
        warnings.warn("careful", stacklevel=1)
        return "the groups"

    monkeypatch.setattr(gz, "channel_groups", groups)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    result = run("inspect", model, "--input", "1x3x8x8", *flags)
    assert result.stdout == "the groups\n"
    assert {word for word in ("debug", "info", "warning") if f"said: {word}" in result.stderr} == shown
    assert len([warning for warning in recwarn if str(warning.message) == "careful"]) == warned
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


def test_interrupt_outside_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "graphzip: interrupted\n"


# ------------------------------------------------------------------------------------------------- help


def test_version() -> None:
    command = [sys.executable, "-m", "graphzip", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"graphzip {gz.__version__}\n"


@pytest.mark.parametrize("command", ["inspect", "compile", "demo"])
def test_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--verbose" in result.stdout


def test_unknown_command(run: Run) -> None:
    result = run("prune")
    assert result.exit_code == 2
    assert "No such command 'prune'" in result.stderr
