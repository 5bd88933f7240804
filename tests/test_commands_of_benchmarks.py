"""The commands of benchmarks/: each answers --help, and ends with status 2 and one sentence on what it cannot use."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("*.py"))}
BAD = [  # command, arguments, what the sentence names; {file}: a file that is there, {none}: nothing there
    ("digits_edm2", "--report --results {none}", "{none}: no such file; leave --report out"),
    ("digits_edm2", "--report --results {file}", "leave --report out"),
    ("digits_quality", "--report --results {none}", "{none}: no such file; leave --report out"),
    ("digits_quality", "--report --results {file}", "leave --report out"),
    ("first_hour", "--device tpu", "--device tpu: expected cuda"),
    ("first_hour", "--budget -1", "--budget: -1: expected a number of at least 0"),
    ("first_hour", "--out {file}", "name a folder"),
    ("footprint", "--batch 0", "--batch: 0: expected a whole number of at least 1"),
    ("halved_images", "{none} {folder}/out", "{none}: no such file or folder"),
    ("halved_images", "digits {file}", "{file} is a file; name a folder"),
    ("kernel_report", "--arch 75", "--arch: invalid choice: 75"),
    ("ledger", "--recipes q63", "--recipes q63: no such recipe; known: diffusion, published"),
    ("ledger", "--lengths 0", "lengths above 0"),
    ("ledger", "--pilot 0", "--pilot 0: expected at least 1"),
    ("ledger", "--until -1", "--until -1.0: expected greater than 0"),
    ("ledger", "--check --results {none}", "{none}: no such file; train first"),
    ("ledger", "--report --results {file}", "has no tuning of digits"),
    ("ledger", "--smoke --results {file}", "has no line of published on smoke"),
    ("long_haul", "--steps 7", "--steps 7: expected a multiple of 200"),
    ("long_haul", "--batch 0", "--batch 0: expected at least 1"),
    ("long_haul", "--report --results {none}", "{none}: no such file; leave --report out"),
    ("merge_gain", "--ratings 0", "--ratings 0: expected at least 1"),
    ("merge_gain", "--report --results {none}", "{none}: no such file; leave --report out"),
    ("merge_gain", "--report --results {file}", "has none of --seeds"),
    ("machine_facts", "{none}/facts.json", "name a file in a folder that exists"),
    ("ops", "--images 0", "--images: 0: expected a whole number of at least 1"),
    ("ops", "--device tpu", "--device"),
    ("plots", "--results {none}", "{none}: no such folder"),
    ("precision", "--samples 0", "--samples 0: expected at least 1"),
    ("precision", "{none}", "{none}"),
    ("precision_quality", "--kimg 0", "a length above 0"),
    ("precision_quality", "--report --results {none}", "{none}: no such file; leave --report out"),
    ("profile_step", "--batch 0", "--batch: 0: expected"),
    ("profile_step", "--rounds x", "--rounds: x: expected"),
    ("profile_step", "--out {folder}", "is a folder; name a file"),
    ("readme", "{none}", "name the folder of a finished run"),
    ("roofline", "--results {none}", "{none}: no such file"),
    ("step_time", "--threads 0", "--threads: 0: expected"),
    ("step_time", "--limit 0", "--limit: 0: expected a number of at least 0.1"),
    ("step_time", "--limit nan", "--limit: nan: expected"),
    ("step_time", "--rows +magic", "no row '+magic'"),
    ("step_time", "--results {file}", "name a folder"),
    ("synthetic_cifar", "{folder}", "is a folder; name a file"),
    ("synthetic_cifar", "{file}/cifar.tar", "name a folder"),
]

OUTPUTS = {  # what a command writes into, where it can be told
    "digits_edm2": "--results {new}/a.jsonl",
    "digits_quality": "--results {new}/a.jsonl",
    "first_hour": "--out {new}/a",
    "long_haul": "--results {new}/a.jsonl",
    "merge_gain": "--results {new}/a.jsonl --runs {new}/b",
    "precision_quality": "--folder {new}/a --results {new}/a.jsonl",
    "profile_step": "--out {new}/a.json",
    "step_time": "--results {new}/a",
}


def status(name: str, arguments: list[str]) -> int:
    """The exit status of python benchmarks/NAME.py ARGUMENTS."""
    try:
        found: int = importlib.import_module(name).main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_is_for(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert 'if __name__ == "__main__":\n    sys.exit(main())\n' in COMMANDS[name].read_text()
    assert status(name, ["--help"]) == 0
    doc = importlib.import_module(name).__doc__
    assert doc
    said = capsys.readouterr().out
    assert "usage" in said.lower() and all(word in said for word in doc.split()[:4])


@pytest.mark.parametrize(("name", "arguments", "said"), BAD, ids=lambda text: text[:40])
def test_bad_input_ends_a_command_with_status_2_and_a_sentence(
    name: str, arguments: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    places = {key: str(tmp_path / key) for key in ("file", "folder", "none", "new")}
    output = OUTPUTS.get(name, "").split() if "--out" not in arguments and "--results" not in arguments else []
    before = sorted(tmp_path.rglob("*"))
    assert status(name, " ".join([*output, arguments]).format(**places).split()) == 2
    out, err = capsys.readouterr()
    assert said.format(**places) in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert out == "" and sorted(tmp_path.rglob("*")) == before, "a refused command leaves nothing"


def test_every_command_is_tried_with_bad_input_and_every_library_lies_below() -> None:
    assert {name for name, _, _ in BAD} == COMMANDS.keys()
