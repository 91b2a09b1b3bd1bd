"""Programs of torch.export as models, and what is said of TorchScript."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands import cli

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def test_a_saved_program_is_compiled_under_its_names(tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    for source in (program, tmp_path / "model.pt2", str(tmp_path / "model.pt2")):
        module, inputs = gz.from_exported(source)
        torch.testing.assert_close(module(x), model(x))
        assert {name for name, _ in module.named_parameters()} == {name for name, _ in model.named_parameters()}
        compiled = gz.compile(module, HALF, inputs)
        assert dict(compiled.module.named_parameters())["0.weight"].shape[0] == 4
        assert compiled.module(torch.randn(5, 3, 8, 8)).shape == (5, 5)
    assert compiled.export(tmp_path / "slim.onnx").verified
    with pytest.raises(gz.TraceError, match=r"got an ExportedProgram; .* graphzip\.from_exported"):
        gz.compile(program, HALF, (x,))  # type: ignore[arg-type]


def test_a_program_on_the_command_line(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(net(), (torch.randn(2, 3, 8, 8),)), tmp_path / "model.pt2")
    line = f"compile {tmp_path}/model.pt2 --params 0.7 -o {tmp_path}/slim.onnx"
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "slim.onnx").exists()


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gz.ArchiveError, match="does not exist"):
        gz.from_exported(tmp_path / "none.pt2")
    torch.save(net().state_dict(), tmp_path / "weights.pt2")
    with pytest.raises(gz.ArchiveError, match=r"cannot be read as a program of torch\.export"):
        gz.from_exported(tmp_path / "weights.pt2")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of the file ran')",)


@pytest.mark.parametrize("member", ["sample_inputs", "custom_obj"])
def test_code_in_a_program_does_not_run(tmp_path: Path, member: str) -> None:
    source, made = tmp_path / "model.pt2", tmp_path / "evil.pt2"
    torch.export.save(torch.export.export(net(), (torch.randn(2, 3, 8, 8),)), source)
    evil = io.BytesIO()
    torch.save(Evil(), evil)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        for name in names:
            new.writestr(name, evil.getvalue() if member in name else old.read(name))
        assert any("sample_inputs" in name for name in names)
        if member == "custom_obj":
            new.writestr(f"{names[0].partition('/')[0]}/data/constants/custom_obj_0", pickle.dumps(Evil()))
    with pytest.raises(gz.ArchiveError):
        gz.from_exported(made)


def test_torchscript_is_refused_with_what_to_do(tmp_path: Path) -> None:
    script = torch.jit.trace(net(), torch.randn(2, 3, 8, 8))
    with pytest.raises(gz.TraceError, match=r"TorchScript, which hides .*load_state_dict\(script\.state_dict"):
        gz.compile(script, HALF, (torch.randn(2, 3, 8, 8),))
    torch.jit.save(script, tmp_path / "model.pt")
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "model.pt")])
    assert result.exit_code == 2
    assert "TorchScript hides it" in result.stderr


def test_a_part_in_torchscript_is_named_and_may_stand_beside_what_is_compiled() -> None:
    x = (torch.randn(2, 3),)
    script = torch.jit.script(nn.Linear(3, 4))
    parts = {"script": script, "own": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))}
    whole = nn.Sequential(OrderedDict(parts))
    with pytest.raises(gz.TraceError, match=r"'script' is TorchScript, which hides its source; put the nn\.Module"):
        gz.channel_groups(whole, x)
    part = gz.compile(whole, HALF, x, scope="own")
    assert part.module.get_submodule("own.0").out_features == 4
