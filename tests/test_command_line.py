"""What --dry-run prints is taken back: switches, and every field of the configuration."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import tyro

from ect import evaluate, sample
from ect.assembly import COMPILE_PAYS_STEPS, captures, compiles, keeps_channels_last
from ect.config import Config
from ect.convert import __main__ as convert
from ect.data.imagenet import __main__ as imagenet
from ect.errors import UserError
from ect.files.run_folder import to_dict
from ect.merge import __main__ as merge
from ect.options import check, parse
from ect.presets import PRESETS
from ect.scaling import __main__ as scaling
from ect.show.dry_run import describe

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def fields(cls: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of names, type) of every leaf of a dataclass."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = (*prefix, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], path)
        else:
            yield path, hints[field.name]


def get(cfg: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        cfg = getattr(cfg, name)
    return cfg


def changed(cfg: Any, path: tuple[str, ...], value: Any) -> Any:
    inner = changed(getattr(cfg, path[0]), path[1:], value) if len(path) > 1 else value
    return replace(cfg, **{path[0]: inner})


def others(kind: Any, value: Any) -> Iterator[Any]:
    """Values of a type that differ from `value`; not all of them make sense everywhere."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        for choice in typing.get_args(kind):
            yield from others(choice, value)
    elif typing.get_origin(kind) is Literal:
        yield from (choice for choice in typing.get_args(kind) if choice != value)
    elif kind is type(None):
        yield from [None] * (value is not None)
    elif kind is bool:
        yield from {True, False} - {value}
    elif kind is int:
        yield from (value * 2 if isinstance(value, int) and value else 1, 4)
    elif kind is float:
        start = value if isinstance(value, float) else 0.0
        yield from (start / 2 - 1 / 3, start / 2 + 1e-9, start + 0.1)
    elif kind is str:
        yield from (
            "two words, a 'quote' and \"another\", $HOME/*\\n # a=b",
            "-starts like an option",
            "digits-diffusion",
            "fdc@1=20",
            "levels=triton,*=reference",
        )
    elif kind is Path:
        yield from (Path("~/with a space/and 'quote'"), Path("-dash"))
    elif typing.get_origin(kind) is tuple:
        items, last = typing.get_args(kind)[:2]
        if items is str:
            yield from ((".5",), (*value, ".25"))
        elif last is Ellipsis:
            yield from (tuple(v / 2 if items is float else v * 2 for v in value), (), (*value[:1], items(3)))
        else:
            yield tuple(v / 2 for v in value)
    else:
        pytest.fail(f"no values for {kind}")


def possible(cfg: Config) -> bool:
    try:
        check(cfg)
    except UserError:
        return False
    return True


# What a field needs beside it, where no change of it alone is possible.
BESIDE: dict[tuple[str, ...], list[tuple[tuple[str, ...], Any]]] = {
    ("objective", "weight_floor"): [(("objective", "kind"), "consistency"), (("objective", "weighting"), "adaptive")],
    ("data", "teacher_samples"): [(("data", "source"), "teacher"), (("init_from",), Path("teacher.pkl"))],
    ("objective", "guidance"): [
        (("objective", "kind"), "consistency"), (("objective", "target"), "teacher"), (("data", "labels"), True),
        (("net", "label_dropout"), 0.1),
    ],
    ("log", "averages_kimg"): [(("optim", "emas"), (".5", "rel:.05"))],
    ("target",): [(("log", "eval_kimg"), 1.0), (("eval", "samples"), 100)],
}  # fmt: skip


def variants(start: Config) -> tuple[list[Config], set[tuple[str, ...]]]:
    """Configurations that differ from `start` in every field that can, over and over until each candidate had its turn; and
    the fields that never changed."""
    candidates: dict[tuple[str, ...], list[Any]] = {}
    for path, kind in fields(Config):
        if path not in {
            (name,) for name in ("preset", "dry_run", "plan", "resume", "cooldown")
        }:  # test_cooldown.py has the last
            values = list(others(kind, get(start, path)))
            candidates[path] = [v for v in values if possible(changed(start, path, v))] or values
    rounds = []
    for turn in range(max(map(len, candidates.values()))):
        cfg = start
        for path, values in candidates.items():
            for value in values[turn % max(len(values), 1) :] + values:
                if possible(changed(cfg, path, value)):
                    cfg = changed(cfg, path, value)
                    break
        rounds.append(cfg)
    alone = []
    for path in unchanged(candidates, start, rounds):
        base = start
        for other, value in BESIDE.get(path, []):
            base = changed(base, other, value)
        alone += [changed(base, path, value) for value in others(dict(fields(Config))[path], get(start, path))]
    rounds += filter(possible, alone)  # what another field's change had ruled out
    return rounds, unchanged(candidates, start, rounds)


def unchanged(paths: Iterable[tuple[str, ...]], start: Config, rounds: list[Config]) -> set[tuple[str, ...]]:
    return {path for path in paths if all(get(cfg, path) == get(start, path) for cfg in rounds)}


def pasted(cfg: Config) -> Config:
    text = "\n".join(line for line in describe(cfg).splitlines() if not line.startswith("#"))
    return parse(shlex.split(text))


def typed(cfg: Config) -> Config:
    """What the one-line command, describe's last line, means to a shell."""
    words = shlex.split(describe(cfg).splitlines()[-1].removeprefix("#"))
    assert words[:3] == ["python", "-m", "ect.train"]
    return parse(words[3:])


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_field_is_pasted_back(name: str, tmp_path: Path) -> None:
    """Also where a preset sets what the user unsets, and beside --resume, whose config.json takes the preset's place."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(variants(PRESETS["cifar10-1h"])[0][1])))
    rounds, same = variants(PRESETS[name])
    assert not same
    for cfg in [PRESETS[name], *rounds]:
        assert pasted(cfg) == typed(cfg) == cfg
        other = replace(cfg, preset="edm-cifar10" if name == "digits" else "digits")  # all else as it was
        assert typed(other) == other
        unset = {path for path, kind in fields(Config) if bool in typing.get_args(kind) and get(cfg, path) is None}
        if not unset:  # a switch of the resumed run stays set until the other way is said
            resumed = replace(cfg, resume=tmp_path)
            assert pasted(resumed) == resumed


def test_a_dry_run_pasted_back_runs() -> None:
    assert pasted(parse(["--preset", "cifar10-1h", "--dry-run"])) == PRESETS["cifar10-1h"]


COMMANDS = {
    "ect.train": Config,
    "ect.sample": sample.Options,
    "ect.evaluate": evaluate.Options,
    "ect.convert": convert.Options,
    "ect.data.imagenet": imagenet.Options,
    "ect.merge": merge.Options,
    "ect.scaling": scaling.Options,
}
SWITCHES = [
    (command, path)
    for command, cls in COMMANDS.items()
    for path, kind in fields(cls)
    if bool in (kind, *typing.get_args(kind))
]


@pytest.mark.parametrize(("command", "path"), SWITCHES)
def test_every_switch_takes_no_value(command: str, path: tuple[str, ...]) -> None:
    """`--compile` and `--no-compile`, not `--compile True`, in every command."""
    given = [] if command == "ect.train" else ["a"] if command != "ect.convert" else ["a", "b"]
    *groups, name = (part.replace("_", "-") for part in path)
    for value in (True, False):
        option = "--" + ".".join([*groups, name if value else f"no-{name}"])
        assert get(tyro.cli(COMMANDS[command], args=[*given, option]), path) is value


def test_the_switches_of_speed_are_among_them() -> None:
    assert {("ect.train", (name,)) for name in ("compile", "graph", "channels_last")} < set(SWITCHES)


def test_a_long_run_compiles_on_a_gpu_and_a_short_one_does_not() -> None:
    hour, staged = PRESETS["cifar10-1h"], PRESETS["cifar10-400k"]
    assert not compiles(hour, GPU) and compiles(staged, GPU)
    assert not compiles(staged, CPU)
    steps = COMPILE_PAYS_STEPS
    assert compiles(replace(hour, total_kimg=steps * 0.256, batch=256), GPU)
    assert not compiles(replace(hour, total_kimg=(steps - 1) * 0.256, batch=256), GPU)
    for device, cfg in itertools.product((CPU, GPU), (hour, staged)):
        assert compiles(replace(cfg, compile=True), device) and not compiles(replace(cfg, compile=False), device)
    assert re.search(f"{steps:,} steps", Path(Config.__init__.__globals__["__file__"]).read_text())


def test_graph_and_memory_order_follow_the_device() -> None:
    cfg = PRESETS["cifar10-1h"]
    assert captures(cfg, GPU) and not captures(cfg, CPU)
    assert not captures(replace(cfg, graph=False), GPU) and captures(replace(cfg, graph=True), GPU)
    with pytest.raises(UserError, match="--graph: a CUDA graph needs a GPU, and this run is on cpu"):
        captures(replace(cfg, graph=True), CPU)
    assert keeps_channels_last(cfg, GPU) and not keeps_channels_last(cfg, CPU)
    assert keeps_channels_last(replace(cfg, channels_last=True), CPU)
    assert not keeps_channels_last(replace(cfg, channels_last=False), GPU)
