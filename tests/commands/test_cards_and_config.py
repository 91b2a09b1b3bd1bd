"""What commands measure and how they are told: labels, scores, `--keep`, `--config`, reports as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import graphzip as gz
from graphzip.commands import cli
from graphzip.commands.ranks import device_here

NETWORK = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def other():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3))


def score(module):
    return float(module(torch.ones(1, 3, 8, 8)).shape[1])
"""

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "network.py").write_text(NETWORK)
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.standard_normal((24, 3, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def load_network() -> torch.nn.Module:
    from graphzip.commands.models import load_model

    return load_model("network.py:net")


def classes(folder: Path, seed: int = 0) -> np.ndarray:
    """What the network with the weights of the seed says of the data."""
    torch.manual_seed(seed)
    model = load_network().eval()
    return model(torch.from_numpy(np.load(folder / "x.npy"))).argmax(1).numpy()


def test_labels_put_accuracy_on_the_card(run: Run, folder: Path) -> None:
    np.save(folder / "y.npy", classes(folder))
    options = ["--input", "2x3x8x8", "--calibration", "x.npy", "--labels", "y.npy", "--keep", "0.5"]
    result = run("compile", "network.py:net", *options, "-o", "slim.onnx", "--save", "slim.graphzip", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    assert report["scores"]["title"] == "accuracy (24 samples)"
    assert report["scores"]["values"]["before"] == 1.0
    module = gz.load(folder / "slim.graphzip").module
    right = module(torch.from_numpy(np.load(folder / "x.npy"))).argmax(1).numpy() == classes(folder)
    assert report["scores"]["values"]["after"] == pytest.approx(right.mean())
    assert [each["name"] for each in report["card"]["figures"]] == ["before", "after"]
    assert report["card"]["figures"][1]["params"] == report["after"]["params"] == 4 * 27 + 4 + 16 + 4
    assert report["origin"]["plan"]["passes"][0]["cluster_merge"]["keep"] == {"*": 0.5}

    small = run("quantize", "slim.graphzip", "--calibration", "x.npy", "--labels", "y.npy", "-o", "int8.onnx", "--json")
    assert small.exit_code == 0, small.stderr
    report = json.loads(small.stdout)["report"]
    session = gz.OnnxModule(folder / "int8.onnx")
    right = session(torch.from_numpy(np.load(folder / "x.npy"))).argmax(1).numpy() == classes(folder)
    assert report["scores"]["values"]["int8"] == pytest.approx(right.mean())
    assert [each["name"] for each in report["card"]["figures"]] == ["float", "int8"]

    page = run("report", "slim.graphzip", "-o", "report.html")
    assert page.exit_code == 0, page.stderr
    assert "latency, batch 1" in page.stdout
    text = (folder / "report.html").read_text(encoding="utf-8")
    seen = Page()
    seen.feed(text)
    for said in ("accuracy (24 samples)", "100.00 %", "8 → 4", "slim.onnx", "cluster_merge", gz.__version__):
        assert said in seen.text
    assert not seen.links
    assert "http" not in text.replace("http-equiv", "")


class Page(HTMLParser):
    """The text of a page, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.links, self.within = "", [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--labels", "y.npy"], "--labels: they are of the samples of --calibration, which is not given"),
        (["--labels", "y.npy", "--calibration", "x.npy"], "a class index for each of the 24 samples of --calibration"),
        (["--labels", "z.npy", "--calibration", "x.npy"], "--labels: z.npy has (24, 3, 8, 8) of float32"),
        (["--labels", "none.npy", "--calibration", "x.npy"], "--labels: none.npy cannot be read"),
        (["--evaluate", "network.py:nothing"], "--evaluate: network.py has no function 'nothing'"),
        (["--evaluate", "no_such_module:f"], "--evaluate: 'no_such_module' cannot be imported"),
        (["--evaluate", "score"], "--evaluate: 'score' is no function; write module:function"),
        (["--keep", "half"], "--keep: 'half' is no width"),
        (["--macs", "0.5"], "--keep and a budget are both given"),
        (["--distill", "1"], "--distill needs calibration data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_judged_is_refused(run: Run, folder: Path, options: list[str], said: str) -> None:
    np.save(folder / "y.npy", np.zeros(23, dtype=np.int64))
    np.save(folder / "z.npy", np.load(folder / "x.npy"))
    result = run("compile", "network.py:net", "--input", "2x3x8x8", "--keep", "0.5", "-o", "slim.onnx", *options)
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr
    assert not (folder / "slim.onnx").exists()


def test_a_config_holds_any_option_and_the_command_line_goes_before(run: Run, folder: Path) -> None:
    lines = ["model: network.py:net", "input: 2x3x8x8", "keep: ['0=0.5']", "output: slim.onnx"]
    config = "\n".join([*lines, "evaluate: network.py:score", "card: false"])
    (folder / "config.yaml").write_text(config)
    result = run("compile", "--config", "config.yaml", "--keep", "0=2", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["report"]
    assert [(group["before"], group["after"]) for group in found["groups"]] == [(8, 2)]
    assert found["scores"] == {"title": "score", "values": {"before": 4.0, "after": 4.0}, "share": False, "tasks": {}}
    assert found["card"] is None
    (folder / "config.yaml").write_text("keeps: 0.5\n")
    refused = run("compile", "--config", "config.yaml")
    assert refused.exit_code == 2
    assert "'keeps' is no option of this command; did you mean 'keep'?" in " ".join(refused.stderr.split())


def test_a_plan_comes_with_its_card_as_comments(run: Run, folder: Path) -> None:
    options = ["--input", "2x3x8x8", "--macs", "0.5", "--exclude", "4", "-o", "plan.yaml"]
    result = run("plan", "network.py:net", *options)
    assert result.exit_code == 0, result.stderr
    (folder / "shown.yaml").write_text(result.stdout)
    assert gz.Plan.load(folder / "shown.yaml") == gz.Plan.load(folder / "plan.yaml")
    assert "\n# latency, batch 1" in result.stdout
    assert gz.Plan.load(folder / "plan.yaml").passes[0].exclude == ("4",)  # type: ignore[attr-defined]


def test_models_side_by_side_share_nothing(run: Run, folder: Path) -> None:
    inputs = ["--input", "a=2x3x8x8", "--input", "b=2x3x8x8"]
    models = ["a=network.py:net", "b=network.py:other"]
    result = run("zip", *models, *inputs, "--share", "0", "-o", "both.onnx", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["export"]["verified"]
    assert sorted(found["export"]["inputs"]) == ["a_input", "b_input"]
    params = 8 * 28 + 4 * 9 + 6 * 193 + 3 * 7
    assert found["report"]["before"]["params"] == found["report"]["after"]["params"] == params
    assert found["report"]["lossless"]
    for wrong, said in (
        (["a=network.py:net"], "give several models by name"),
        (["network.py:net", "b=network.py:net"], "'network.py:net' has no name"),
        ([*models, "--input", "c=1x3"], "--input: there is no model 'c'; there are a, b"),
        ([*models, "--calibration", "a=x.npy"], "--calibration: 'b' has none; give all or none"),
    ):
        refused = run("zip", *wrong, "-o", "no.onnx")
        assert (refused.exit_code, (folder / "no.onnx").exists()) == (2, False)
        assert said in refused.stderr


def test_two_models_are_zipped_into_one(run: Run, folder: Path) -> None:
    options = [option for name in "ab" for option in ("--input", f"{name}=2x3x8x8", "--calibration", f"{name}=x.npy")]
    models = ["a=network.py:net", "b=network.py:net"]
    result = run("zip", *models, *options, "--share", "1", "-o", "joint.onnx", "--json", "--no-card")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    assert report["after"]["params"] < report["before"]["params"] == 2 * (8 * 28 + 4 * 9)


def test_checkpoints_of_several_models(run: Run, folder: Path) -> None:
    torch.manual_seed(5)
    state = load_network().state_dict()
    torch.save({"model": state, "ema": {name: 2 * value for name, value in state.items()}}, folder / "both.pt")
    torch.save(state, folder / "one.pt")
    models = ["a=network.py:net", "b=network.py:net", "--input", "a=2x3x8x8", "--input", "b=2x3x8x8"]
    common = ["zip", *models, "--share", "0", "-o", "joint.onnx", "--save", "joint.graphzip", "--no-card"]
    weights = ["--weights", "a=both.pt", "--weights", "b=one.pt"]
    assert "which one is meant with --weights-key" in run(*common, *weights).stderr
    result = run(*common, *weights, "--weights-key", "a=ema")
    assert result.exit_code == 0, result.stderr
    joint = gz.load(folder / "joint.graphzip")
    one, two = (next(joint.task(name).parameters()) for name in "ab")
    assert torch.equal(one, 2 * two)


def test_labels_of_several_models_are_on_the_card(run: Run, folder: Path) -> None:
    np.save(folder / "y.npy", classes(folder))
    models = ["a=network.py:net", "b=network.py:net"]
    data = [option for name in "ab" for option in ("--input", f"{name}=2x3x8x8", "--calibration", f"{name}=x.npy")]
    common = ["zip", *models, *data, "--share", "0", "-o", "joint.onnx"]
    result = run(*common, "--labels", "a=y.npy", "--labels", "b=y.npy")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert any(row[:2] == ["accuracy,", "a"] and row[2:6] == ["100.00", "%", "100.00", "%"] for row in rows)
    assert any(row[:2] == ["accuracy,", "b"] for row in rows)
    assert max(map(len, result.stdout.splitlines()[:12])) <= 80
    scored = run(*common, "--evaluate", "b=network.py:score", "--json", "--no-card")
    scores = json.loads(scored.stdout)["report"]["scores"]
    assert scores["tasks"] == {"b": {"before": 4.0, "after": 4.0}}
    for wrong, said in (
        (["--labels", "a=y.npy", "--evaluate", "b=network.py:score"], "--labels and --evaluate are both given"),
        (["--labels", "y.npy"], "--labels: 'y.npy' has no name"),
        (["--labels", "c=y.npy"], "--labels: there is no model 'c'; there are a, b"),
        (["--labels", "a=x.npy"], "--labels: x.npy has (24, 3, 8, 8) of float32"),
    ):
        refused = run(*common, *wrong)
        assert refused.exit_code == 2
        assert said in refused.stderr
    alone = run("zip", *models, *data[:2], *data[4:6], "--share", "0", "-o", "joint.onnx", "--labels", "a=y.npy")
    assert "--labels: they are of the samples of --calibration, which is not given" in alone.stderr


def test_doctor_schema_and_bench(run: Run, folder: Path) -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["graphzip"] == gz.__version__
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert "CPUExecutionProvider" in found["providers of onnxruntime"]
    schema = json.loads(run("schema").stdout)
    kinds = schema["properties"]["passes"]["items"]["anyOf"][0]["enum"]
    assert {"cluster_merge", "zip", "minimize"} <= set(kinds)
    result = run("bench", "network.py:net", "--input", "2x3x8x8", "--batch", "3", "--json")
    assert result.exit_code == 0, result.stderr
    (figures,) = json.loads(result.stdout)["figures"]
    assert (figures["name"], figures["params"]) == ("network.py:net", 8 * 28 + 4 * 9)
    assert [each["batch"] for each in figures["latencies"]] == [3]


@pytest.mark.parametrize(
    "command",
    [
        *("inspect", "plan", "compile", "report", "zip", "share", "factorize", "quantize"),
        *("minimize", "bench", "doctor", "schema"),
    ],
)
def test_every_help_has_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"graphzip {command}" in result.stdout.partition("Examples:")[2]


def test_a_device_is_where_data_is_run(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(folder / "y.npy", classes(folder))
    options = ["--input", "2x3x8x8", "--calibration", "x.npy", "--labels", "y.npy", "--macs", "0.7"]
    files = []
    for place in ([], ["--device", "cpu"]):
        result = run("compile", "network.py:net", *options, "--no-card", "-o", "slim.onnx", *place)
        assert result.exit_code == 0, result.stderr
        files.append((folder / "slim.onnx").read_bytes())
    assert files[0] == files[1]
    for command in ("plan", "compile"):
        result = run(command, "network.py:net", *options, "-o", "none", "--device", "fast")
        assert result.exit_code == 2
        assert "--device: 'fast' is no device; write 'cuda', 'cuda:1' or 'cpu'" in result.stderr
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_here("cuda") == "cuda"
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (device_here("cuda"), device_here("cuda:0"), device_here(None)) == ("cuda:1", "cuda:0", None)
