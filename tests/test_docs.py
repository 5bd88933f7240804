"""Every command, option, path and name of the pages is run or parsed; a kind of command that is not known here fails."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.run
import tyro

from benchmarks.readme import PLACES, insert
from ect.config import Config
from ect.files.run_folder import to_dict
from ect.options import parse
from ect.presets import PRESETS
from tests.extending.loaded import forgotten
from tests.test_command_line import COMMANDS as ENTRIES
from tests.test_command_line import fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # of runpy
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
MAX_README = 130
OPTIONS = {name: kind for name, kind in ENTRIES.items() if name != "ect.train"}
PLACED = {  # what a command wants without an option
    "halved_images.py": ["digits", "a folder"],
    "readme.py": ["a file"],
    "synthetic_cifar.py": ["a file"],
}
SHORT = [  # what is run in earnest: it needs seconds, and nothing that is not here
    pytest.param("python -m ect_kernels --check", marks=pytest.mark.slow),  # where there are CPU kernels
    "python -m ect.train --preset cifar10-1h --objective.q 4",
    pytest.param("python -m ect.sample ect/models/digits.safetensors", marks=pytest.mark.slow),
    pytest.param("python benchmarks/footprint.py", marks=pytest.mark.slow),
    "python benchmarks/digits_quality.py --report",
    "python benchmarks/precision_quality.py --report",
    "python benchmarks/long_haul.py --report",
    "python benchmarks/merge_gain.py --report",
    "python benchmarks/first_hour.py --help",
]


class Block(NamedTuple):
    """A code block of a page: its language, and its lines."""

    page: str
    language: str
    lines: list[str]


def split(page: Path) -> tuple[str, list[Block]]:
    """Return the prose of a page, and its code blocks."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(not mark for mark in parts[3::4]) and len(parts) % 4 == 1, f"{page}: a code block is not closed"
    blocks = [Block(page.name, *pair) for pair in zip(parts[1::4], map(str.splitlines, parts[2::4]), strict=True)]
    return "".join(parts[::4]), blocks


PROSE = {page.name: split(page)[0] for page in PAGES}
BLOCKS = [block for page in PAGES for block in split(page)[1]]
SPANS = sorted({span for prose in PROSE.values() for span in re.findall("`([^`]+)`", prose)})
PROGRAMS = ("python", "torchrun", "make", "pip", "pytest", "git", "mkdir", "cd", "curl", ".ci/run")


def commands() -> list[str]:
    """Return each simple command that a shell block or a code span shows."""
    lines = [line for block in BLOCKS if not block.language for line in block.lines]
    spans = [span for span in SPANS if program(span) in PROGRAMS and span not in PROGRAMS[:5]]
    return sorted({shlex.join(words) for line in [*lines, *spans] for words in simple(line)})


def simple(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell line."""
    words = shlex.split(line, comments=True)
    for run, group in itertools.groupby(words, lambda word: word == "&&"):
        if not run:
            yield list(group)


def program(text: str) -> str:
    """Return the first word of a command that sets no variable."""
    return next((word for word in text.split() if not re.match(r"'?[A-Z_]+=", word)), "")


COMMANDS = commands()


class Parsed(BaseException):
    """Ends a command at the place where its options are parsed. It is no Exception, so that no command reports it."""


@contextlib.contextmanager
def parses(args: list[str]) -> Iterator[list[str]]:
    """Let a command, run inside with these arguments, end at its own parser; yields a list that gets its options' names."""
    names: list[str] = []
    original = tyro.cli

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        names.extend(self._option_string_actions)
        _, unknown = self.parse_known_args(args, namespace)
        assert not unknown, unknown
        raise Parsed

    def cli(kind: Any, **kwargs: Any) -> None:
        names.extend(options_of(kind))
        original(kind, **kwargs)
        raise Parsed

    ended = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", cli)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", ["the command", *args])
        try:
            yield names
        except Parsed:
            ended = True
    assert ended, "the command never parsed its options"


def options_of(kind: Any) -> list[str]:
    """Return the options of a dataclass as a command line has them."""
    names = []
    for path, type_ in fields(kind):
        *groups, name = (part.replace("_", "-") for part in path)
        switch = bool in (type_, *typing.get_args(type_))
        names += ["--" + ".".join([*groups, form]) for form in ([name, f"no-{name}"] if switch else [name])]
    return names


def run(argv: list[str]) -> None:
    """Run a script, or with -m a module, in this process."""
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def source(argv: list[str]) -> Path:
    if argv[0] != "-m":
        return ROOT / argv[0]
    places = [ROOT / root / argv[1].replace(".", "/") for root in (".", "kernels")]
    files = [path for place in places for path in (place.with_suffix(".py"), place / "__main__.py") if path.is_file()]
    assert files, f"python -m {argv[1]}: no such module here"
    return files[0]


def check_python(argv: list[str]) -> None:
    """Parse what `python` is given by the command's own parser."""
    if argv[:2] == ["-m", "pytest"]:
        return check_pytest(argv[2:])
    module, args = argv[1] if argv[0] == "-m" else "", argv[2:] if argv[0] == "-m" else argv[1:]
    if module == "ect.train":
        if "--resume" in args:
            folder = Path(args[args.index("--resume") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(to_dict(PRESETS["cifar10-1h"])))
        parse(args)
    elif module in OPTIONS:
        tyro.cli(OPTIONS[module], args=args)
    elif not re.search(r"sys\.argv|tyro\.cli|tyro_options\(|Parser\(", source(argv).read_text(encoding="utf-8")):
        assert not args, f"{source(argv)} takes no arguments"
    elif "--help" not in args:
        with parses(args):
            run(argv)


def check_torchrun(args: list[str]) -> None:
    known = torch.distributed.run.get_args_parser().parse_args(args)
    assert known.module
    check_python(["-m", known.training_script, *known.training_script_args])


def check_make(args: list[str]) -> None:
    """Ask make itself whether it knows the target; a variable must mean something to it."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"$({word.partition('=')[0]})" in text for word in args if "=" in word)
    subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)


def check_pip(args: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if args[0] == "uninstall":
        assert args[1:] == ["ect"], "the name of version 0.1"
        return
    assert args[:2] == ["install", "-e"] and len(args) == 3
    found = re.fullmatch(r"\.(?:\[(\w+)\])?", args[2])
    assert found and found[1] in {None, *extras}


def check_pytest(args: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", action="store_true")
    parser.add_argument("files", nargs="*")
    assert all((ROOT / file).is_file() for file in parser.parse_args(args).files)


def check_curl(args: list[str]) -> None:
    """Want a download that a later command takes by its name."""
    option, url = args
    name = url.rpartition("/")[2]
    assert option == "-O" and url.startswith("https://") and any(f"datasets/{name}" in c for c in COMMANDS)


def nothing(args: list[str]) -> None:
    assert len(args) <= 3


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "curl": check_curl,
    "mkdir": nothing,
    "cd": nothing,
    "git": nothing,
    ".ci/run": nothing,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_own_parser_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        assert is_read(words.pop(0).partition("=")[0])
    monkeypatch.chdir(tmp_path)
    assert words[0] in CHECKS, f"{command}: no check for this kind of command; add one to CHECKS"
    CHECKS[words[0]](words[1:])


@pytest.mark.parametrize("start", SHORT)
def test_a_short_command_runs(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [command for command in COMMANDS if command.startswith(start)]
    assert found, f"no page shows {start}"
    for name in ("ect", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    for argv in (shlex.split(command)[1:] for command in found):
        monkeypatch.setattr(sys, "argv", argv[1:] if argv[0] == "-m" else argv)
        status: object = 0
        try:
            run(argv)
        except SystemExit as end:
            status = end.code
        finally:
            torch.set_num_threads(threads)
        assert not status


def test_the_commands_that_are_run_are_not_all_and_not_none() -> None:
    """A page whose blocks are not found would pass everything above."""
    assert len(COMMANDS) > 50
    assert {program(command) for command in COMMANDS} <= CHECKS.keys()
    assert {block.language for block in BLOCKS} == {"", "python", "bibtex"}
    assert not [line for prose in PROSE.values() for line in re.findall(r"^    (\S+)", prose, re.M) if line in PROGRAMS]


def test_an_unknown_option_or_target_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        "python benchmarks/ops.py --no-such-option",
        "python benchmarks/readme.py",
        "python -m ect.train --no-such-option",
        "python -m ect.sample --no-such-option x",
        "torchrun --no-such-option -m ect.train",
        "pytest --no-such-option",
    ):
        with pytest.raises((SystemExit, AssertionError)):
            CHECKS[command.split()[0]](command.split()[1:])
    with pytest.raises(subprocess.CalledProcessError):
        check_make(["no-such-target"])
    for wrong in (lambda: check_pip(["install", "-e", ".[no]"]), lambda: check_python(["-m", "ect.no_such"])):
        with pytest.raises(AssertionError):
            wrong()


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = "\n".join("\n".join(block.lines) for block in BLOCKS if block[:2] == (page, "python"))
    module = types.ModuleType(page)
    monkeypatch.setitem(sys.modules, page, module)  # where dataclasses look up the types of their fields
    with forgotten():
        exec(compile(code, page, "exec"), vars(module))


@functools.cache
def other_options() -> frozenset[str]:
    """Return the options of every command but ect.train."""
    names = [name for kind in OPTIONS.values() for name in options_of(kind)]
    for argv in [*([str(path)] for path in sorted((ROOT / "benchmarks").glob("*.py"))), ["-m", "ect_kernels"]]:
        with parses(PLACED.get(Path(argv[0]).name, [])) as found:
            run(argv)
        names += found
    return frozenset(names)


@pytest.mark.parametrize("span", [span for span in SPANS if span.startswith("--")])
def test_every_option_in_the_prose_is_one(span: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a value it is parsed as an option of ect.train."""
    monkeypatch.chdir(tmp_path)
    words, known = shlex.split(span), set(options_of(Config))
    names = {word for word in words if word.startswith("--")}
    assert names <= known | other_options(), span
    takes_none = {name for name in known if {name, re.sub(r"^(--.*\.|--)(no-)?", r"\1no-", name)} <= known}
    if names <= takes_none or len(names) < len(words):
        assert parse(words)


def is_read(variable: str) -> bool:
    """Say whether the code reads an environment variable."""
    files = [ROOT / "setup.py", *(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").glob("*.py")]
    return any(f'"{variable}"' in file.read_text(encoding="utf-8") for file in files)


def test_every_variable_is_read() -> None:
    variables = {span.partition("=")[0] for span in SPANS if re.match(r"ECT_\w+|CXX$", span)}
    assert variables and all(map(is_read, variables))


def test_every_path_exists() -> None:
    """`<op>` stands for some op."""
    paths = [span for span in SPANS if re.fullmatch(r"(ect|kernels|csrc|tests|benchmarks|docs)/[\w./<>-]+", span)]
    assert len(paths) > 50
    assert [path for path in paths if not list(ROOT.glob(re.sub(r"<\w+>", "*", path)))] == []


def test_every_name_exists() -> None:
    names = [span for span in SPANS if re.fullmatch(r"ect(_kernels)?(\.\w+)+", span)]
    assert names
    for name in names:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page.name]):
        file, _, anchor = target.partition("#")
        if file.startswith("https://"):
            continue
        assert (page.parent / file).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", (page.parent / file).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_readme_is_short_and_each_page_is_within_it() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README
    assert all(f"(docs/{page.name})" in PROSE["README.md"] for page in PAGES if page.parent.name == "docs")


def test_every_preset_is_in_the_recipes() -> None:
    assert all(f"`{name}`" in PROSE["recipes.md"] for name in PRESETS)


def test_the_foreign_package_is_never_recommended() -> None:
    files = [*PAGES, *(ROOT / "ect").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "pyproject.toml"]
    assert not [
        file for file in files if re.search(r"""\binstall\W+ect\b|["']ect\[""", file.read_text(encoding="utf-8"))
    ]


def test_make_readme_finds_its_places() -> None:
    for name, path in PLACES.items():
        text = path.read_text(encoding="utf-8")
        changed = insert(text, name, "| a new table |")
        assert "| a new table |" in changed and insert(changed, name, "| another |") == insert(
            text, name, "| another |"
        )
    with pytest.raises(ValueError, match="markers of 'digits' are missing"):
        insert("no markers here", "digits", "")
