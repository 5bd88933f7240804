"""Each option of each command with values of another type, out of bounds, not finite, huge, empty, long, foreign: either the
work begins, or status 2, one sentence that names option and value, and nothing is left behind.

The options come from the commands' own parsers: a new one is walked without a change here. A new command is missed by name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests import edm_files as edm
from tests.test_commands_of_benchmarks import COMMANDS as BENCHMARKS

LONG = "y" * 5_000
FAR = ["nan", "inf", "1e300", "-1e300", str(10**30), str(-(10**30))]
"""No number that a command can use."""
PERHAPS = ["0", "-1", str(10**12)]
"""A number that some options take."""
FOREIGN = ["", "x", "é☃", "a\0b", LONG]
MODEL, SNAPSHOT, RUN = "ect/models/digits.safetensors", "snapshot.pkl", "tests/fixtures/v0.1/two-phases"
TINY = (
    "--batch 8 --total-kimg 0.4 --net.model-channels 8 --net.channel-mult 1 --net.num-blocks 1 --pretrain None --device cpu "
    "--net.attn-resolutions 4 --objective.n-stages 4 --eval.samples 0 --log.sample-kimg 0 --threads 1"
)
ROOT = Path(__file__).parents[1]


class Began(BaseException):
    """The work began, so the options were taken. It is no Exception: no command reports it."""


def began(*_: Any, **__: Any) -> Any:
    raise Began


@dataclass(frozen=True)
class Command:
    """A module with a `main`. given: what it needs, positional arguments by name. before: options that make it small.
    work: functions that begin the work. sooner: one that begins it for numbers, which are checked before."""

    module: str
    work: tuple[str, ...]
    given: dict[str, str] = field(default_factory=dict)
    before: str = ""
    sooner: str | None = None

    def run(self, argv: list[str]) -> int:
        try:
            status = importlib.import_module(self.module).main(argv)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else -1
        return status or 0


COMMANDS = {
    "ect.train": Command("ect.train", ("ect.cost.memory.plan",), before=TINY, sooner="ect.train.train"),
    "ect.sample": Command(
        "ect.sample", ("ect.sample.generate", "ect.sample.draw"), {"checkpoint": MODEL}, "--device cpu"
    ),
    "ect.evaluate": Command("ect.evaluate", ("ect.evaluate.make_evaluator",), {"model": MODEL}, "--device cpu"),
    "ect.convert": Command(
        "ect.convert.__main__",
        ("ect.convert.__main__.save_model",),
        {"source": SNAPSHOT, "destination": "x.safetensors"},
    ),
    "ect.data.imagenet": Command(
        "ect.data.imagenet.__main__",
        ("ect.data.imagenet.__main__.find",),
        {"source": "tests/fixtures", "destination": "x.zip"},
    ),
    "ect.doctor": Command("ect.doctor.__main__", ("ect.doctor.__main__._line",), {"run": RUN}),
    "ect.merge": Command("ect.merge.__main__", ("ect.files.kept.listed",), {"run": RUN}, "--search --device cpu"),
    "ect.metrics.features": Command("ect.metrics.features", ("ect.metrics.features.train",), before="--out x.npz"),
    "ect.scaling": Command("ect.scaling.__main__", ("ect.scaling.__main__.begun",)),
    "ect.tangent": Command("ect.tangent.__main__", ("ect.tangent.__main__.train",), before="--device cpu --out x.npz"),
    "ledger": Command(
        "ledger", ("ledger.train", "ledger.show", "ledger.check", "ledger.smoke", "lib.ledger_pilot.pilot")
    ),
    "ect_kernels": Command("ect_kernels.__main__", ("ect_kernels.__main__.built",)),
    **{
        name: Command(name, tuple(f"{name}.{function}" for function in work), given, before)
        for name, work, given, before in [
            ("digits_edm2", ["one_seed", "show"], {}, ""),
            ("digits_quality", ["one_seed", "show"], {}, ""),
            ("first_hour", ["work"], {}, "--device cpu"),
            ("footprint", ["build"], {}, ""),
            ("halved_images", ["write"], {"source": "digits", "folder": "out"}, ""),
            ("long_haul", ["haul", "show"], {}, ""),
            ("kernel_report", ["compile_all", "compile_row_loops"], {}, ""),
            ("machine_facts", ["facts"], {"file": "x.json"}, ""),
            ("merge_gain", ["train", "show"], {}, ""),
            ("ops", ["_load_emulator"], {}, "--device cpu"),
            ("plots", ["render"], {}, ""),
            ("precision", ["measure"], {"checkpoint": MODEL}, "--device cpu"),
            ("precision_quality", ["tune", "show"], {}, "--results none"),
            ("profile_step", ["run"], {}, "--device cpu --net digits"),
            ("readme", ["save_model"], {"run_dir": "x"}, ""),
            ("roofline", ["table"], {}, ""),
            ("step_time", ["run", "teacher"], {}, "--device cpu --net digits"),
            ("synthetic_cifar", ["write"], {"file": "x.tar"}, ""),
        ]
    },
}


class Found(BaseException):
    """A parser, on the way to its parse."""


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser that a command makes."""

    def cli(kind: Any, **kwargs: Any) -> None:
        default = {"default": kwargs["default"]} if "default" in kwargs else {}
        raise Found(tyro.extras.get_parser(kind, **default))

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        raise Found(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", cli)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            command.run([])
        except Found as found:
            return found.args[0]  # type: ignore[no-any-return]
    pytest.fail("it never parsed its options")


def is_number(action: argparse.Action) -> bool:
    """Whether an option takes numbers only, or "None" beside them: by tyro's name of its type, or by what argparse's takes."""
    if action.choices or action.nargs == 0:
        return False
    if callable(action.type):
        with contextlib.suppress(Exception):
            return isinstance(action.type("100"), int | float)
        return False
    named = str(action.metavar).replace("{None}|", "").replace("|{auto}", "")
    return any(kind in named for kind in ("INT", "FLOAT"))


def values(action: argparse.Action) -> Iterator[list[str]]:
    """The words to put behind an option, a value at a time."""
    if action.nargs == 0:
        yield from (["é" + LONG], ["nan"])
    elif is_number(action):
        count = action.nargs if isinstance(action.nargs, int) else 1
        yield from ([value] * count for value in [*FAR, *PERHAPS, "x", "", f"é☃\0{LONG}"])
        yield [] if count == 1 else ["1"] * (count - 1)
        if action.nargs in ("*", "+"):
            yield ["1"] * 1000
    else:
        yield from ([value] for value in [*FOREIGN, "-1", "1e300"])


def shown(value: str) -> list[str]:
    """How a sentence may have a value; any of them will do."""
    ways = [value[:40], ascii(value)[1:-1][:40], value[:20].replace("\0", "\\x00")]
    with contextlib.suppress(ValueError):
        ways += [str(float(value)), f"{float(value):g}"]
    return ways


def names(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.dest)


def actions(name: str) -> list[argparse.Action]:
    return [action for action in parser_of(COMMANDS[name])._actions if action.dest != "help"]


WALKS = [(name, action) for name in COMMANDS for action in actions(name)]


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.untraced  # the other tests of commands reach the same lines
@pytest.mark.parametrize(("name", "action"), WALKS, ids=[f"{name} {names(action)}" for name, action in WALKS])
def test_an_option_is_taken_or_refused_in_a_sentence(
    name: str, action: argparse.Action, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    command, wrong = COMMANDS[name], []
    monkeypatch.chdir(tmp_path)
    for place in [command.sooner] if command.sooner and is_number(action) else command.work:
        module, _, function = place.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), function, began)
    (tmp_path / SNAPSHOT).write_bytes(edm.dump({"ema": edm.small_net()}))
    places = {MODEL: str(ROOT / MODEL), RUN: str(ROOT / RUN), SNAPSHOT: str(tmp_path / SNAPSHOT)}
    given = {key: places.get(value, value) for key, value in command.given.items()}
    for number, words in enumerate(values(action)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        positional = given | ({} if action.option_strings else {str(action.dest): words[0] if words else ""})
        option = [action.option_strings[0], *words] if action.option_strings else []
        if len(words) == 1 and words[0].startswith("-") and option:
            option = [f"{option[0]}={words[0]}"]  # or it would be taken for an option
        try:
            status = command.run([*positional.values(), *shlex.split(command.before), *option])
        except Began:
            status = 0
        except Exception as error:
            wrong.append(f"{words}: a traceback, {error!r}"[:300])
            continue
        _, err = capsys.readouterr()
        if status == 0:
            if is_number(action) and set(words) & {*FAR, "x", ""}:
                wrong.append(f"{words}: taken")
            continue
        faults = {
            f"status {status}": status != 2,
            "a file is left": bool(tree(folder)),
            "no sentence": len(err.splitlines()) != 1 or not err.strip().isprintable() or len(err) > 2500,
            "no option": action.nargs != 0 and names(action) not in err and bool(action.option_strings),
            "no value": words not in ([], [""], ["1"]) and not any(way in err for way in shown(words[0])),
        }
        wrong += [f"{str(words)[:60]}: {fault}: {err!r:.400}" for fault, found in faults.items() if found]
    assert not wrong, "\n".join(["", *wrong])


def test_every_command_is_walked() -> None:
    entry = {path.stem for path in (ROOT / "ect").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    inside = {
        ".".join(path.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__main__")
        for root in (".", "kernels")
        for path in itertools.chain((ROOT / root / "ect").rglob("*.py"), (ROOT / root / "ect_kernels").glob("*.py"))
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert inside | BENCHMARKS.keys() == COMMANDS.keys() and len(entry) >= 3
    assert all(WALKS.count((name, action)) == 1 for name, action in WALKS)


def test_the_walk_is_as_long_as_the_parsers_are() -> None:
    found = {names(action) for name, action in WALKS if name == "ect.train"}
    assert {"--log.keep", "--optim.lr", "--objective.P-mean", "--graph"} <= found
    numbers = {names(action) for name, action in WALKS if name == "ect.train" and is_number(action)}
    assert {"--log.keep", "--objective.P-std", "--threads", "--net.channel-mult", "--batch-per-device"} <= numbers
    assert not numbers & {"--data.source", "--optim.emas", "--net.arch", "--kernels"}
