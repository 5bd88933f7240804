"""The folder of a run: refused starts leave none, one process holds it, and a resume finds what it says it finds."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ect.config import Config, EvalConfig
from ect.errors import UserError
from ect.files import lock
from ect.files.atomic import atomic
from ect.files.lock import LOCK, locked
from ect.files.run_folder import load, new_run_dir, resolved
from ect.job import Job
from ect.options import parse
from ect.show.log import RunLog
from ect.train import main
from tests.test_checkpoint import foreign
from tests.tiny import config, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config(), tmp_path_factory.mktemp("finished") / "run").run_dir


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# --- making it ---


@pytest.mark.parametrize("run_dir", [[], ["--run-dir", "a/b"]], ids=["numbered", "named"])
@pytest.mark.parametrize("refused", ["init-from", "metric"])
def test_a_refused_start_leaves_no_folder(
    run_dir: list[str],
    refused: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def no_metric(*args: Any, **kwargs: Any) -> None:
        raise UserError("no metric")

    if refused == "metric":
        monkeypatch.setattr("ect.job.make_evaluator", no_metric)
    options = ["--pretrain", "None", *(["--init-from", "nope.pkl"] if refused == "init-from" else []), *run_dir]
    assert main(options) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    assert main(options) == 2 and [path.name for path in tmp_path.rglob("*")] == ["runs"]


@pytest.mark.parametrize("run_dir", ["file/x", "file", "n" * 300, "a/" + "n" * 300, "~nobody-of-this-name/x"])
def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["--pretrain", "None", "--run-dir", run_dir]) == 2
    err = capsys.readouterr().err
    assert f"--run-dir {run_dir}: " in err and "choose another" in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_runs_that_is_a_file_or_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(
        UserError, match=r"^runs, where a run without --run-dir goes: cannot make .*choose another with"
    ):
        new_run_dir(Config())
    (tmp_path / "runs").unlink()

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    for cfg in (Config(), Config(run_dir=Path("x"))):
        with pytest.raises(UserError, match=r"cannot make this folder \(Permission denied\)"):
            new_run_dir(cfg)


# --- one process in it ---


@pytest.mark.slow
def test_two_new_runs_that_found_the_same_folder_empty(tmp_path: Path) -> None:
    first, second = (Job(config(run_dir=tmp_path / "run"), Console(quiet=True)) for _ in range(2))
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process works in this folder"):
        second.run()
    assert first.run()
    with pytest.raises(UserError, match="not an empty folder"):
        second.run()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock there")
def test_who_asks_for_the_holder_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    (tmp_path / LOCK).touch()
    asking = (tmp_path / LOCK).open()
    fcntl.flock(asking, fcntl.LOCK_SH)  # as `holder` does, for a moment
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: asking.close())
    with locked(tmp_path):
        assert lock.holder(tmp_path) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="no flock there")
def test_a_kill_leaves_a_file_that_locks_nothing(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        from ect.files.lock import locked
        with locked(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / LOCK).exists()
    assert new_run_dir(Config(run_dir=tmp_path)) == tmp_path  # nothing but a lock is as good as empty
    with locked(tmp_path):
        assert f"process {os.getpid()}\n" in (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no flock there")
def test_a_lock_file_that_its_holder_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, calls = lock.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists() and len(calls) == 2


def test_where_there_are_no_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lock, "fcntl", None)  # Windows
        with locked(tmp_path):
            assert not list(tmp_path.iterdir())

    def none(descriptor: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="no locks here"), locked(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no flock there")
def test_a_lock_without_room_for_its_text_holds_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
            pass
    monkeypatch.setattr(Path, "unlink", full)
    with pytest.warns(UserWarning, match="lock: cannot be removed"), locked(tmp_path):
        pass


def test_what_a_kill_left_goes_once_the_folder_is_ours(tmp_path: Path) -> None:
    left = [tmp_path / ".config.json.1.tmp", tmp_path / ".tmpAbC123", tmp_path / "pretrain" / ".latest.1.tmp"]
    kept = [tmp_path / "config.json", tmp_path / "pretrain" / "latest", *foreign(tmp_path)]
    left[2].parent.mkdir()
    for path in left + kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with locked(tmp_path):
        assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_links_in_the_folder_of_a_stranger_lead_to_no_file_of_ours(tmp_path: Path) -> None:
    folder, ours = tmp_path / "run", tmp_path / "ours"
    folder.mkdir()
    ours.write_text("precious\n")
    for name in ("lock", "stats.jsonl", "history.jsonl"):
        (folder / name).symlink_to(ours if name != "history.jsonl" else tmp_path / "new")
    with pytest.raises(UserError, match="lock: cannot write it"), locked(folder):
        pass
    with pytest.warns(UserWarning, match=r"(stats|history)\.jsonl cannot be written, the run goes on without"):
        log = RunLog(folder, 64, quiet=True)
    with log:
        log.row(64, {"loss": 1.0})
    (folder / f".latest.{os.getpid()}.tmp").symlink_to(ours)
    with atomic(folder / "latest") as temporary:
        temporary.write_text("checkpoint")
    assert ours.read_text() == "precious\n" and sorted(tmp_path.iterdir()) == [ours, folder]


def test_a_kill_at_the_very_start_leaves_a_folder_for_a_new_run(tmp_path: Path) -> None:
    for name in (LOCK, ".config.json.1.tmp"):
        (tmp_path / name).touch()
    assert new_run_dir(Config(run_dir=tmp_path)) == tmp_path
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        new_run_dir(Config(run_dir=tmp_path))


# --- what a resume finds ---


@pytest.mark.slow
@pytest.mark.parametrize("left", [("latest", "stats.jsonl"), ("latest",), ("stats.jsonl",)])
def test_a_resume_of_a_run_whose_checkpoints_are_gone_is_refused(left: tuple[str, ...], folder: Path) -> None:
    gone = list(folder.glob("checkpoint-*")) + [folder / name for name in {"latest", "stats.jsonl"} - {*left}]
    for path in gone:
        path.unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=rf"its checkpoints are gone: {' and '.join(left)} say"):
        Job(parse(["--resume", str(folder)]), Console(quiet=True)).run()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(folder: Path, finished: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not path.name.endswith("80.state.safetensors"):  # as a kill within the first save leaves
            path.unlink()
    (folder / "latest").unlink()
    (folder / "stats.jsonl").write_text("")
    console = Console(file=io.StringIO(), record=True)
    assert Job(parse(["--resume", str(folder)]), console).run()
    assert "no checkpoint yet, starting anew" in console.export_text()
    nimg = [[json.loads(line)["nimg"] for line in (path / "stats.jsonl").open()] for path in (folder, finished)]
    assert nimg[0] == nimg[1]


@pytest.mark.slow
def test_a_phase_that_is_gone_is_not_trained_again(tmp_path: Path) -> None:
    cfg = config(pretrain="digits-diffusion", pretrain_kimg=0.016, eval=EvalConfig(samples=0))
    run(cfg, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    with pytest.raises(UserError, match="the phase before is gone"):
        Job(replace(cfg, resume=tmp_path / "run"), Console(quiet=True)).run()
    assert not (tmp_path / "run" / "pretrain").exists()


WRONG = [
    "[]",
    "3",
    "null",
    '"x"',
    "{",
    "[" * 100_000,
    '{"format": []}',
    '{"resolved": 3}',
    '{"seed": "x"}',
    '{"net": 3}',
]
WRONG += ['{"optim": {"betas": [1]}}', '{"optim": {"emas": 3}}', '{"format": "x"}', '{"format": null, "batch": 1e999}']


@pytest.mark.parametrize("text", WRONG)
def test_a_config_with_wrong_types_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        load(tmp_path), resolved(tmp_path)


def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    for read in (load, resolved):
        with pytest.raises(UserError, match=r"config\.json: "):
            read(tmp_path)
