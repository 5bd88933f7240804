"""python -m ect.doctor: the truth about healthy, running, stopped, killed, diverged, old and damaged runs."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ect.config import LogConfig
from ect.doctor.__main__ import examine, main
from ect.doctor.findings import of_phase, plain
from ect.doctor.records import Phase
from ect.errors import Diverged
from ect.files.lock import locked
from ect.ranks.distributed import Severed
from ect.show.log import RunLog
from tests.test_health import spoil_loss
from tests.test_job import interrupt_after
from tests.test_pictures import bounded_in_time
from tests.tiny import config, run

OLD = Path(__file__).parent / "fixtures" / "v0.1"
LOG = LogConfig(stats_kimg=0.016, sample_kimg=0, checkpoint_kimg=0.032, keep=9)
SUBJECTS = ["non-finite steps", "skipped steps", "loss scale", "gradient norm", "restarts", "divergence"]
ODD: list[Any] = [None, True, -1, 2**70, 10**400, 1e308, "text", "\x1b[31m", [], {}, [1], {"a": 1}]


def examined(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What is said of each subject; of two phases, of the last."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    main([str(folder)])
    out, err = capsys.readouterr()
    assert err == "" and all(line.isprintable() for line in out.splitlines())
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "it only reads"
    pairs = [line.split(": ", 1) if ": " in line else (line.rstrip(":"), "") for line in out.splitlines()]
    damage = " | ".join(said.strip() for subject, said in pairs if subject == "damage")
    return {subject: said.strip() for subject, said in pairs if subject != "damage"} | {"damage": damage}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config(log=LOG), tmp_path_factory.mktemp("healthy") / "run").run_dir


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def drop_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.slow
def test_a_whole_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = examined(whole, capsys)
    assert said["run"] == f"{whole}, preset digits" and said["state"] == "finished"
    assert said["rows"].startswith("5, from 0.016 kimg to 0.08 kimg, the last loss ")
    assert said["non-finite steps"] == "0 bad updates; 0 gradient values were not finite"
    assert said["skipped steps"] == "none: no loss scale" and said["loss scale"] == "none"
    assert said["restarts"] == "0" and said["divergence"] == "none" and said["damage"] == ""
    assert said["checkpoint"] == f"{whole}/checkpoint-000000.080.safetensors, whole, after 0.08 kimg, healthy"
    assert said["next"] == f"python -m ect.sample {whole}"


@pytest.mark.slow
def test_a_run_that_was_killed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_last_line(folder / "history.jsonl")
    (folder / "lock").write_text("host x, process 1\n")  # which a kill leaves, and nobody holds
    for path in [*folder.glob("checkpoint-000000.080*"), *folder.glob("results*")]:
        path.unlink()
    (folder / "latest").write_text("checkpoint-000000.064\n")
    said = examined(folder, capsys)
    assert said["state"] == "it ended without a word: killed, or its machine stopped, after 0.08 kimg or later"
    assert said["checkpoint"].startswith(f"{folder}/checkpoint-000000.064.safetensors, whole, after 0.064 kimg")
    assert said["next"] == f"python -m ect.train --resume {folder} (it repeats 16 images)"


@pytest.mark.slow
def test_a_run_that_goes_on_now(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(folder):
        said = examined(folder, capsys)
    assert said["state"].startswith("a process trains in it now: host ") and "wait for it" in said["next"]
    assert examined(folder, capsys)["state"] == "finished"


@pytest.mark.slow
def test_a_phase_whose_checkpoints_are_all_damaged_is_not_to_be_resumed(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, folder / "pretrain")
    for path in folder.glob("checkpoint-*.state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    (folder / "results.json").unlink()
    said = examined(folder, capsys)
    assert said["checkpoint"].startswith("none: ")  # of the last phase
    assert said["next"] == "no checkpoint can be used; start a new run"


@pytest.mark.slow
def test_stops_and_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's one"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        from ect.job import Job

        assert not Job(replace(config(log=LOG), run_dir=folder)).run()
    said = examined(folder, capsys)
    assert said["state"] == "stopped by a signal at 0.04 kimg" and said["restarts"] == "0"
    assert said["next"] == f"python -m ect.train --resume '{tmp_path}/it'\"'\"'s one'"
    run(config(log=LOG, resume=folder / "checkpoint-000000.032.safetensors"), tmp_path)
    drop_last_line(folder / "history.jsonl")
    run(config(log=LOG, resume=folder / "checkpoint-000000.032.safetensors"), tmp_path)
    said = examined(folder, capsys)
    assert said["state"] == "finished"
    assert said["restarts"] == "2: at 0.032 kimg, at 0.032 kimg after a log up to 0.08 kimg (48 images lost)"


@pytest.mark.slow
def test_a_run_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    spoil_loss(monkeypatch, set(range(4, 99)))
    with pytest.raises(Diverged) as error:
        run(config(log=LOG), folder)
    said = examined(folder, capsys)
    assert said["divergence"] == str(error.value) and "first bad tensor is the gradient of" in said["divergence"]
    assert said["state"] == "diverged at 0.08 kimg"
    assert said["non-finite steps"].startswith("6 bad updates, in 3 row(s): 0.048 kimg, 0.064 kimg, 0.08 kimg; ")
    assert said["checkpoint"] == f"{folder}/checkpoint-000000.032.safetensors, whole, after 0.032 kimg, healthy"
    assert said["next"].startswith(f"python -m ect.train --init-from {folder}/checkpoint-000000.032.safetensors, with")


@pytest.mark.parametrize("length", [math.inf, math.nan, 1e308, -1e308, 0])
def test_an_impossible_length_of_a_run_is_no_end(length: float, tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "fp16", tmp_path / "run")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "total_kimg": length}))
    (state,) = [line for line in examine(folder) if line.startswith("state:")]
    assert ("not finished" in state) == (not length <= 0), state


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("name", ["lock", "latest", "stats.jsonl", "history.jsonl", "config.json"])
def test_a_pipe_in_the_folder_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with bounded_in_time():
        assert any(line.startswith("state:") for line in examine(folder))


LOSS = "rank 1 of 2 ended without a word: it was killed"


@pytest.mark.slow
def test_a_run_that_lost_a_rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "results.json").unlink()

    def ends(log: RunLog, error: BaseException) -> None:
        log.ended("lost", LOSS)  # by the thread that hears of it
        raise error

    log = RunLog(folder, 80, resume_nimg=64, quiet=True)
    log.row(72, {"loss": 1.0})
    with pytest.raises(Severed), log:
        ends(log, Severed("Connection closed by peer"))
    said = examined(folder, capsys)
    assert said["lost ranks"] == f"{LOSS}, at 0.072 kimg"
    assert said["state"] == f"ended because a rank was lost at 0.072 kimg: {LOSS}"
    assert said["next"].startswith(f"python -m ect.train --resume {folder}")
    with pytest.raises(KeyboardInterrupt), RunLog(folder, 80, resume_nimg=64, quiet=True) as log:
        ends(log, KeyboardInterrupt())  # of torchrun, which ends the others
    assert examined(folder, capsys)["state"] == f"ended because a rank was lost at 0.064 kimg: {LOSS}"
    with RunLog(folder, 64, resume_nimg=64, quiet=True) as log:
        pass
    log.ended("lost", LOSS)  # while the report was made
    said = examined(folder, capsys)
    assert said["state"] == "trained to its end; its report is missing, and a resume makes it"
    assert said["lost ranks"] == f"{LOSS}, at 0.072 kimg, {LOSS}, at 0.064 kimg"


@pytest.mark.slow
def test_without_rank_0_another_one_says_that_it_was_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_last_line(folder / "history.jsonl")
    for place in (folder, folder / "of another machine"):
        for _ in range(2):
            log = RunLog(place, 80, writes=False)
            log.ended("lost", LOSS.replace("1", "0"))
            log.ended("failed", "rank 0 says so itself")
    said = examined(folder, capsys)
    assert said["lost ranks"].count("rank 0 of 2") == 1 and said["state"].startswith("ended because a rank was lost")
    assert not (folder / "of another machine").exists()


@pytest.mark.slow
def test_a_loss_scale_its_skipped_steps_and_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_loss(monkeypatch, {0, 1, 2, 3})

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no such \x1b[31mdevice")

    monkeypatch.setattr("ect.trainer.Trainer.evaluate", fails)
    monkeypatch.setattr("ect.trainer.Trainer.grids", lambda self: fails() if self.nimg >= 80 else None)
    with pytest.raises(OSError, match="no such"):
        run(config(log=LOG, precision="fp16"), tmp_path / "run")
    said = examined(tmp_path / "run", capsys)
    assert said["skipped steps"] == "4" and said["loss scale"] == "4096 at the end, 4096 to 16384 over the rows"
    assert said["state"] == "ended by an error at 0.08 kimg: OSError: no such ?[31mdevice"
    assert said["gradient norm"].count(" spike(s) above 10 medians") == 1


@pytest.mark.parametrize("name", ["two-phases", "fp16", "diffusion-labels"])
def test_a_run_of_version_0_1(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = examined(OLD / name, capsys)
    assert said["rows"].startswith("4, from 0.016 kimg to 0.064 kimg") and said["divergence"] == "none"
    assert "of an earlier version" in said["restarts"] and "of an earlier version" in said["non-finite steps"]
    assert said["state"].startswith("not finished") and said["next"].startswith(
        f"python -m ect.train --resume {OLD / name}"
    )


@pytest.mark.slow
def test_spikes_are_counted_where_they_were(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"nimg": i, "loss": 1.0, "grad_norm": 2.0, "grad_norm_max": 3.0} for i in range(1000, 6000, 1000)]
    rows[2]["grad_norm_max"] = 50.0
    rows[3]["grad_norm"] = None
    (folder / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = examined(folder, capsys)["gradient norm"]
    assert found == "2 to 50, median 2; 1 spike(s) above 10 medians: 50 in the row at 3 kimg"


@pytest.mark.slow
def test_damage_is_named_and_the_rest_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = folder / "stats.jsonl"
    lines = stats.read_bytes().splitlines(keepends=True)
    deep = b"[" * 100_000 + b"\n"
    lines[1:1] = [b"\xff\xfe\n", b"null\n", deep, b'{"nimg": "a"}\n', b"x" * 3_000_000 + b"\n"]
    stats.write_bytes(b"".join(lines)[:-20])
    (folder / "config.json").write_bytes(b"\xff")
    said = examined(folder, capsys)
    assert said["rows"].startswith("4, from 0.016 kimg to 0.064 kimg")
    lost = "stats.jsonl: 6 line(s) hold no record, passed over: 2, 3, 4, 5, 6 and 1 more"
    assert "config.json: not a configuration this version can read" in said["damage"] and lost in said["damage"]
    (folder / "config.json").unlink()
    assert examined(folder, capsys)["damage"] == f"there is no config.json | {lost}"
    for path in folder.glob("checkpoint-*.state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    said = examined(folder, capsys)
    assert said["checkpoint"].startswith("none: ") and said["next"] == "no checkpoint can be used; start a new run"


@pytest.mark.slow
def test_no_value_of_any_field_and_no_noise_upsets_it(folder: Path) -> None:
    for name in ("stats.jsonl", "history.jsonl"):
        path, draw = folder / name, random.Random(0)
        good = path.read_bytes()
        record = json.loads(good.splitlines()[-1]) | {"skipped": 1, "loss_scale": 2.0, "reached": 3, "text": "x"}
        for key in record:
            for value in (*ODD, math.nan, math.inf):
                path.write_text((json.dumps({**record, key: value}) + "\n") * 2)
                for event in (
                    ("resume", "lost", "target", "diverged") if name == "history.jsonl" and key != "event" else ()
                ):
                    with path.open("a") as file:
                        file.write(json.dumps({**record, "event": event, key: value}) + "\n")
                said = list(of_phase(Phase.read(folder)))
                assert all(text.isprintable() for pair in said for text in pair)
        for _ in range(100):
            noise = bytearray(good)
            for _ in range(draw.randrange(1, 9)):
                noise[draw.randrange(len(noise))] = draw.randrange(256)
            path.write_bytes(noise[: draw.randrange(len(noise))])
            assert [subject for subject, _ in of_phase(Phase.read(folder))][-1] == "divergence"
        path.write_bytes(good)


@pytest.mark.parametrize("make", ["nothing", "a file", "an empty folder", "another folder", "another config"])
def test_what_is_no_run_is_refused(make: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "place"
    if make == "a file":
        path.write_text("x")
    elif make != "nothing":
        path.mkdir()
        (path / "readme.txt").write_text("x") if make == "another folder" else None
        (path / "config.json").write_text('{"model_type": "bert"}') if make == "another config" else None
    with pytest.raises(SystemExit) as end:
        main([str(path)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith(f"error: {path}: ") and len(err.splitlines()) == 1


def test_a_text_of_a_file_orders_a_terminal_about_no_more() -> None:
    assert plain("a\x1b[2J\nb\u202ec" + "d" * 999) == "a?[2J b?c" + "d" * 591
