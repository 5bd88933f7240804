"""The report of what no test reaches: which lines are a GPU's, and that each unreached one needs a reason."""

from __future__ import annotations

import pytest

from tests.gpu_paths import report

SOURCE = """
import torch


def run(device, graph):
    x = plain()
    if device.type == "cuda":
        first()
        if x:
            second()
    else:
        third()
    torch.cuda.synchronize()  # gpu only: there is nothing to wait for
    if graph:  # gpu only: a graph is captured on a GPU
        fourth()
    return x


class Stream:
    def capture(self):
        fifth()

    def other(self):
        sixth()
"""


def numbers(*words: str) -> set[int]:
    return {k for k, line in enumerate(SOURCE.splitlines(), 1) if any(word in line for word in words)}


def test_lines_of_a_gpu_are_those_that_name_it_and_those_that_it_guards() -> None:
    found = report.device_lines(SOURCE)
    assert numbers("first()", "if x", "second()", "third()", "synchronize", "fifth()") <= found
    assert not found & numbers("plain()", "return x", "sixth()", "import torch")


def test_an_unreached_line_needs_a_reason() -> None:
    every = set(range(1, len(SOURCE.splitlines()) + 1))
    lines = {line.text.split("  ")[0]: line for line in report.unreached("ect/a.py", SOURCE, every, {})}
    assert lines["second()"].reason is None and lines["second()"].function == "run"
    assert lines["torch.cuda.synchronize()"].reason == "there is nothing to wait for"
    reasons = {("ect/a.py", "Stream.capture"): "no graphs here"}
    lines = {line.text.split("  ")[0]: line for line in report.unreached("ect/a.py", SOURCE, every, reasons)}
    assert lines["fifth()"].reason == "no graphs here" and lines["first()"].reason is None
    assert report.unreached("ect/a.py", SOURCE, numbers("plain()", "sixth()"), {}) == []


def test_a_reason_in_the_source_holds_for_the_body() -> None:
    assert {report.comments(SOURCE)[k] for k in numbers("if graph", "fourth()")} == {"a graph is captured on a GPU"}


def test_the_list_of_reasons_is_read_and_names_what_exists() -> None:
    reasons = report.read_reasons("# a comment\nect/step.py::TrainStep.capture: why\n\nect/step.py::*: all\n")
    assert reasons == {("ect/step.py", "TrainStep.capture"): "why", ("ect/step.py", "*"): "all"}
    assert report.unknown(reasons) == []
    (fault,) = report.unknown({("ect/step.py", "TrainStep.nothing"): "why"})
    assert "ect/step.py::TrainStep.nothing does not exist" in fault
    with pytest.raises(SystemExit, match="cannot read"):
        report.read_reasons("ect/step.py::TrainStep.capture")


def test_the_projects_own_list_holds() -> None:
    assert report.unknown(report.read_reasons(report.REASONS.read_text())) == []
