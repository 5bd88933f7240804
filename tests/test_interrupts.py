"""Signals at any moment, and a reader who leaves: no traceback, and the status that a shell knows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ect.ranks import interrupts
from ect.ranks.interrupts import ENDING, answered_by, install
from ect.ranks.launch import launch
from ect.ranks.stop import StopSignal

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor this pipe")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
ROOT = Path(__file__).parents[1]
COMMANDS = ["train", "sample", "evaluate", "convert", "doctor", "scaling"]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()


@POSIX
@pytest.mark.parametrize("module", COMMANDS)
def test_a_signal_while_a_command_imports(module: str, tmp_path: Path) -> None:
    """Its first import after the handler's stands in for all: it sends the signal, and must not be survived."""
    (tmp_path / "tyro.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nimport time\ntime.sleep(60)\n"
    )
    env = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", f"ect.{module}"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_help_for_a_reader_who_leaves_is_quiet(module: str, tmp_path: Path) -> None:
    with started(["-m", f"ect.{module}", "--help"], tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=60) == interrupts.NOBODY_READS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_help_onto_a_full_disk_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end, interrupts.read_or_not():
            print("help")
        full.write("more")  # goes nowhere from now on
    assert end.value.code == 2
    assert capfd.readouterr().err == (
        "error: the output cannot be written (No space left on device); send it where there is room\n"
    )


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("number", ENDING)
def test_work_is_interrupted_with_the_status_of_the_signal(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in ENDING]
    assert launch(lambda: 0, lambda options, world: signal.raise_signal(number), interrupted="gone") == 128 + number
    assert capsys.readouterr().err == "gone\n"
    assert [signal.getsignal(each) for each in ENDING] == before


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("number", ENDING)
def test_each_signal_stops_a_run_after_its_step_and_the_second_at_once(number: signal.Signals) -> None:
    stop = StopSignal()
    with stop.watch():
        signal.raise_signal(number)
        assert stop.heard()
        with pytest.raises(KeyboardInterrupt) as error:
            signal.raise_signal(number)
    assert interrupts.status(error.value) == 128 + number


@POSIX
def test_a_signal_of_a_closed_terminal_stops_a_run_though_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    stop = StopSignal()
    with monkeypatch.context() as patch, stop.watch():
        patch.setattr(sys, "stderr", Gone())
        signal.raise_signal(signal.SIGHUP)
    assert stop.heard()


@POSIX
def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal().watch(), answered_by(interrupts.interrupt):
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is interrupts.interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_install_nothing() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(install(interrupts.leave)))
    thread.start()
    thread.join()
    assert found == [{}]


@POSIX
@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_it(tmp_path: Path) -> None:
    options = "--pretrain None --total-kimg 1 --eval.samples 0 --log.sample-kimg 0 --run-dir run --net.model-channels 8"
    with started(["-m", "ect.train", *options.split(), "--net.attn-resolutions"], tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=120) == 0 and "Traceback" not in err
    assert (tmp_path / "run" / "results.md").is_file()


@POSIX
@pytest.mark.slow
def test_a_rating_goes_on_when_nobody_reads_it(tmp_path: Path) -> None:
    options = f"{ROOT}/ect/models/digits.safetensors --samples 50 --repeats 1 --device cpu --threads 1 --run-dir rated"
    with started(["-m", "ect.evaluate", *options.split()], tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=120) == 0 and "Traceback" not in err
    assert (tmp_path / "rated" / "metrics.json").is_file()
