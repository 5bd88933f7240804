"""Folders and zips as people have them: links, hidden folders, odd packing, and images of many kinds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageDraw

from ect.config import DataConfig
from ect.data import Dataset, load
from ect.data.readers import pictures
from ect.errors import UserError


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def plain(value: int, mode: str = "RGB", size: int = 8) -> bytes:
    return png(Image.new(mode, (size, size), value if mode == "L" else (value,) * len(mode)))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def read(path: Path, **options: Any) -> Dataset:
    return load(DataConfig(source=str(path), **options))


def values(data: Dataset) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


def test_links_are_followed_once_each_way(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", {"1.png": plain(1), "deep/2.png": plain(2)})
    data = write(tmp_path / "data", {"cat/0.png": plain(0)})
    (data / "dog").symlink_to(tmp_path / "elsewhere")
    (data / "cat" / "again").symlink_to(data)  # a circle
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)  # and another
    (tmp_path / "elsewhere" / "gone").symlink_to(tmp_path / "nowhere")
    found = read(data, labels=True)
    assert values(found) == [0, 1, 2]
    assert found.labels is not None and found.labels.argmax(1).tolist() == [0, 1, 1]


def test_hidden_folders_are_no_data_and_no_classes(tmp_path: Path) -> None:
    files = {"cat/0.png": plain(0), "dog/1.png": plain(1)}
    hidden = {
        name: plain(9) for name in (".ipynb_checkpoints/a.png", "__MACOSX/cat/b.png", "cat/.cache/c.png", "dog/._d.png")
    }
    found = read(write(tmp_path / "data", files | hidden), labels=True)
    assert values(found) == [0, 1] and found.label_dim == 2


@pytest.mark.parametrize("top", ["", "my set/"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_zips_as_other_systems_pack_them(tmp_path: Path, top: str, slash: str) -> None:
    labels = json.dumps({"labels": [["00000/a.png", 1], ["00000/b.png", 0]]}).encode()
    files = {"00000/b.png": plain(2), "00000/a.png": plain(1), "dataset.json": labels}
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename = (top + name).replace("/", slash)  # after the constructor, which would mend it
            archive.writestr(info, content)
        archive.writestr("__MACOSX/._a.png", b"macOS")
    found = read(path, labels=True)
    assert values(found) == [1, 2]
    assert found.labels is not None and found.labels.tolist() == [[0, 1], [1, 0]]


def kinds() -> dict[str, bytes]:
    """The same mid-grey picture in every kind that people have, 200 of 255 where it can be exact."""
    alpha = Image.new("RGBA", (8, 8), (200, 200, 200, 255))
    palette = Image.new("RGB", (8, 8), (200, 200, 200)).convert("P", palette=Image.Palette.ADAPTIVE)
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 55)).save(cmyk, "TIFF")
    deep = Image.fromarray(np.full((8, 8), 200 * 257, np.uint16))
    return {
        "a.png": plain(200), "b.png": plain(200, "L"), "c.png": png(alpha), "d.png": png(palette), "e.tif": cmyk.getvalue(),
        "f.png": png(deep), "g.png": png(Image.new("LA", (8, 8), (200, 255))),
    }  # fmt: skip


@pytest.mark.parametrize(("convert", "channels"), [("rgb", 3), ("grey", 1)])
def test_every_kind_converts(tmp_path: Path, convert: str, channels: int) -> None:
    found = read(write(tmp_path / "data", kinds()), convert=convert)
    assert found.images.shape == (7, 8, 8, channels)
    assert (found.images == 200).all()


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    clear = png(Image.new("RGBA", (8, 8), (10, 20, 30, 0)))
    marked = png(Image.new("RGB", (8, 8), (10, 20, 30)), transparency=(10, 20, 30))
    folder = write(tmp_path / "data", {"a.png": clear, "b.png": marked})
    assert (read(folder, convert="rgb").images == 255).all()
    (folder / "a.png").unlink()
    found = read(folder)
    assert found.images[0, 0, 0].tolist() == [10, 20, 30]
    assert found.notes == ("1 of 1 images mark a colour as transparent, which was passed over",)


def test_a_range_that_is_unknown_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(file, "TIFF")
    with pytest.raises(UserError, match=r"a.tif: cannot be read as an image \(floating-point values"):
        read(write(tmp_path / "data", {"a.tif": file.getvalue()}), convert="grey")


def test_odd_images_are_counted_and_one_option_is_named(tmp_path: Path) -> None:
    files = {f"{i:02}.png": plain(i) for i in range(6)} | {f"x{i}.png": plain(i, "L") for i in range(3)}
    folder = write(tmp_path / "data", files | {"y.png": png(Image.new("RGBA", (8, 8)))})
    with pytest.raises(UserError) as caught:
        read(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'x0.png'}: grey, but 00.png is RGB")
    assert "--data.convert rgb" in message
    assert "(found: 6 RGB 8x8, 3 grey 8x8, 1 RGB with transparency 8x8)" in message
    assert read(folder, convert="rgb").images.shape[0] == 10


@pytest.mark.parametrize(("content", "said"), [(b"", "the file is empty"), (b"<html>", "of no known format")])
def test_what_is_no_image_is_told_plainly(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "data", {"a.png": content}))
    assert said in str(caught.value) and "object at" not in str(caught.value)


def test_enlarging_is_noted(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"a.png": plain(1, size=8), "b.png": plain(2, size=16)})
    assert read(folder, resolution=16).notes == ("1 of 2 images were smaller than 16x16, and enlarged",)


@pytest.mark.parametrize("size", [28, 48, 96])
def test_sizes_that_a_network_can_halve(tmp_path: Path, size: int) -> None:
    assert read(write(tmp_path / "data", {"a.png": plain(1, size=size)})).resolution == size


def test_mnist_is_padded_whatever_holds_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"a.png": plain(7, "L", 28)})
    for options in ({}, {"resolution": 32}):
        found = read(folder, **options)
        assert found.resolution == 32 and int(found.images.sum()) == 7 * 28 * 28
    assert read(folder, resolution=28).resolution == 28


def test_a_data_set_says_what_it_is(tmp_path: Path) -> None:
    assert read(Path("digits")).describe() == "digits: 1,797 images, 8x8 grey, no labels"
    assert read(Path("digits"), labels=True).describe().endswith("8x8 grey, 10 classes of 174 to 183 images")
    gaps = {"a.png": plain(0), "b.png": plain(1), "dataset.json": b'{"labels": [["a.png", 0], ["b.png", 2]]}'}
    found = read(write(tmp_path / "gaps", gaps), labels=True)
    assert found.describe() == "gaps: 2 images, 8x8 RGB, 3 classes of 0 to 1 images; without images: class 1"
    one = gaps | {"dataset.json": b'{"labels": [["a.png", 0], ["b.png", 0]]}'}
    assert "a single class" in read(write(tmp_path / "one", one), labels=True).describe()
    vectors = gaps | {"dataset.json": b'{"labels": [["a.png", [0.5, 1]], ["b.png", [0, 1]]]}'}
    assert read(write(tmp_path / "v", vectors), labels=True).describe().endswith("label vectors of 2 numbers")


def test_postscript_named_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL goes by the content, and draws PostScript by Ghostscript, which is an interpreter."""
    started: list[object] = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args) or pytest.fail("gs")
    )
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    data = write(tmp_path / "data", {"0.png": plain(0), "1.png": file.getvalue()})
    with pytest.raises(UserError, match=r"1\.png: cannot be read as an image \(of no known format\)"):
        read(data)
    assert not started


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and devices are files elsewhere")
@pytest.mark.parametrize("what", ["pipe", "device", "gone", "circle", "sparse"])
@pytest.mark.parametrize("name", ["0.png", "1.png", "dataset.json", "train-images-idx3-ubyte", "data_batch_1"])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(name: str, what: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"0.png": plain(0), "1.png": plain(1)})
    path = data / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path.symlink_to({"device": Path("/dev/zero"), "gone": tmp_path / "gone", "circle": path}[what])
    ours = name.endswith((".png", ".json")) or what == "sparse"
    with bounded_in_time(), pytest.raises(UserError, match=re.escape(name)) if ours else contextlib.nullcontext():
        read(data, labels=name == "dataset.json")
    if what == "pipe":
        with bounded_in_time(), pytest.raises(UserError, match=f"{name}: a pipe or a device"):
            read(path)


@contextlib.contextmanager
def bounded_in_time() -> Iterator[None]:
    """End the block after five seconds, in which a pipe has no other end."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(UserError, match=r"--data\.source .*: cannot be read \(.*Permission denied\)"):
        read(tmp_path)


def test_many_small_line_drawings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings of one bit, such as Omniglot's 105x105 pixels, compress more than photos do."""
    monkeypatch.setattr(pictures, "_ALWAYS", 0)
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).line([(20, 20), (50, 80), (90, 80)], 0, 2)
    drawn = png(image)
    assert len(drawn) < 3 * 105 * 105 / pictures._RATIO
    data = write(tmp_path / "data", {f"{i}.png": drawn for i in range(5)})
    assert read(data, resolution=32, convert="grey").images.shape == (5, 32, 32, 1)
    write(tmp_path / "more", {"0.png": plain(0, "RGB", 256)})
    with pytest.raises(
        UserError, match=r"so small files hold no pictures so large\. Remove it, or save such pictures with"
    ):
        read(tmp_path / "more")
