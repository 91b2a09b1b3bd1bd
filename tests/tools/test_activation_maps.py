"""The tool that draws class activation maps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cifar_nets import CIFAR, resnet20
from torch import nn

import graphzip as gz

Image = pytest.importorskip("PIL.Image")
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "activation_maps.py"


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("activation_maps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled() -> gz.Compiled:
    torch.manual_seed(0)
    return gz.compile(resnet20().eval(), gz.Plan([gz.AtomFactorize(init="random")]), CIFAR)


def test_the_map_of_a_layer_is_its_features_weighed_by_the_class(compiled: gz.Compiled) -> None:
    x = torch.randn(1, 3, 32, 32)
    chosen, maps = tool().activation_maps(compiled.module, x, 4)
    assert chosen == 4
    assert len(maps) == 18
    assert maps["layer1.0.conv1"].shape == (32, 32)
    assert maps["layer3.2.conv2"].shape == (8, 8)
    seen: list[torch.Tensor] = []
    hook = compiled.module.get_submodule("layer3.2.conv2").register_forward_hook(lambda *args: seen.append(args[2][0]))
    with torch.no_grad():
        scores = compiled.module(x)
    hook.remove()
    weights = compiled.module.get_parameter("linear.weight").detach()[4]
    expected = (weights[:, None, None] * seen[0].relu()).sum(0)
    assert torch.allclose(maps["layer3.2.conv2"], expected, atol=1e-5)
    assert tool().activation_maps(compiled.module, x)[0] == int(scores.argmax())


def test_the_script_writes_a_picture(compiled: gz.Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model.graphzip")
    Image.effect_noise((48, 64), 80).convert("RGB").save(tmp_path / "image.png")
    command = [sys.executable, str(SCRIPT), "model.graphzip", "image.png", "-o", "maps.png", "--class", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("maps.png: class 1, layer1.0.conv1, ")
    drawn = Image.open(tmp_path / "maps.png")
    assert drawn.width > 4 * 100
    assert len(drawn.getcolors(maxcolors=drawn.width * drawn.height)) > 1000


def test_models_without_maps() -> None:
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(gz.GraphZipError, match="the model has no layers of atoms; apply AtomFactorize"):
        tool().activation_maps(resnet20(), x)
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3))
    module = gz.compile(bare, gz.Plan([gz.AtomFactorize(force=True)]), CIFAR).module
    with pytest.raises(gz.GraphZipError, match="the model has no linear layer, so no class has weights"):
        tool().activation_maps(module, x)
