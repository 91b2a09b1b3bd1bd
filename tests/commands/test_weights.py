"""Weights of a file in a model: what is taken is said, what is not clear is asked for, what does not fit is named."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphzip.commands.weights import load_weights
from graphzip.errors import WeightsError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def wrapped(state: dict[str, torch.Tensor], form: str) -> object:
    if form == "plain":
        return state
    if form.endswith("."):
        return {f"{form}{name}": value for name, value in state.items()}
    return {form: state, "epoch": 3}


@pytest.mark.parametrize(
    "form",
    [
        *("plain", "state_dict", "model_state_dict", "model", "net", "weights", "params_ema", "ema", "state_dict_ema"),
        *("ema_state_dict", "module.", "model.", "backbone.", "_orig_mod.", "_orig_mod.module.", "module.model.net."),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_load_pickled_weights(tmp_path: Path, form: str, suffix: str) -> None:
    source, target = small(), small()
    torch.save(wrapped(source.state_dict(), form), tmp_path / f"weights{suffix}")
    said = load_weights(target, tmp_path / f"weights{suffix}")
    assert said == [] if form == "plain" else form in said[0]
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_load_safetensors(tmp_path: Path) -> None:
    source, target = small(), small()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, str(tmp_path / "w.safetensors"))
    assert torch.equal(source[0].weight, target[0].weight)


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"unexpected \(2\): module\.a, b"):
        load_weights(small(), tmp_path / "w.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("unpickled",)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.pt"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(WeightsError) as error:
        load_weights(small(), path)
    assert "unpickled" not in capsys.readouterr().out
    assert str(error.value) == (
        f"{path} cannot be read as weights (UnpicklingError): it is damaged or holds more than tensors; "
        "write it with torch.save(model.state_dict(), ...) or safetensors"
    )


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_weights(small(), tmp_path / name)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_weights(small(), tmp_path / "w.pt")
    assert str(error.value) == (
        f"{tmp_path / 'w.pt'} does not exist or is not a file; give a .pt, .pth or .safetensors file"
    )


def test_file_that_is_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text("1 2 3")
    with pytest.raises(WeightsError) as error:
        load_weights(small(), path)
    assert str(error.value) == f"{path} is not a weights file; weights are .pt, .pth or .safetensors"


@pytest.mark.parametrize("content", [torch.ones(2), {}, {"a": 1}, [torch.ones(1)]])
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError) as error:
        load_weights(small(), path)
    assert str(error.value) == (
        f"{path} holds no state dict; it must hold names and tensors, as torch.save(model.state_dict(), ...) writes, "
        "itself or under a key such as state_dict, model_state_dict, model"
    )


def test_missing_and_unexpected_names(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = small().state_dict()
    del state["0.bias"]
    torch.save(state | {f"extra{i}": torch.ones(1) for i in range(7)}, path)
    with pytest.raises(WeightsError) as error:
        load_weights(small(), path)
    assert str(error.value) == (
        f"{path} does not fit the model; missing (1): 0.bias; "
        "unexpected (7): extra0, extra1, extra2, extra3, extra4 and 2 more; give the weights of this very model"
    )


def test_other_shapes(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(4)).state_dict(), path)
    model = small()
    before = model[0].bias.clone()
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    assert str(error.value) == (
        f"{path} does not fit the model; other shapes (2): 0.weight: 5x3x3x3 in the file, 4x3x3x3 in the model, "
        "0.bias: 5 in the file, 4 in the model; give the weights of this very model"
    )
    assert torch.equal(model[0].bias, before)


def test_state_that_the_module_refuses(tmp_path: Path) -> None:
    class Strict(nn.Linear):
        def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("half of it is missing")

    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt does not fit the model: RuntimeError: half of it is missing$"):
        load_weights(Strict(2, 2), tmp_path / "w.pt")


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in small().state_dict().items()}


def test_which_of_several_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": weights(1), "ema": weights(2), "deep": {"inside": weights(3)}, "epoch": 7}, path)
    with pytest.raises(WeightsError) as error:
        load_weights(small(), path)
    assert str(error.value) == (
        f"{path} holds several state dicts: model (7 tensors), ema (7 tensors), deep.inside (7 tensors); say which one "
        "is meant with "
        "--weights-key model (in Python key='model')"
    )
    for key, value in (("model", 1), ("ema", 2), ("deep.inside", 3)):
        net = small()
        load_weights(net, path, key=key)
        assert (net[0].weight == value).all()
    for key, message in (
        ("emma", r"nothing under the key 'emma' \(--weights-key\); .*did you mean 'ema'"),
        ("epoch", r"no state dict under the key 'epoch' \(--weights-key\), but a int"),
        ("deep.outside", "nothing under the key 'deep.outside'"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_weights(small(), path, key=key)


def test_an_unknown_key_is_proposed(tmp_path: Path) -> None:
    torch.save({"brain": weights(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"holds no state dict; .* name the right one of brain with --weights-key"):
        load_weights(small(), tmp_path / "w.pt")


def test_what_was_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = {f"module.{name}": value for name, value in weights(1).items() if "num_batches" not in name}
    torch.save({"net": old}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "graphzip"):
        said = load_weights(small(), tmp_path / "w.pt")
    assert said == [
        "took the 6 tensors under 'net'",
        "took the prefix 'module.' off every name",
        "1 counters of batch norms (num_batches_tracked) are not in the file and stay as they are",
    ]
    assert all(sentence in caplog.text for sentence in said)


def test_a_prefix_of_the_model_itself_stays(tmp_path: Path) -> None:
    net = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save({name: torch.ones_like(value) for name, value in net.state_dict().items()}, tmp_path / "w.pt")
    assert load_weights(net, tmp_path / "w.pt") == []
    assert (net["model"].weight == 1).all()


def test_another_prefix_is_named(tmp_path: Path) -> None:
    torch.save({f"my.{name}": value for name, value in weights(1).items()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="unexpected"):
        load_weights(small(), tmp_path / "w.pt")
    net = small()
    load_weights(net, tmp_path / "w.pt", strip_prefix="my.")
    assert (net[0].weight == 1).all()
    with pytest.raises(WeightsError, match=r"7 names do not begin with 'your\.' \(--strip-prefix\): my\.0\.weight"):
        load_weights(small(), tmp_path / "w.pt", strip_prefix="your.")


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (torch.full((4,), float("nan")), r"not finite \(1\): 0\.bias;"),
        (torch.full((4,), float("inf")), r"not finite \(1\): 0\.bias;"),
        (
            torch.ones(4, dtype=torch.complex64),
            r"other kinds of numbers \(1\): 0\.bias: complex64 in the file, float32",
        ),
        (torch.ones(4, dtype=torch.int64), r"other kinds of numbers \(1\): 0\.bias: int64 in the file, float32"),
        (torch.ones(4).to_sparse(), r"not dense \(1\): 0\.bias: sparse_coo;"),
        (torch.ones(4, device="meta"), r"not dense \(1\): 0\.bias: without values;"),
        (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), r"not dense \(1\): 0\.bias: quantized;"),
        (torch.nested.nested_tensor([torch.ones(4)]), r"not dense \(1\): 0\.bias: nested;"),
    ],
)
def test_numbers_that_do_not_fit(spoilt: torch.Tensor, message: str, tmp_path: Path) -> None:
    net = small()
    before = net[0].weight.clone()
    torch.save({**weights(1), "0.bias": spoilt}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net[0].weight, before)


def test_half_precision_is_taken(tmp_path: Path) -> None:
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in weights(1).items()},
        tmp_path / "w.pt",
    )
    net = small()
    load_weights(net, tmp_path / "w.pt")
    assert net[0].weight.dtype == torch.float32
    assert (net[0].weight == 1).all()


def test_numbers_are_finite_in_the_models_type_but_for_its_own_masks(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    torch.save(model.state_dict(), tmp_path / "own.pt")
    load_weights(model, tmp_path / "own.pt")
    wide = {name: value.double() for name, value in model.state_dict().items()}
    for values in (wide["weight"] + 1e300, torch.full((2, 2), torch.nan)):
        torch.save({**wide, "weight": values}, tmp_path / "wide.pt")
        with pytest.raises(WeightsError, match=r"not finite.*weight"):
            load_weights(model, tmp_path / "wide.pt")
    torch.save({**wide, "weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "small.pt")
    load_weights(model, tmp_path / "small.pt")
    assert model.weight.eq(1).all()


@pytest.mark.parametrize(
    ("key", "wrap"),
    [
        ("ema.shadow", lambda state: {"ema": {"decay": 0.9, "shadow": state}}),
        ("averaged_model", lambda state: {"averaged_model": state}),
        ("best.state_dict", lambda state: {"best": {"state_dict": {f"module.{name}": state[name] for name in state}}}),
    ],
)
def test_a_second_state_dict_is_asked_about_wherever_it_lies(key: str, wrap: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = model.state_dict()
    optimizer = {"scales": {"first": torch.ones(3)}}
    torch.save({"model": state, **wrap(state), **optimizer}, tmp_path / "two.pt")
    with pytest.raises(
        WeightsError, match=rf"several state dicts: model \(2 tensors\), {re.escape(key)} \(2 tensors\)"
    ):
        load_weights(model, tmp_path / "two.pt")
    load_weights(model, tmp_path / "two.pt", key=key)
