"""docs/questions.md answers each request by a command, or says no; docs/kernels.md quotes refusals word for word."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ect_kernels import cpu
from rich.console import Console

from ect import sample, train
from ect.config import DataConfig
from ect.data import load
from ect.errors import UserError
from ect.job import Job
from ect.models import build
from ect.options import check
from ect.presets import PRESETS
from tests import edm_files as edm
from tests.test_no_network import SPEC, TINY
from tests.tiny import config

DOCS = Path(__file__).parents[1] / "docs"
ASKED = ("checkpoint", "teacher", "fp16", "without data", "ImageNet-512", "budget", "class-conditionally")


def answers() -> dict[str, str]:
    _, *parts = re.split(r"^## (.*)\n", (DOCS / "questions.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_each_of_the_seven_is_answered_by_a_command_or_by_no() -> None:
    found = answers()
    assert len(found) == len(ASKED) and all(word in title for word, title in zip(ASKED, found, strict=True))
    for title, answer in found.items():
        assert answer.strip().startswith("No.") or "\npython -m ect." in answer, title


def test_a_published_checkpoint_is_sampled_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("network-snapshot-latest.pkl").write_bytes(edm.edm_snapshot(edm.from_net(build(SPEC), SPEC)))
    sample.main(["network-snapshot-latest.pkl", "--nfe", "2", "--count", "2", "--device", "cpu"])
    assert Path("samples.png").is_file()


def test_a_run_needs_neither_teacher_nor_pretraining(tmp_path: Path) -> None:
    assert config(run_dir=tmp_path / "run").init_from is None
    assert PRESETS["cifar10-1h"].pretrain is None and PRESETS["edm-cifar10"].objective.kind == "diffusion"


@pytest.mark.slow
def test_a_class_conditional_run_and_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--data.labels", "--run-dir", "run"])
    sample.main(["run", "--class", "3", "--count", "2", "--device", "cpu", "--out", "class-3.npz"])
    with np.load("class-3.npz") as arrays:
        assert arrays["class"].tolist() == [3, 3] and len(arrays["images"]) == 2


@pytest.mark.parametrize("name", ["latents.npy", "latents.pt", "latents.npz"])
def test_latents_are_refused(name: str, tmp_path: Path) -> None:
    folder, values = tmp_path / "latents", torch.zeros(8, 64, 64)
    folder.mkdir()
    torch.save(values, folder / name) if name.endswith("pt") else np.save(folder / name, values.numpy())
    for source in (folder, folder / name):
        if source.exists():
            with pytest.raises(UserError):
                load(DataConfig(str(source)))


QUOTED = re.findall(
    r"^    error: ((--kernels|ECT_KERNELS).*)$", (DOCS / "kernels.md").read_text(encoding="utf-8"), re.M
)


@pytest.mark.parametrize("said", [line for line, _ in QUOTED])
def test_refusals_of_backends_are_those_of_the_page(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    option = re.match(r"--kernels (\S+): ", said)
    if option is None:
        monkeypatch.setenv("ECT_KERNELS", "garbage")
    cfg = config(run_dir=tmp_path / "run", kernels=option[1] if option else "")
    with pytest.raises(UserError) as error:
        check(cfg) or Job(cfg, Console(quiet=True))
    found = re.sub("(have: .*), emulated$", r"\1", str(error.value))  # other tests load emulators
    assert found == (
        said if cpu.why_not_built() is None else said.replace("; have: reference, native", "; have: reference")
    )
    assert not (tmp_path / "run").exists()


def test_the_page_quotes_some() -> None:
    assert len(QUOTED) == 4
