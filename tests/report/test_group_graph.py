"""The picture of channel groups on the page: layers are rows, groups are lines in as few lanes as there may be."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.report.charts import groups_charts, widths_charts
from graphzip.report.group_graph import GroupGraph, GroupLine
from graphzip.report.page import page_of


class Residual(nn.Module):
    def __init__(self, depth: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.ins = nn.ModuleList(nn.Linear(8, width) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(width, 8) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one, two in zip(self.ins, self.outs, strict=True):
            x = x + two(one(x).relu())
        out: Tensor = self.head(x)
        return out


def graph_of(model: nn.Module) -> GroupGraph:
    return GroupGraph.of(gz.channel_groups(model, (torch.randn(2, 6),)))


def test_lines_run_from_makers_to_readers() -> None:
    graph = graph_of(Residual(2))
    assert graph.layers == ("stem", "ins.0", "outs.0", "ins.1", "outs.1", "head")
    lines = {line.name: line for line in graph.lines}
    assert (lines["stem"].makers, lines["stem"].readers) == ((0, 2, 4), (1, 3, 5))
    assert (lines["ins.0"].makers, lines["ins.0"].readers) == ((1,), (2,))
    assert lines["head"].reason == "is an output of the model"
    assert lines["ins.0"].lane == lines["ins.1"].lane != lines["stem"].lane


def test_many_groups_need_few_lanes_and_parts_of_one_page() -> None:
    graph = graph_of(Residual(110))
    assert len(graph.lines) == 112
    assert graph.lanes == 2
    parts = groups_charts(graph, {"ins.3": 2})
    assert len(parts) == 6
    for part in parts:
        svg = ET.fromstring(part)
        assert float(svg.attrib["viewBox"].split()[3]) < 950  # pixels of a printed page
    texts = [text for part in parts for text in ET.fromstring(part).itertext()]
    assert all(layer in texts for layer in graph.layers)
    assert sum(text.startswith("ins.3: 4 → 2 channels") for text in texts) == 1


def test_lines_that_leave_a_part_go_on_in_the_next_one() -> None:
    graph = GroupGraph(tuple(f"layer{number}" for number in range(50)), (GroupLine("layer0", 8, (0,), (49,)),))
    first, second = groups_charts(graph, {})
    (down,), (up,) = (re.findall(r"M[\d.]+ ([\d-]+V[\d-]+)", part) for part in (first, second))
    assert down.startswith("18V")
    assert up.startswith("7V")
    assert ("maker" in first, "maker" in second) == (True, False)


def test_many_lanes_are_narrow_and_do_without_numbers() -> None:
    lines = tuple(GroupLine(f"g{number}", 8, (0,), (1,), lane=number) for number in range(60))
    (part,) = groups_charts(GroupGraph(("a", "b"), lines), {})
    assert 900 < float(ET.fromstring(part).attrib["width"]) < 1400
    assert ">8</text>" not in part


def test_the_page_has_it_and_names_are_escaped() -> None:
    compiled = gz.compile(Residual(2).eval(), gz.Plan([gz.ClusterMerge(keep={"ins.0": 0.5})]), (torch.randn(2, 6),))
    page = page_of(compiled.report)
    assert "Which layers are coupled" in page
    assert "it cannot shrink: is an output of the model" in page
    strange = GroupGraph(("<a>",), (GroupLine("<a>", 3, (0,), (), "a < b"),))
    (part,) = groups_charts(strange, {})
    assert "<a>" not in part
    assert gz.Report.from_dict(compiled.report.to_dict()).graph == compiled.report.graph


def test_widths_come_in_parts_of_one_page() -> None:
    parts = widths_charts([(f"group{number}", 8, 4) for number in range(85)])
    assert len(parts) == 3
    assert [part.count('class="after"') for part in parts] == [40, 40, 5]
