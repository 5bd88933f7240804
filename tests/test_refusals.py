"""A command that is refused leaves nothing behind, whatever refuses it and wherever it would have written."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ect import evaluate, sample, train
from ect.convert import __main__ as convert
from ect.doctor import __main__ as doctor
from ect.files.run_folder import evaluation_dir, leaving_nothing
from ect.scaling import __main__ as scaling
from tests.test_sample import write_model

MAINS: dict[str, Callable[[list[str]], object]] = {
    "convert": convert.main,
    "doctor": doctor.main,
    "evaluate": evaluate.main,
    "sample": sample.main,
    "scaling": scaling.main,
    "train": train.main,
}
REFUSED = [  # command, arguments; {model}: a model of coloured images, {file}: a file that is none
    ("convert", "{file} {new}/a.safetensors"),
    ("convert", "{model} {new}/a.safetensors"),
    ("doctor", "{new}"),
    ("evaluate", "{new}/a.safetensors --run-dir {new}/a"),
    ("evaluate", "{model} --run-dir {new}/a"),  # does not say what it was trained on
    ("evaluate", "{model} --data digits --run-dir {new}/a"),
    ("evaluate", "{model} --reference {file} --no-download --run-dir {new}/a"),
    ("evaluate", "{model} --reference {file} --no-download"),
    ("evaluate", "{digits} --samples 1 --run-dir {new}/a"),
    ("evaluate", "{digits} --weights {new} --run-dir {new}/a"),
    ("evaluate", "{digits} --run-dir {file}/a/b"),
    ("sample", "{new}/a.safetensors --out {new}/a/b"),
    ("sample", "{file} --out {new}/a/b.png"),
    ("sample", "{model} --class 3 --out {new}/a/b.npz"),
    ("sample", "{model} --mid-t 0 --out {new}/a"),
    ("sample", "{model} --out {file}/a/b"),
    ("sample", "{model} --out {new}/a.jpg"),
    ("scaling", "--metric KID --out {new}/a --device cpu"),
    ("scaling", "--preset cifar10-1h --out {new}/a --device cpu"),
    ("scaling", "--preset fashion --out {new}/a --device cpu"),  # whose data are not here
    ("scaling", "--nfe 3 --out {new}/a --device cpu"),
    ("scaling", "--widths 8 8 --out {new}/a --device cpu"),
    ("scaling", "--widths 8 --kimg 1 --seeds 0 --out {file}/a --device cpu"),
    ("scaling", "--widths 8 --kimg 1 --seeds 0 --out {file} --device cpu"),
    ("scaling", "--report {file}"),
    ("scaling", "--report {new}"),
    ("train", "--init-from {new}/a.safetensors --run-dir {new}/a --device cpu"),
    ("train", "--init-from {file} --run-dir {new}/a --device cpu"),
    ("train", "--data.source {new} --run-dir {new}/a --device cpu"),
    ("train", "--resume {new} --device cpu"),
    ("metrics.features", "--out {new}/a.npz"),
    ("metrics.features", "--out {file}"),
    ("metrics.features", "--out a.npz --seed -1"),
    ("tangent", "--out {new}/a.npz"),
    ("tangent", "--data.source {new} --out a.npz"),
]


def status(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    try:
        if command in MAINS:
            return MAINS[command](arguments)
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        runpy.run_module(f"ect.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # of runpy
@pytest.mark.parametrize(("command", "arguments"), REFUSED)
def test_a_refused_command_leaves_nothing(
    command: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "file").write_text("x")
    model = write_model(tmp_path / "model.safetensors")
    digits = Path(sample.__file__).parent / "models" / "digits.safetensors"
    places = {"file": tmp_path / "file", "model": model, "digits": digits, "new": tmp_path / "new"}
    before = sorted(tmp_path.rglob("*"))
    assert status(command, arguments.format(**places).split(), monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    made: list[Path] = []
    (tmp_path / "there").mkdir()
    places = [tmp_path / "there" / "a" / "b", tmp_path / "there"]
    with pytest.raises(ZeroDivisionError), leaving_nothing(made):
        assert len([evaluation_dir(place, Path("m"), None, made).is_dir() for place in places]) / 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"] and len(made) == 2
