"""Cases of recurrent layers: units in their gates, states that are given, layers and directions on their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from op_cases import Cases, param
from torch import Tensor, nn

CASES = Cases()

aten = torch.ops.aten

WIDE: Mapping[str, Any] = {"shape": (2, 5, 6), "dim": 2}
UNITS = "cell.weight_hh_l0"


def cell(kind: type[nn.Module], units: int = 4, **options: Any) -> Any:
    """Parts: a recurrent layer of six inputs."""
    options.setdefault("batch_first", True)
    return lambda: {"cell": kind(6, units, **options)}


def outputs(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.cell(x)[0]
    return result


def rnn(*, nonlinearity: str = "tanh") -> Any:
    return cell(nn.RNN, nonlinearity=nonlinearity)


CASES.add(aten.lstm.input, outputs, **WIDE, parts=cell(nn.LSTM), free={"make": 6, UNITS: 4})
CASES.add(aten.gru.input, outputs, **WIDE, parts=cell(nn.GRU), free={"make": 6, UNITS: 4})
CASES.add(aten.rnn_tanh.input, outputs, **WIDE, parts=rnn(), free={"make": 6, UNITS: 4})
CASES.add(aten.rnn_relu.input, outputs, **WIDE, parts=rnn(nonlinearity="relu"), free={"make": 6, UNITS: 4})
CASES.add(aten.lstm.input, outputs, **WIDE, name="without biases", parts=cell(nn.LSTM, bias=False),
          free={"make": 6, UNITS: 4})  # fmt: skip
CASES.add(aten.lstm.input, outputs, **WIDE, name="with a projection", parts=cell(nn.LSTM, 8, proj_size=3),
          free={"make": 6, UNITS: 8, "cell.weight_hr_l0": 3})  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x.transpose(0, 1))[0].transpose(0, 1), **WIDE, name="time first",
          parts=cell(nn.GRU, batch_first=False), free={"make": 6, UNITS: 4})  # fmt: skip
CASES.add(aten.lstm.input, outputs, **WIDE, name="of two directions", parts=cell(nn.LSTM, bidirectional=True),
          free={"make": 6, UNITS: 4, f"{UNITS}_reverse": 4})  # fmt: skip
CASES.add(aten.gru.input, outputs, **WIDE, name="of three layers", parts=cell(nn.GRU, num_layers=3),
          free={"make": 6, UNITS: 4, "cell.weight_hh_l1": 4, "cell.weight_hh_l2": 4})  # fmt: skip
CASES.add(aten.lstm.input, lambda m, x: m.cell(x)[1][1][-1], **WIDE, name="read by its last state", out=1,
          parts=cell(nn.LSTM, num_layers=2), free={"make": 6, UNITS: 4, "cell.weight_hh_l1": 4})  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x)[1].transpose(0, 1), **WIDE, name="read by all last states",
          parts=cell(nn.GRU, num_layers=2), free={"make": 6, UNITS: 4})  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x, x[:, :1].transpose(0, 1))[0], **WIDE, parts=cell(nn.GRU, 6),
          name="from a state with channels")  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x, m.start.expand(1, x.shape[0], 4).contiguous())[0], **WIDE,
          parts=lambda: {"cell": nn.GRU(6, 4, batch_first=True), "start": param(1, 1, 4)}, name="from a learned state",
          free={"make": 6, UNITS: 4})  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x, x.new_ones(1, x.shape[0], 4))[0], **WIDE, parts=cell(nn.GRU),
          name="from ones", free={"make": 6, UNITS: 4})  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x, torch.linspace(0, 1, 4, dtype=x.dtype).expand(1, x.shape[0], 4).contiguous())[0],
          **WIDE, parts=cell(nn.GRU), name="from a state of numbers", free={"make": 6})  # fmt: skip
CASES.add(aten.gru.input, lambda m, x: m.cell(x)[0], (2, 4, 6), dim=1, out=2,
          parts=cell(nn.GRU), name="over channels", free={UNITS: 4}, why="runs over positions")  # fmt: skip
