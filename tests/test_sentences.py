"""Refusals are sentences: printable, on one line, not endless, whoever's words are in them."""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from ect.data.readers.pictures import converted
from ect.errors import UserError
from ect.files.resume import ChangedMaths, refuse_changed_maths
from ect.ranks.launch import launch
from ect.ranks.paths import refuse_impossible
from ect.ranks.sentences import LONGEST, parsed, printable, sentence


@dataclass(frozen=True)
class Options:
    count: int = 3
    """How many."""
    name: str = "a"
    place: Path | None = None


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What parsing these arguments prints on its way to status 2."""
    with pytest.raises(SystemExit) as end:
        parsed(lambda: tyro.cli(Options, args=args, prog="it"))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and len(err.splitlines()) == 1
    return err


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert printable("a\x1b[2J\nb\ud800\u202eé☃") == "a\\x1b[2J\\nb\\ud800\\u202eé☃"
    assert sentence(UserError("one\ntwo")) == "one\\ntwo"
    assert len(printable("y" * 10**6)) < LONGEST + 10 and printable("a" + "y" * 10**6 + "z")[:: LONGEST + 4] == "az"


def test_an_error_of_several_lines_keeps_them() -> None:
    with pytest.raises(ChangedMaths) as caught:
        refuse_changed_maths({"seed": 1}, {"seed": "\x1b"})
    assert len(sentence(caught.value).splitlines()) == 3 and "\x1b" not in sentence(caught.value)


def test_a_parser_says_it_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--count", "x") == "error: --count: expected a number, not 'x'; see --help\n"
    assert (
        said(capsys, "--cuont", "1")
        == "error: Unrecognized options: --cuont, 1; perhaps you meant --count; see --help\n"
    )
    assert "--count" in said(capsys, "--count") and "'--name'" in said(capsys, "--name")
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int)
    with pytest.raises(SystemExit):
        parsed(lambda: parser.parse_args(["--size", "x"]))
    assert capsys.readouterr().err == "error: argument --size: invalid int value: 'x'; see --help\n"


def test_what_a_parser_takes_and_prints_passes(capsys: pytest.CaptureFixture[str]) -> None:
    def parse() -> Options:
        print("dry")
        print("beware", file=sys.stderr)
        return tyro.cli(Options, args=["--count", "4"])

    assert parsed(parse).count == 4 and capsys.readouterr() == ("dry\n", "beware\n")
    with pytest.raises(SystemExit) as end:
        parsed(lambda: tyro.cli(Options, args=["--help"]))
    assert end.value.code == 0 and "How many." in capsys.readouterr().out


def test_what_no_file_system_takes_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in [
        (Options(place=Path("a\0b")), "--place a\\x00b: no possible name (it holds a null character)"),
        (Options(place=Path("y" * 5000)), "no possible name (it is too long)"),
        (Options(name="\0"), "--name \\x00: no possible name"),
    ]:
        assert launch(lambda options=options: options, lambda *_: 0) == 2  # type: ignore[misc]
        assert words in capsys.readouterr().err
    refuse_impossible(Options(name="y" * 5000, place=Path("none/there")))


def test_sixteen_bits_become_eight_by_rounding() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(
        np.asarray(converted(Image.fromarray(values), "grey")), np.rint(values / 257).astype(np.uint8)
    )


def test_a_parser_that_says_nothing_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """An output without room or buffer."""

        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert parsed(lambda: Options(7)).count == 7


def test_an_output_without_a_letter_for_a_name_takes_it_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert launch(lambda: print("é\u2603"), pytest.fail) == 0
    sys.stdout.flush()
    assert out.getvalue().decode().split() == [r"\xe9\u2603"]
