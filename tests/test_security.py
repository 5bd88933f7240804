"""SECURITY.md: every sentence about a file names tests that exist. And those of its sentences that no other test holds."""

from __future__ import annotations

import ast
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ect.config import DataConfig
from ect.data import load
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.files.model_file import save_model
from ect.models import build
from tests.edm_files import SMALL

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SENTENCE = re.compile(r"[^.]*(?:\.\w[^.]*)*\. \(`tests/[^()]*`\)")
SPEC: dict[str, Any] = {
    "precond": "ECMPrecond", "sigma_data": 0.5, "sigma_min": 0.002, "unet": "SongUNet", "kwargs": SMALL,
}  # fmt: skip


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## (.*)\n", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def claims() -> Iterator[str]:
    """Yield each sentence with what follows it in brackets, of every section but the last."""
    for title, text in list(sections().items())[:-1]:
        first, *items = re.split(r"^- ", text, flags=re.MULTILINE)
        assert not first.strip(), f"{title}: every sentence is an item of the list"
        yield from (" ".join(item.split()) for item in items)


CLAIMS = list(claims())


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_sentence_names_tests_that_exist(claim: str) -> None:
    assert SENTENCE.fullmatch(claim), "one sentence, then its tests in brackets"
    for file, name in NAMED.findall(claim):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"
    assert len(NAMED.findall(claim)) == claim.count("::")


def test_the_page_has_its_four_sections() -> None:
    assert list(sections()) == [
        "A checkpoint", "A data set", "A weights file", "The network and the disk", "What was not checked"
    ]  # fmt: skip
    assert len(CLAIMS) > 20
    assert not SENTENCE.fullmatch("Two. Sentences. (`tests/test_security.py::test_x`)")
    assert not SENTENCE.fullmatch("No test.")


def test_a_checksum_is_no_signature(tmp_path: Path) -> None:
    path, net = tmp_path / "model.safetensors", build(SPEC)
    save_model(path, net.state_dict(), SPEC, {})
    forged = {name: tensor + 1 if name.endswith("bias") else tensor for name, tensor in net.state_dict().items()}
    save_model(path, forged, SPEC, {})
    loaded, _ = load_model(path)
    assert not torch.equal(loaded.state_dict()["model.map_layer0.bias"], net.state_dict()["model.map_layer0.bias"])


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def test_nothing_of_an_archive_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    names = ["0.png", "../1.png", "../../2.png", str(tmp_path / "3.png")]
    with zipfile.ZipFile("set.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, picture(i))
    with tarfile.open("cifar.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    before = sorted(tmp_path.rglob("*"))
    load(DataConfig("set.zip"))
    with pytest.raises(UserError):
        load(DataConfig("cifar.tar"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_set_is_held_in_memory(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    images = load(DataConfig(str(tmp_path))).images
    assert images.shape == (3, 8, 8, 3) and images.untyped_storage().nbytes() == 3 * 8 * 8 * 3
