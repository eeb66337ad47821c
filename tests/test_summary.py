"""The graph's tables say what the graph says, and name no machine."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from torch import nn

from espalier.costs import cost
from espalier.graph import trace
from espalier.graph.reasons import UNUSED, CallPlace, Reason, shorten_path
from espalier.graph.summary import overview, summarise, tables
from espalier.run.models import build_model


@pytest.fixture(scope="module")
def graph():
    return trace(build_model("resnet20", num_classes=10), torch.zeros(1, 3, 32, 32))


def test_totals_are_the_exact_cost(graph):
    totals, counted = overview(graph).totals, cost(graph)
    assert (totals.macs, totals.params) == (counted.macs, counted.params)
    assert totals.activation_memory == counted.activation_memory


def test_layers_add_up_to_the_totals(graph):
    summary = overview(graph)
    assert sum(row.macs for row in summary.layers) == summary.totals.macs
    assert sum(row.params for row in summary.layers) + summary.other_params == summary.totals.params


def test_a_layer_shows_its_widths(graph):
    rows = {row.name: row for row in overview(graph).layers}
    assert (rows["layer2.0.conv1"].inputs, rows["layer2.0.conv1"].outputs) == (16, 32)
    assert rows["layer2.0.conv1"].macs == 16 * 32 * 9 * 16 * 16
    assert rows["linear"].outputs == 10
    assert rows["linear"].removable == 0


def test_a_group_names_who_makes_and_who_uses_its_channels(graph):
    rows = {row.name: row for row in overview(graph).groups}
    inner = rows["layer1.0.conv1"]
    assert (inner.units, inner.made_by, inner.used_by) == (16, ("layer1.0.conv1",), ("layer1.0.conv2",))
    spent = {row.name: row.macs for row in overview(graph).layers}
    share = (spent["layer1.0.conv1"] + spent["layer1.0.conv2"]) / overview(graph).totals.macs
    assert inner.macs_share == pytest.approx(share)


def test_transposed_convolutions_show_inputs_and_outputs_the_right_way_round():
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    first = overview(trace(model, torch.zeros(1, 3, 4, 4))).layers[0]
    assert (first.inputs, first.outputs, first.removable) == (3, 6, 6)


def test_repeated_calls_of_one_module_are_one_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    (row,) = overview(trace(Twice(), torch.zeros(1, 4))).layers
    assert (row.calls, row.macs, row.params) == (2, 32, 20)


class Unruly(nn.Module):
    """Its second half sees channels only through an operation that has no rule."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(torch.linalg.cross(x[:, :3], x[:, 3:]).repeat(1, 2))


def test_what_is_frozen_is_grouped_by_reason_and_line():
    summary = overview(trace(Unruly(), torch.zeros(1, 3, 4, 4)))
    assert any("cross" in text for text in summary.unknown)
    unruled = [row for row in summary.frozen if "no rule" in row.reason]
    assert [row.channels for row in unruled] == [6]
    assert unruled[0].layers == ("conv",)
    assert "test_summary.py:" in unruled[0].line


def test_nothing_printed_names_a_folder_of_this_machine(graph):
    for text in (summarise(graph), summarise(trace(Unruly(), torch.zeros(1, 3, 4, 4)))):
        assert os.getcwd() not in text
        assert not any(word.startswith("/") for word in text.split())


def test_the_text_is_aligned_and_has_every_row(graph):
    text, summary = summarise(graph), overview(graph)
    assert f"{summary.totals.macs:,} MACs" in text.splitlines()[0]
    for _, head, rows in tables(summary):
        assert all(len(row) == len(head) for row in rows)
    lines = text.splitlines()
    first = lines.index("Layers")
    end = [line.index("convolution") for line in lines[first:] if "convolution" in line]
    assert len(end) == 21
    assert len(set(end)) == 1


def test_the_method_of_the_graph_gives_the_same_text(graph):
    assert graph.summary() == summarise(graph)


def test_the_rows_are_plain_data(graph):
    assert json.loads(json.dumps(asdict(overview(graph))))["totals"]["groups"] == len(graph.groups)


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("/opt/x/lib/python3.11/site-packages/timm/layers/mlp.py:48", "timm/layers/mlp.py:48"),
        (f"{os.getcwd()}/nets/mine.py:3", "nets/mine.py:3"),
        ("/somewhere/else/nets/mine.py:3", "nets/mine.py:3"),
        ("", ""),
    ],
)
def test_paths_are_shortened(path, short):
    assert shorten_path(path) == short


def test_reasons_become_sentences():
    reason = Reason("is sliced at a fixed index", CallPlace("stage.0", "Block", "/a/site-packages/net.py:9"))
    assert (reason.text, reason.line) == ("is sliced at a fixed index", "net.py:9")
    assert str(reason.shortened) == "is sliced at a fixed index: stage.0 [Block] at net.py:9"
    assert (
        str(Reason("is an output of the model", CallPlace("", "Net", ""))) == "is an output of the model: (model) [Net]"
    )
    assert reason.split(": ")[0] == reason.text  # it is a sentence to whoever wants one


def test_channels_that_nothing_consumes_are_named_by_their_layer():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)

        def forward(self, x):
            return self.a(x)

    graph = trace(Left(), torch.zeros(1, 3, 8, 8))
    found = {str(f.reason) for f in graph.frozen if f.reason.text == UNUSED}
    assert found == {"nothing consumes these channels: unused [Conv2d]"}


def test_channels_that_can_only_go_all_at_once_are_named():
    class Unit(nn.Module):
        """Columns of the last convolution cross the groups of the one before: 6 in each of 8 is no multiple of 8."""

        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 48, 1)
            self.two, self.head = nn.Conv2d(48, 48, 1, groups=8), nn.Linear(48, 5)
            self.three = nn.Conv2d(48, 48, 1, groups=8)

        def forward(self, x):
            y = self.two(self.one(x))
            b, c, h, w = y.shape
            y = y.view(b, 8, c // 8, h, w).transpose(1, 2).reshape(b, c, h, w)
            return self.head(self.three(y).mean((2, 3)))

    summary = overview(trace(Unit(), torch.zeros(1, 3, 4, 4)))
    tied = [row for row in summary.frozen if "tied" in row.reason]
    assert [(row.channels, row.layers) for row in tied] == [(48, ("two",))]
    assert not any(
        "tied" in row.reason
        for row in overview(trace(build_model("resnet8", num_classes=10), torch.zeros(1, 3, 32, 32))).frozen
    )
