"""The first hour on a GPU, without one: its stages, what they cost each other, and its report; and all of it on the CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import first_hour
import pytest
import torch
from first_hour import Stage
from lib import first_hour_report, measure

from ect import options
from ect.files.run_folder import to_dict
from ect.presets import PRESETS

ROOT = Path(__file__).parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class Hour:
    """Runs the command on stages of one's own."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.stages = out, [Stage("fine", 1, 60, python("print('all is well')"))]
        monkeypatch.setattr(first_hour, "stages", lambda device, out: self.stages)
        monkeypatch.setattr(first_hour, "LEAST", 0.2)

    def __call__(self, *more: str) -> int:
        return first_hour.main(["--device", "cpu", "--out", str(self.out), *more])

    def outcomes(self) -> dict[str, dict[str, Any]]:
        return {found["name"]: found for found in json.loads((self.out / "stages.json").read_text())}

    @property
    def report(self) -> str:
        return (self.out / "report.md").read_text()


@pytest.fixture
def hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hour:
    return Hour(tmp_path / "out", monkeypatch)


@pytest.mark.slow
def test_no_stage_stops_the_next(hour: Hour) -> None:
    hour.stages = [
        Stage("raises", 1, 60, python("print('begun'); raise ValueError('no kernel image')")),
        Stage("dies", 1, 60, python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")),
        Stage("lacks", 1, 60, python(""), "json no_such_package nor_this"),
        Stage("hangs", 1, 1.0, python("import time; print('deep in thought', flush=True); time.sleep(60)")),
        Stage("fine", 2, 60, python("print('all is well')")),
    ]
    assert hour() == 1
    found = hour.outcomes()
    assert {name: o["status"] for name, o in found.items()} == {
        "raises": "failed", "dies": "failed", "lacks": "not run", "hangs": "out of time", "fine": "ok",
    }  # fmt: skip
    assert found["raises"]["why"] == "ValueError: no kernel image"
    assert found["hangs"]["why"] == "stopped after 1 s; deep in thought"
    assert "needs no_such_package, nor_this: " in found["lacks"]["why"] and "json" not in found["lacks"]["why"]
    assert "--wheels" in found["lacks"]["why"]
    assert "all is well" in (hour.out / found["fine"]["log"]).read_text()
    assert "1 of 5 stages are well" in hour.report and all(name in hour.report for name in found)
    assert hour("--only", "fine") == 0


@pytest.mark.slow
def test_a_part_ends_with_its_budget_and_the_other_has_its_own(hour: Hour) -> None:
    sleep = python("import time; time.sleep(60)")
    hour.stages = [Stage("first", 1, 60, sleep), Stage("second", 1, 60, sleep), Stage("third", 2, 60, python(""))]
    start = time.monotonic()
    assert hour("--budget", "1.5") == 1
    assert time.monotonic() - start < 30
    found = hour.outcomes()
    assert found["first"]["status"] == "out of time" and found["second"]["why"] == "no time left"
    assert found["third"]["status"] == "ok"


def test_parts_by_themselves_add_to_one_report(hour: Hour) -> None:
    hour.stages = [Stage("one", 1, 60, python("")), Stage("two", 2, 60, python(""))]
    assert hour("--part", "1") == 0
    assert list(hour.outcomes()) == ["one"]
    assert hour("--part", "2") == 0
    assert list(hour.outcomes()) == ["one", "two"] and "2 of 2 stages are well" in hour.report


@pytest.mark.slow
def test_what_a_stage_started_ends_with_it(hour: Hour, tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    hour.stages = [Stage("parent", 1, 4.0, python(code))]
    assert hour() == 1
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "Z (zombie)" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the stage's child lives on")


def test_a_killed_hour_leaves_a_report_and_no_stage(hour: Hour, tmp_path: Path) -> None:
    """SIGTERM, as of an impatient timeout."""
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    script = (
        f"import sys, first_hour; from first_hour import Stage\n"
        f"first_hour.stages = lambda *_: [Stage('fine', 1, 60, {python('')!r}), Stage('long', 1, 60, {python(code)!r})]\n"
        f"sys.exit(first_hour.main(['--device', 'cpu', '--out', {str(hour.out)!r}]))"
    )
    process = subprocess.Popen(python(script), env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")})
    log = hour.out / "logs" / "101-long.log"
    for _ in range(300):
        if log.is_file() and len(log.read_text().split("\n")) > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert "1 of 1 stages are well" in hour.report
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split("\n")[-2]), 0)


@pytest.mark.slow
def test_wheels_stand_in_for_a_network(hour: Hour, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "first_hour_toy-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("first_hour_toy.py", "print('carried along')")
        info = "first_hour_toy-1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: first-hour-toy\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    hour.stages = [Stage("toy", 1, 60, python("import first_hour_toy"), "first_hour_toy")]
    assert hour() == 1 and hour.outcomes()["toy"]["status"] == "not run"
    assert hour("--wheels", str(wheels)) == 0
    assert "installed first_hour_toy-1-py3-none-any.whl" in hour.report
    (wheels / "broken-1-py3-none-any.whl").write_text("no zip")
    assert hour("--wheels", str(wheels)) == 0  # the first one is still there
    assert "pip could not install" in hour.report


def test_only_the_build_differs_between_a_cpu_and_a_gpu() -> None:
    cpu, gpu = (first_hour.environment(device, Path("out")) for device in ("cpu", "cuda"))
    assert cpu["ECT_SKIP_CUDA"] == gpu["ECT_CUDA_REQUIRED"] == "1"
    assert cpu["PYTHONPATH"].split(os.pathsep)[:2] == [str(Path("out/work/site")), str(ROOT)]
    assert cpu["PATH"].startswith(str(Path("out/work/site/bin")))
    assert {k: v for k, v in cpu.items() if k != "ECT_SKIP_CUDA"} == {
        k: v for k, v in gpu.items() if k != "ECT_CUDA_REQUIRED"
    }


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("3,5", "5")])
def test_every_stage_sees_the_chosen_gpu_alone(
    visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert first_hour.environment("cuda:1", Path("out"))["CUDA_VISIBLE_DEVICES"] == expected
    assert first_hour.environment("cuda", Path("out")).get("CUDA_VISIBLE_DEVICES") == visible
    commands = [stage.command for stage in first_hour.stages("cuda:1", Path("out"))]
    assert not any("cuda:1" in part for command in commands for part in command)


@pytest.mark.slow
def test_stages_need_no_more_packages_than_they_say() -> None:
    """Others are hidden; what the stages import is imported."""
    others = "matplotlib torch_fidelity torchvision tensorboard scipy sklearn pytest"
    for hidden, imported in (
        (f"{others} tyro typeguard docstring_parser", "step_time, profile_step, ops, ect_kernels.__main__"),
        (others, "ect.train, ect.job"),
    ):
        code = f"import sys; sys.modules.update(dict.fromkeys({hidden.split()!r})); import {imported}"
        environment = first_hour.environment("cpu", Path("out"))
        done = subprocess.run(python(code), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]


def test_bad_options_are_named(
    hour: Hour, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for args, said in (
        (["--only", "dance"], "'dance'"),
        (["--wheels", str(tmp_path / "none")], "no such folder"),
        (["--device", "gpu"], "expected cuda, cuda:1 or cpu"),
        (["--device", "cuda:2"], "shows 2 GPUs"),
    ):
        with pytest.raises(SystemExit) as stop:
            hour(*args)
        assert stop.value.code == 2 and said in capsys.readouterr().err


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_is_understood(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer's options and the benchmarks' parsers, without running it."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(*args: Any, **options: Any) -> Any:
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(measure, "device_option", torch.device)  # looks for the device
    run = tmp_path / "work" / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(to_dict(PRESETS["cifar10-1h"])))
    seen = set()
    for stage in first_hour.stages(device, tmp_path):
        words = stage.command[1:]
        if words[:2] == ["-m", "ect.train"]:
            cfg = options.parse(words[2:])
            assert cfg.device == device and cfg.data.source in ("digits", str(tmp_path / "work/cifar-10-python.tar"))
            seen.add(words[1])
        elif words[0].startswith("benchmarks/"):
            name = Path(words[0]).stem
            assert (ROOT / words[0]).is_file()
            if name in ("step_time", "ops", "profile_step"):
                module = importlib.import_module(name)
                with monkeypatch.context() as patch:
                    patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
                    with pytest.raises(Parsed):
                        module.main(words[1:])
                seen.add(name)
        for path in (word for word in words if word.startswith("tests")):
            assert (ROOT / path).exists()
    assert seen == {"ect.train", "step_time", "ops", "profile_step"}


def test_the_run_has_400_steps_and_the_resumption_50_more() -> None:
    stages = {stage.name: stage.command for stage in first_hour.stages("cuda", Path("out"))}
    cfg = options.parse(stages["run"][3:])
    assert cfg.total_kimg * 1000 / cfg.batch == 400
    words = stages["resume"]
    assert float(words[words.index("--total-kimg") + 1]) * 1000 / cfg.batch == 450
    assert Path(words[words.index("--resume") + 1]) == cfg.run_dir


def test_tests_are_those_that_need_a_gpu() -> None:
    kernels, training = first_hour.gpu_tests("tests/kernels"), first_hour.gpu_tests("tests")
    assert "tests/kernels/test_levels.py" in kernels and "tests/test_gpu.py" in training
    assert not set(kernels) & set(training) and "tests/test_options.py" not in training


def test_each_part_leaves_time_for_its_first_stages() -> None:
    for part in (1, 2):
        limits = [stage.seconds for stage in first_hour.stages("cuda", Path("out")) if stage.part == part]
        assert sum(limits[:3]) < 575 and all(limit <= 300 for limit in limits)


def test_make_gpu_installs_nothing() -> None:
    env = {
        name: value for name, value in os.environ.items() if "MAKE" not in name
    }  # `make test` may have started this one
    done = subprocess.run(
        ["make", "-n", "gpu", "PART=2"], cwd=ROOT, capture_output=True, text=True, check=True, env=env
    )
    (command,) = done.stdout.splitlines()
    assert command.endswith("benchmarks/first_hour.py --part 2") and "pip" not in command


WAY = {
    "name": "as the trainer runs it", "ok": True, "start": 31.0, "ms": 20.0, "host_ms": 0.4, "launches": 700,
    "by_kind": {"conv": 12.0, "norm": 6.0}, "kernels": [{"name": f"kernel{i}", "count": i, "ms": 1.0} for i in range(60)],
    "memory": {
        "tensors": 7_000_000_000, "in_use": 9_000_000_000, "predicted_run": 11_800_000_000,
        "predicted": {"state": 1_600_000_000, "update": 5_100_000_000, "allowance": 2_100_000_000, "launches": 560},
    },
}  # fmt: skip


def test_the_report_sets_measured_beside_predicted(tmp_path: Path) -> None:
    floor = {"step": 10.0, "conv": 8.0, "norm": 1.5}
    broken = {"name": "every op on Triton", "ok": False, "why": "TypeError: params | given twice"}
    profile = {
        "net": "ddpmpp",
        "batch": 128,
        "device": "NVIDIA Toy",
        "floor": floor,
        "sheet": "Toy",
        "ways": [WAY, broken],
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    (tmp_path / "machine.json").write_text('{"GPU": "Toy, 580.1"}')
    results = tmp_path / "results"
    results.mkdir()
    row = {
        "ms": 20.0,
        "ratio": 1.0,
        "images_per_second": 6400.0,
        "predicted_minutes": 2.7,
        "launches": 700,
        "start": 3.0,
    }
    line = {
        "net": "ddpmpp", "batch": 128, "rounds": 2, "partial": "round 2 of 5", "floor": {"ms": 10.0, "what": "predicted"},
        "rows": {"plain": row, "+compile": {"ms": None, "why": "RuntimeError: no"}},
    }  # fmt: skip
    (results / "toy-ddpmpp-128.partial").write_text(json.dumps(line) + "\n")
    first_hour_report.write(tmp_path, [], ["a note"])
    text = (tmp_path / "report.md").read_text()
    for cells in (
        "ms a step | 20.00 | 10.00 | 2.00", "ms in kernels: norm | 6.00 | 1.50 | 4.00", "peak | 7.00 | 6.70 | 1.04",
        "whole run |  | 11.80 |  ", "launches | 700 | 560 | 1.25",
        "kernel0 | 0 | 1.000 | 5.6 %", "every op on Triton |  |  |  |  | TypeError: params",
        "params \\| given twice",
        "plain | 20.00 | 1.000 | 6400 | 2.7 | 700 | 3.0", "+compile | RuntimeError: no",
    ):  # fmt: skip
        assert cells in text
    assert "- a note" in text and "- GPU: Toy, 580.1" in text and "(not finished: round 2 of 5)" in text
    assert "kernel14" in text and "kernel15" not in text
    for path in (tmp_path / "profile.json", results / "toy-ddpmpp-128.partial"):  # torn by a kill
        path.write_text(path.read_text()[:-40])
    first_hour_report.write(tmp_path, [], [])
    assert "Toy" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("Traceback\nValueError: a\n", "ValueError: a"), ("begun\n\n", "begun"), ("", "it said nothing"),
        ("error: --device cuda: not usable here\nbye\n", "error: --device cuda: not usable here"),
        ("\x1b[31mtorch.AcceleratorError: x\x1b[0m\n", "torch.AcceleratorError: x"),
        ("╭─ Unrecognized options ──╮\n│ Unrecognized options: --x │\n╰──╯\n", "Unrecognized options: --x"),
    ],
)  # fmt: skip
def test_a_log_is_told_in_a_line(log: str, said: str) -> None:
    assert first_hour_report.telling(log) == said


def ours() -> set[str]:
    return {
        str(path)
        for folder in ("kernels", "ect", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix != ".pyc" and path.name != "__pycache__"  # another test may import meanwhile
    }


@pytest.mark.slow
def test_the_whole_hour_on_a_cpu(tmp_path: Path) -> None:
    out, before = tmp_path / "out", ours()
    assert first_hour.main(["--device", "cpu", "--out", str(out), "--budget", "1500"]) == 0, (
        out / "report.md"
    ).read_text()
    assert ours() == before
    found = json.loads((out / "stages.json").read_text())
    assert {outcome["status"] for outcome in found} == {"ok"}
    names = [stage.name for stage in first_hour.stages("cpu", out)]
    assert [outcome["name"] for outcome in found] == [name for name in names if name != "images again"]
    text = (out / "report.md").read_text()
    for part in (
        "## The step",
        "Measured against predicted",
        "What takes most time",
        "## Rows",
        "+flat optimizer",
        "## A run",
    ):
        assert part in text
    assert "0.08 kimg" in text and "predicted peak memory" in text  # resumed to the end
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 6 and all((out / picture).stat().st_size > 500 for picture in pictures)
