"""Checkpoints and model files that were cut short, or of which one bit is another."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import torch

from ect.errors import UserError
from ect.files.checkpoint import load_model
from tests.drills.equal import same
from tests.drills.runs import PLAIN, RESUME, Ground

KINDS = (".state.safetensors", ".safetensors", ".json")
SAID = re.compile(r"damaged|incomplete|cannot be read|format|names no checkpoint|not here")


def cut(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def truncated(ground: Ground, number: int, count: int) -> None:
    """Cut a file of the newest checkpoint, or of the newest two, or of all."""
    _damaged(ground, random.Random(f"truncated {number}"), cut)


def flipped(ground: Ground, number: int, count: int) -> None:
    """Flip a bit in a file of the newest checkpoint, or of the newest two, or of all."""
    _damaged(ground, random.Random(f"flipped {number}"), flip)


def _damaged(ground: Ground, dice: random.Random, damage: object) -> None:
    want, _ = ground.undisturbed(PLAIN)
    with ground.place() as place:
        shutil.copytree(want, place.run)
        stems = sorted((path.stem for path in place.run.glob("checkpoint-*.json")), reverse=True)
        hit = stems[: dice.choice((1, 1, 1, 2, 2, 3))]
        for stem in hit:
            damage(place.run / f"{stem}{dice.choice(KINDS)}", dice)  # type: ignore[operator]
        end = place.start(RESUME).end()
        if len(hit) == len(stems):
            assert "no complete checkpoint" in end.refused()
        else:
            end.done()
            same(place.run, want)
        assert all(any(stem in line and SAID.search(line) for line in end.err.splitlines()) for stem in hit), end.err


def beside(ground: Ground, number: int, count: int) -> None:
    """Cut what lies beside the checkpoints, or flip a bit of it: the run comes to the same end, or is refused in a sentence."""
    dice = random.Random(f"beside {number}")
    want, _ = ground.undisturbed(PLAIN)
    with ground.place() as place:
        shutil.copytree(want, place.run)
        events = next(path.name for path in place.run.glob("events*"))
        name = ("stats.jsonl", "latest", "config.json", events, "checkpoint-000000.080.ema1.safetensors")[number % 5]
        (cut if number % 2 else flip)(place.run / name, dice)
        end = place.start(RESUME).end()
        if end.status:
            end.refused()
        else:
            end.done()
            same(place.run, want, but=name)  # the run is at its end: what it does not need stays as it was


def model_file(ground: Ground, number: int, count: int) -> None:
    """Damage a model file far from its run, where no manifest vouches for it: it is refused, or it is the same network."""
    dice = random.Random(f"model {number}")
    want, _ = ground.undisturbed(PLAIN)
    with ground.lock, ground.place() as place:  # one at a time: torch lets no two threads build networks
        net, info = load_model(want)
        path = place.folder / "model.safetensors"
        shutil.copy(want / "checkpoint-000000.080.safetensors", path)
        if number % 2:
            cut(path, dice)
        else:
            header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            data = bytearray(path.read_bytes())
            data[dice.randrange(header if number % 4 else len(data))] ^= 1 << dice.randrange(8)
            path.write_bytes(data)
        try:
            got, about = load_model(path)
        except UserError as error:
            said = str(error)
            assert str(path) in said and len(said.splitlines()) == 1, said
        else:
            assert about == info and vars(got).keys() == vars(net).keys() and got.sigma_data == net.sigma_data
            assert all(
                torch.equal(a, b) for a, b in zip(got.state_dict().values(), net.state_dict().values(), strict=True)
            )
