"""python -m ect.data.imagenet: folders, tar files and a tar of tar files become one zip, whatever is killed in between."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ect.config import DataConfig
from ect.data import ImageStream, load
from ect.data.imagenet import __main__ as imagenet
from ect.data.imagenet import shards
from ect.data.imagenet.crops import dhariwal
from ect.data.readers import labels, space
from ect.files.resume import data_fingerprint

ROOT = Path(__file__).parents[1]
COUNTS = {"n02": 3, "n01": 2, "n10": 4}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, of pictures of any size and kind."""
    root, dice = tmp_path_factory.mktemp("data") / "tree", np.random.default_rng(0)
    for name, count in COUNTS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = dice.integers(0, 256, (40 + 30 * i, 90, 3), np.uint8)
            picture = Image.fromarray(pixels[..., 0] if i == 1 else pixels)
            picture.convert("CMYK" if i == 2 else picture.mode).save(root / name / f"{name}_{9 - i}.JPEG")
    return root


@pytest.fixture(scope="module")
def tars(tree: Path) -> Path:
    """The folder of the classes' tar files, as they are published: the pictures' names alone, in no order."""
    folder = tree.parent / "tars"
    folder.mkdir()
    for name in COUNTS:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for path in sorted((tree / name).iterdir(), key=lambda path: path.stat().st_size):
                tar.add(path, path.name)
    return folder


@pytest.fixture(scope="module")
def outer(tars: Path) -> Path:
    """The tar file of the tar files."""
    path = tars.parent / "ILSVRC2012_img_train.tar"
    with tarfile.open(path, "w") as tar:
        for inner in sorted(tars.iterdir(), reverse=True):
            tar.add(inner, inner.name)
    return path


@pytest.fixture(scope="module")
def made(tree: Path) -> bytes:
    """The zip of the folder, at 8x8."""
    return make(tree, tree.parent / "made.zip")


def make(source: Path, out: Path, *more: str, status: int = 0) -> bytes:
    assert imagenet.main([str(source), str(out), "--resolution", "8", *more]) == status
    assert not out.with_name(f"{out.name}.parts").exists()
    return out.read_bytes() if status == 0 else b""


def test_the_zip_has_edms_layout(made: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        assert names == [f"00000/img{i:08d}.png" for i in range(9)] + ["dataset.json"]
        assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}
        numbered = json.loads(archive.read("dataset.json"))["labels"]
        # The classes are numbered by their sorted names.
        assert numbered == [[name, number] for name, number in zip(names, [0, 0, 1, 1, 1, 2, 2, 2, 2], strict=False)]
        for name in names[:-1]:
            with Image.open(archive.open(name)) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (8, 8))


def test_ect_train_reads_it(made: bytes, tree: Path) -> None:
    data = load(DataConfig(str(tree.parent / "made.zip"), labels=True))
    assert data.describe() == "made: 9 images, 8x8 RGB, 3 classes of 2 to 4 images"
    with Image.open(tree / "n01/n01_8.JPEG") as first:  # the first by its name, of the first class
        assert torch.equal(data.images[0], torch.from_numpy(np.asarray(dhariwal(first.convert("RGB"), 8)).copy()))


def test_every_form_of_the_source_makes_the_same_bytes(made: bytes, tars: Path, outer: Path, tmp_path: Path) -> None:
    assert make(tars, tmp_path / "a.zip", "--jobs", "1") == made
    assert make(outer, tmp_path / "b.zip", "--jobs", "3") == made


def test_pictures_below_the_folder_of_a_class_are_its_own(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "data/cats/more").mkdir(parents=True)
    (tmp_path / "data/.hidden").mkdir()
    (tmp_path / "data/notes.txt").touch()
    picture = next((tree / "n01").iterdir()).read_bytes()
    for place in ("cats/more/a.jpg", "cats/b.png", ".hidden/c.png"):
        (tmp_path / "data" / place).write_bytes(picture)
    make(tmp_path / "data", tmp_path / "out.zip")
    assert len(load(DataConfig(str(tmp_path / "out.zip"))).images) == 2


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (64, 40), (40, 64), (500, 333), (15, 16), (17, 100)])
def test_the_crop_is_the_central_square(size: tuple[int, int]) -> None:
    # Of a ramp across, columns stay a ramp about its middle, and rows are alike; so too turned by a quarter.
    across = np.broadcast_to(np.linspace(0, 255, size[0]), size[::-1]).round().astype(np.uint8)
    square = np.asarray(dhariwal(Image.fromarray(across).convert("RGB"), 8), np.float64)[..., 0]
    assert square.shape == (8, 8) and (np.diff(square, axis=1) > 0).all() and np.ptp(square, axis=0).max() <= 1
    assert abs(square.mean() - 127.5) < 128 / 8
    turned = np.asarray(dhariwal(Image.fromarray(across.T.copy()).convert("RGB"), 8), np.float64)[..., 0]
    assert abs(turned - square.T).max() <= 1


def test_a_picture_of_the_size_wanted_stays_as_it_is(tree: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "data/one").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "data/one/a.png")
    for crop in ("dhariwal", "center"):
        make(tmp_path / "data", tmp_path / f"{crop}.zip", "--crop", crop)
        assert (load(DataConfig(str(tmp_path / f"{crop}.zip"))).images.numpy() == pixels).all()


def test_a_stop_keeps_what_is_done(
    made: bytes, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, parts = tmp_path / "out.zip", tmp_path / "out.zip.parts"
    broken = tree / "n10/n10_7.JPEG"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    try:
        assert imagenet.main([str(tree), str(out), "--resolution", "8", "--jobs", "1"]) == 2
    finally:
        broken.write_bytes(whole)
    assert f"error: {broken}: cannot be read as an image" in capsys.readouterr().err
    assert sorted(path.name for path in parts.iterdir()) == ["00000.zip", "00001.zip", "plan.json"] and not out.exists()
    assert imagenet.main([str(tree), str(out), "--resolution", "16"]) == 2  # not of these pictures
    assert "Remove it to begin anew" in capsys.readouterr().err
    read = []
    square = shards.Shards._square
    monkeypatch.setattr(shards.Shards, "_square", lambda *given: read.append(given[2].name) or square(*given))
    assert make(tree, out) == made
    assert len(read) == COUNTS["n10"]
    assert "2 classes are there already" in capsys.readouterr().out


@pytest.mark.slow  # processes that import torch
def test_kills_at_any_moment_change_nothing(made: bytes, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    command = [sys.executable, "-m", "ect.data.imagenet", str(tree), str(out), "--resolution", "8", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    for kills in itertools.count():
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        assert process.stdout is not None
        if kills < 3:
            process.stdout.readline()  # it looks for the classes
            time.sleep(0.01 * kills)
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
    assert out.read_bytes() == made and [path.name for path in tmp_path.iterdir()] == ["out.zip"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "loose.png").touch(), "loose.png: a picture that lies in no class"),
        (lambda root: (root / "n03").mkdir(), "class n03 has no pictures"),
        (lambda root: (root / "n04.tar").write_bytes(b"x" * 2000), "n04.tar: damaged, truncated or no plain tar file"),
        (lambda root: tarfile.open(root / "n01.tar", "w").close(), "class n01 is there twice"),
        (lambda root: (root / "n01/bad.png").write_bytes(b""), "bad.png: cannot be read as an image"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_stays(
    spoil: object, said: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "tree"
    (root / "n01").mkdir(parents=True)
    (root / "n01/a.JPEG").write_bytes(next((tree / "n01").iterdir()).read_bytes())
    spoil(root)  # type: ignore[operator]
    make(root, tmp_path / "out.zip", status=2)
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]


def test_a_tar_cut_short_or_compressed_or_of_other_files_is_refused(
    tree: Path, tars: Path, outer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = outer.read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (100, 700, len(whole) // 2):
        cut.write_bytes(whole[:length])
        make(cut, tmp_path / "out.zip", status=2)
        assert "Copy it anew" in capsys.readouterr().err
    with tarfile.open(cut, "w:gz") as tar:
        tar.add(tars / "n01.tar", "n01.tar")
    make(cut, tmp_path / "out.zip", status=2)
    assert "no plain tar file" in capsys.readouterr().err
    make(tars / "n01.tar", tmp_path / "out.zip", status=2)
    assert "where a tar file of one class was due" in capsys.readouterr().err


def test_options_and_places_that_cannot_be(
    tree: Path, made: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, source, more, said in [
        (tmp_path / "out.tar", tree, [], "must be named *.zip"),
        (tree.parent / "made.zip", tree, [], "there already"),
        (tmp_path / "no/out.zip", tree, [], "cannot make this folder"),
        (tmp_path / "out.zip", tmp_path / "none", [], "no such file or folder"),
        (tmp_path / "out.zip", tmp_path, [], "no classes in it"),
        (tmp_path / "out.zip", tree, ["--resolution", "30"], "--resolution 30: expected a multiple of 4"),
        (tmp_path / "out.zip", tree, ["--jobs", "-1"], "--jobs -1: expected 0, or from 1"),
    ]:
        assert imagenet.main([str(source), str(out), *more]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda folder: shutil_usage(1000))
    make(tree, tmp_path / "out.zip", status=2)
    assert "are free there. Make room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def shutil_usage(free: int) -> object:
    return type("Usage", (), {"free": free})()


def test_pixels_beyond_the_memory_lie_in_a_file_that_ends_with_the_process(
    made: bytes, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataConfig(str(tree.parent / "made.zip"), labels=True)
    plain = load(source)
    monkeypatch.setattr(space, "free_memory", lambda: 3000)
    monkeypatch.setattr(space.tempfile, "gettempdir", lambda: str(tmp_path))
    seen: list[np.ndarray] = []
    memmap = np.memmap
    monkeypatch.setattr(space.np, "memmap", lambda *a, **k: seen.append(memmap(*a, **k)) or seen[-1])
    mapped = load(source)
    assert np.shares_memory(mapped.images.numpy(), seen[0])  # no copy of it in memory
    assert torch.equal(mapped.images, plain.images) and not list(tmp_path.iterdir())


def test_pixels_that_fit_nowhere_are_refused(made: bytes, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_memory", lambda: 3000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: shutil_usage(1000))
    with pytest.raises(space.UserError, match=r"9 images of 8x8 take .*TMPDIR"):
        load(DataConfig(str(tree.parent / "made.zip")))


def test_very_many_labels_are_bytes_and_mean_the_same(made: bytes, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DataConfig(str(tree.parent / "made.zip"), labels=True)
    floats = load(source)
    monkeypatch.setattr(labels, "_FLOATS", 26)
    few = load(source)
    assert floats.labels is not None and few.labels is not None
    assert (floats.labels.dtype, few.labels.dtype) == (torch.float32, torch.uint8)
    assert floats.describe() == few.describe() and few.has_classes
    assert data_fingerprint(floats.images, floats.labels) == data_fingerprint(few.images, few.labels)
    for resident in (True, False):
        streams = [ImageStream(data, 3, batch=4, resident=resident) for data in (floats, few)]
        for stream in streams:
            stream.seek(4)
        (_, want), (_, got) = (stream.batch(1, 3) for stream in streams)
        assert got is not None and want is not None and got.dtype == torch.float32 and torch.equal(got, want)
