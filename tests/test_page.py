"""The report of a run: one page in two forms, the curves, and where the time went."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import shutil
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from ect.config import Config, EvalConfig
from ect.files.run_folder import write_config
from ect.job import Job
from ect.options import parse
from ect.presets import PRESETS
from ect.presets.cifar10 import PUBLISHED
from ect.show import chart, document, machine, page
from ect.show.chart import Chart
from ect.show.clock import PARTS, Clock
from ect.show.curves import Curves
from ect.show.document import Code, Heading, Picture
from ect.show.table import Table
from tests.test_job import interrupt_after
from tests.tiny import config, run

RATED = config(
    eval=EvalConfig(samples=16, batch=16),
    log=replace(config().log, eval_kimg=0.032),
    pretrain="digits-diffusion",
    pretrain_kimg=0.016,
)


class Page(html.parser.HTMLParser):
    """What a page shows, and what it would fetch or run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.sources, self.open, self.text = list[str](), list[str](), list[str](), ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "run"
    run(RATED, folder)
    return folder


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_runs_nothing(made: Path) -> None:
    found = Page(made / "report.html")
    assert len(found.sources) == found.tags.count("img") == 4  # two grids, all samplers, the curves
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in found.sources)
    assert not {"script", "link", "iframe", "object", "embed"} & {*found.tags}
    assert "@import" not in found.text and "url(" not in found.text
    assert (made / "report.html").stat().st_size < 500_000


@pytest.mark.slow
def test_both_forms_say_the_same(made: Path) -> None:
    shown, written = Page(made / "report.html").text, (made / "report.md").read_text()
    for said in (
        "Wall clock", "Recipe", "Machine", "Quality", "Samples", "Curves", "python -m ect.train --preset digits",
        "digits: 1,797 images, 8x8 grey, no labels", "fp32; products of fp32 tensors in fp32", "not measured on this data",
        "Self-check: not run", "consistency, 2 steps",
    ):  # fmt: skip
        assert said in shown and said in written, said
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", written, re.M)
    assert pictures == ["nfe1-000000.080.png", "nfe2-000000.080.png", "samples.png", "curves.svg"]
    assert all((made / name).is_file() for name in pictures)
    table = (made / "results.md").read_text().partition("\n\n")[0]
    assert table.startswith("| sampler") and table in written


@pytest.mark.slow
def test_the_curves_are_the_rows_of_the_log_and_end_with_the_figures_of_the_report(made: Path) -> None:
    with (made / "curves.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["nimg"] for row in found] == ["16", "32", "48", "64", "80"]
    minutes = [float(row["minutes"]) for row in found]
    assert minutes == sorted(minutes) and minutes[-1] > 0
    stats = [json.loads(line) for line in (made / "stats.jsonl").read_text().splitlines()]
    assert [float(row["loss"]) for row in found] == [row["loss"] for row in stats if "loss" in row]
    rated = {row["nimg"]: row["nfe2/FDc"] for row in stats if "nfe2/FDc" in row}
    assert {int(row["nimg"]): float(row["nfe2/FDc"]) for row in found if row["nfe2/FDc"]}.items() >= rated.items()
    results = json.loads((made / "results.json").read_text())
    assert float(found[-1]["nfe2/FDc"]) == results["rows"][-1]["values"][0]["FDc"]
    assert results["phases"] == ["pretraining"] * 3 + ["tuning"] * 2
    assert "nfe35/FDc" not in found[0] and (made / "pretrain" / "curves.csv").is_file()


@pytest.mark.slow
def test_the_wall_clock_of_a_phase_is_split_and_adds_up_over_resumptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        job = Job(replace(RATED, pretrain=None, pretrain_kimg=None, run_dir=folder), Console(quiet=True))
        assert not job.run()
    first = job.splits["training"]
    told = f"A signal stopped this run; python -m ect.train --resume {folder} goes on with it"
    for name in ("report.md", "report.html"):
        early = (folder / name).read_text()
        assert told in early and "Nothing was rated." in early and "kimg of training; " in early
    job = run(parse(["--resume", str(folder)]), folder)
    assert "A signal" not in (folder / "report.html").read_text()
    both = json.loads((folder / "results.json").read_text())["splits"]["training"]
    assert [*both] == [*PARTS] and all(both[part] >= first[part] > 0 for part in PARTS if part != "training")
    assert sum(both.values()) == pytest.approx(job.seconds["training"], abs=0.05)
    assert both["start"] > first["start"] and sum(both.values()) > sum(first.values())


def test_a_clock_counts_what_is_open_and_what_was_before() -> None:
    clock = Clock()
    clock.go_on({"seconds": 100.0, "split": {"start": 10.0, "training": 70.0, "evaluation": 20.0}})
    clock.started()
    with clock.of("checkpoints"):
        time.sleep(0.02)
        inside = clock.split()
    after = clock.split()
    assert 0.02 <= inside["checkpoints"] <= after["checkpoints"] and after["evaluation"] == 20.0
    assert after["training"] == pytest.approx(70.0, abs=0.01) and after["start"] >= 10.0
    assert sum(after.values()) == pytest.approx(clock.seconds, abs=0.01)
    old = Clock()
    old.go_on({"seconds": 50.0})  # of a version that split nothing
    assert old.split()["training"] == pytest.approx(50.0, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [KeyError("a fault"), OSError(28, "No space left on device"), ZeroDivisionError("x")])
def test_a_report_that_fails_costs_no_results(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> str:
        raise fault

    monkeypatch.setattr(document, "html", fails)
    with pytest.warns(UserWarning, match="the report cannot be written, the run goes on without"):
        run(config(), tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file() and not (tmp_path / "run" / "report.html").exists()


def test_a_folder_without_a_log_has_a_report_without_curves(tmp_path: Path) -> None:
    """All that telemetry may cost is missing: rows, grids and the picture."""
    assert page.write(bare(tmp_path, config()))
    text = (tmp_path / "report.md").read_text()
    assert "There are no rows in stats.jsonl to draw." in text and "Nothing was rated." in text and "![" not in text
    assert not (tmp_path / "curves.svg").exists()


def test_a_preset_that_is_gone_costs_the_command_alone(tmp_path: Path) -> None:
    assert page.write(bare(tmp_path, config(preset="of an earlier version")))
    text = (tmp_path / "report.md").read_text()
    assert "a run of the recipe of an earlier version" in text and "python -m ect.train" not in text


def bare(folder: Path, cfg: Config, data: str = "digits: 1,797 images", **results: Any) -> Path:
    """A run folder with its options and its results only."""
    write_config(cfg, folder, {"device": "cpu", "kernels": {"levels": "reference"}, "compile": True, "graph": False})
    known = {
        "rows": [], "seconds": {"training": 1.0}, "checked": ["self-check: all is well"], "phases": [],
        "splits": {"training": {"training": 1.0}}, "about": {"device": "cpu", "data": data}, "target": None, "missing": [],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(known | results))
    return folder


def test_published_figures_stand_beside_those_of_the_run(tmp_path: Path) -> None:
    rated = [
        {"sampler": {"name": "consistency", "nfe": nfe}, "samples": 50_000, "mean": mean}
        for nfe, mean in ((1, {"FID": 7.5}), (2, {"FID": 2.81}))
    ]
    of = {"rows": rated, "phases": ["training"] * 2}
    page.write(bare(tmp_path, PRESETS["cifar10-1h"], "cifar10: 50,000 images, 32x32 RGB, no labels", **of))
    text = (tmp_path / "report.md").read_text()
    assert "| FID by evaluations | published | this run |\n| --- | ---: | ---: |\n| 2 | 2.73 | 2.81 |\n" in text
    assert "Published by Easy Consistency Tuning (arXiv 2406.14548), of 50,000 images." in text
    assert (
        "| step | compile |" in text and "| kernels | 1 op on reference |" in text and "Self-check: all is well" in text
    )
    missing = ["FID: Inception weights not found"]
    page.write(bare(tmp_path, PRESETS["cifar10-1h"], "cifar10: 50,000 images", missing=missing))
    text = (tmp_path / "report.md").read_text()
    assert "| 2 | 2.73 | not rated |" in text and missing[0] in text
    page.write(bare(tmp_path, PRESETS["cifar10-1h"], "cats: 50,000 images"))
    assert "2.73" not in (tmp_path / "report.md").read_text()
    assert {*PUBLISHED} <= {name for name in PRESETS if name.startswith("cifar10-")}


def test_a_model_of_several_averages_is_drawn_by_its_first(tmp_path: Path) -> None:
    cfg = config(optim=replace(config().optim, emas=(".9", ".99")))
    rows = [{"nimg": n, "loss": 1.0, "seconds": n, "ema.9/nfe2/FDc": 9.0 / n, "ema.99/nfe2/FDc": 1.0} for n in (16, 32)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "torn{")
    rated = [
        {"sampler": {"name": "c", "nfe": 2}, "samples": 8, "mean": {"FDc": figure}, "ema": ema}
        for ema, figure in ((".9", 5), (".99", 6))
    ]
    page.write(bare(tmp_path, cfg, rows=rated, phases=["training"] * 2))
    with (tmp_path / "curves.csv").open() as file:
        last = [*csv.DictReader(file)][-1]
    assert (last["ema.9/nfe2/FDc"], last["ema.99/nfe2/FDc"]) == ("5.0", "1.0")
    assert "FDc 5 by 2 evaluations; 0.032 kimg of training" in (tmp_path / "report.md").read_text()
    assert "FDc of training" in (tmp_path / "curves.svg").read_text()


def test_a_document_escapes_what_it_shows(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    bad = "<script>alert('a & b')</script>"
    blocks = [Heading(bad, 1), bad, Code(bad), Table([bad, "b"], [[bad]]), [Picture(tmp_path / "a.png", bad)]]
    (tmp_path / "page.html").write_text(document.html(bad, blocks))
    found = Page(tmp_path / "page.html")
    assert "script" not in found.tags and found.text.count(bad) == 7
    assert found.tags.count("td") == found.tags.count("th") == 2  # a row that ends early is filled up


def test_a_chart_is_a_picture_whose_curves_stay_in_their_field() -> None:
    curves = {"a < b": [(1.0, 1.0), (2.0, 100.0)], "one": [(1.5, 3.0)]}
    picture = chart.draw([Chart("of & some", "kimg", curves, {"target": 2.0}), Chart("flat", "x", {"y": [(0.0, 0.0)]})])
    root = ET.fromstring(picture)
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "of & some", "target", "kimg", "10", "100", "flat"} <= {*names}
    assert root.attrib["viewBox"] == f"0 0 {2 * chart.WIDTH} {chart.HEIGHT}"
    found = root.iter("{http://www.w3.org/2000/svg}circle")
    circles = [{name: float(circle.attrib[name]) for name in ("cx", "cy")} for circle in found]
    assert len(circles) == 4
    for circle in circles:
        assert chart.LEFT <= circle["cx"] <= chart.WIDTH - chart.RIGHT
        assert chart.TOP <= circle["cy"] <= chart.HEIGHT - chart.BOTTOM
    assert circles[0]["cy"] - circles[2]["cy"] == pytest.approx(  # log 3 of log 100
        (circles[0]["cy"] - circles[1]["cy"]) * 0.2386, rel=0.02
    )


@pytest.mark.parametrize(
    "span", [(0.0, 7e-4), (2.0, 2.0), (-3.0, 5.0), (0.3, 0.9), (1.0, 1e6), (0.0, 0.0), (95.0, 104.0)]
)
def test_an_axis_has_a_few_round_ticks(span: tuple[float, float]) -> None:
    for log in [False] + [True] * (span[0] > 0 and span[1] > 20 * span[0]):
        axis = chart.Axis(*span, 250.0, 50.0, log)
        ticks = axis.ticks()
        assert 3 <= len(ticks) <= 8 and ticks == sorted(ticks)
        assert all(50.0 <= axis.at(value) <= 250.0 for value in [*ticks, *span])


def test_a_logarithmic_axis_without_room_for_decades_has_ticks_all_the_same() -> None:
    assert chart.Axis(21.0, 38.0, 250.0, 50.0, log=True).ticks() == [20.0, 25.0, 30.0, 35.0, 40.0]
    assert chart.Axis(5e6, 2e7, 50.0, 250.0, log=True).ticks() == [5e6, 1e7, 2e7]


def test_rows_of_an_earlier_version_have_no_minutes(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").write_text(
        '{"nimg": 8, "loss": 2.0}\n[1]\n{"nimg": 16, "loss": null, "levels/-1.5/A": 1}\n'
    )
    curves = Curves.read(tmp_path)
    assert curves.over_kimg("loss") == [(0.008, 2.0)] and curves.over_minutes("loss") == []
    curves.write(tmp_path)
    assert (tmp_path / "curves.csv").read_text() == "nimg,minutes,loss\n8,,2.0\n"


def test_the_facts_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.facts(torch.device("cpu"), config())
    assert (
        found["device"] == "cpu" and found["precision"].startswith("fp32; ") and torch.__version__ in found["software"]
    )
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Chip\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor() == "A Chip"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU of {device}")
    monkeypatch.setattr(machine.precision, "products", lambda device: "TF32")
    gpu = machine.facts(torch.device("cuda"), config())
    assert gpu["device"] == "a GPU of cuda" and gpu["precision"] == "fp16; products of fp32 tensors in TF32"


@pytest.mark.slow
def test_a_report_is_made_anew_from_the_folder_alone(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert page.write(tmp_path / "run") == "report.html, report.md, curves.csv, "
    assert (tmp_path / "run" / "curves.csv").read_text() == (made / "curves.csv").read_text()
