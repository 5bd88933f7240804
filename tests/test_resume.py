"""What a resume may change: free options pass, all others are refused by name, other data too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ect.config import Config, EvalConfig, LogConfig, OptimConfig
from ect.errors import UserError
from ect.files import resume
from ect.files.resume import data_fingerprint, refuse_changed_data, refuse_changed_maths, refuse_new_start


def as_saved(config: Config) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def test_a_config_read_back_from_json_is_the_same() -> None:
    config = Config(run_dir=Path("runs/1"), init_from=Path("teacher.pkl"))
    refuse_changed_maths(as_saved(config), dataclasses.asdict(config))


def test_what_does_not_change_the_maths_is_free() -> None:
    new = Config(run_dir=Path("b"), resume=Path("b"), dry_run=True, device="cuda", threads=3, batch_per_device=8)
    new = dataclasses.replace(new, init_from=Path("a"), total_kimg=7.0)
    new = dataclasses.replace(new, log=LogConfig(keep=9), eval=EvalConfig(samples=1))
    refuse_changed_maths(as_saved(Config()), dataclasses.asdict(new))


def test_every_change_of_the_maths_is_refused_by_its_option() -> None:
    old = Config()
    new = dataclasses.replace(
        old,
        batch=64,
        optim=dataclasses.replace(old.optim, lr=0.001, emas=(".5",)),
        pretrain="digits-diffusion",
    )
    with pytest.raises(UserError) as error:
        refuse_changed_maths(as_saved(old), dataclasses.asdict(new))
    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "--batch: checkpoint has 128, command line says 64",
        '--optim.emas: checkpoint has [".9999"], command line says [".5"]',
        "--optim.lr: checkpoint has 0.0001, command line says 0.001",
        '--pretrain: checkpoint has null, command line says "digits-diffusion"',
    ]
    assert "--init-from" in lines[-1]


def test_every_other_field_is_refused_when_it_changes() -> None:
    """A field added to Config later is refused until somebody says that it is free."""
    config = as_saved(Config())
    for name, value in resume.flatten(config).items():
        changed = json.loads(json.dumps(config))
        *groups, field = name.split(".")
        place = changed
        for group in groups:
            place = place[group]
        place[field] = f"not {value}"
        top = groups[0] if groups else field
        if top in {"log", "eval", *resume._FREE, "total_kimg"} or name in resume._FREE:
            refuse_changed_maths(config, changed)
        else:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: "):
                refuse_changed_maths(config, changed)


@pytest.mark.parametrize(
    ("decay", "free"), [("constant", True), ("rsqrt", True), ("linear", False), ("cooldown", False)]
)
def test_the_length_of_the_run_is_free_unless_the_learning_rate_depends_on_it(decay: Any, free: bool) -> None:
    old = Config(optim=OptimConfig(decay=decay))
    new = dataclasses.replace(old, total_kimg=2048.0)
    if free:
        refuse_changed_maths(as_saved(old), dataclasses.asdict(new))
    else:
        with pytest.raises(UserError, match=r"--total-kimg: checkpoint has 1024\.0, command line says 2048\.0"):
            refuse_changed_maths(as_saved(old), dataclasses.asdict(new))


def test_a_field_that_one_side_lacks_is_named() -> None:
    with pytest.raises(UserError, match="--old: checkpoint has 1, command line says nothing"):
        refuse_changed_maths({"old": 1}, {})


def test_other_data_is_refused() -> None:
    images, labels = torch.arange(2 * 4 * 4 * 1, dtype=torch.uint8).view(2, 4, 4, 1), torch.eye(2)
    prints = [
        data_fingerprint(images, labels),
        data_fingerprint(images, None),
        data_fingerprint(images, 1 - labels),
        data_fingerprint(images.flip(0), labels),
        data_fingerprint(images.view(2, 2, 8, 1), labels),
    ]
    assert len(set(prints)) == 5
    assert data_fingerprint(images.transpose(1, 2).contiguous().transpose(1, 2), labels.clone()) == prints[0]
    refuse_changed_data(prints[0], prints[0], "digits")
    with pytest.raises(UserError, match=r"--data\.source: digits holds other images or labels"):
        refuse_changed_data(prints[0], prints[1], "digits")


def test_a_resume_takes_no_other_network_to_begin_with() -> None:
    """But a teacher, which may have moved; its weights are compared."""
    with pytest.raises(
        UserError, match=r"--init-from b\.pkl: a resumed run goes on with the weights of its checkpoint"
    ):
        refuse_new_start(Path("a.pkl"), Path("b.pkl"), "self")
    refuse_new_start(Path("a.pkl"), Path("a.pkl"), "self")
    refuse_new_start(Path("a.pkl"), Path("b.pkl"), "teacher")
