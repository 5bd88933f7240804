"""Pictures that ask for much beside their pixels: thousands of tiny ones, packed metadata, endless scans, files inside files.
Each is refused, or read, within five seconds and 1 GB, and starts nothing."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from ect.config import DataConfig
from ect.data import load
from ect.data.readers import effort, pictures
from ect.errors import UserError
from tests.fuzz.bounded import LARGEST, bounded
from tests.test_worst_files import data, png, zipped

MEGA = 1 << 20
PNG, HEAD = png(8, 8, colour=0), 33  # bytes before its second chunk
ZEROS = zlib.compress(bytes(MEGA - 1), 9)


def saved(kind: str, mode: str = "L", size: int = 4, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (size, size)).save(file, kind, **options)
    return file.getvalue()


def with_chunks(kind: bytes, content: bytes, count: int) -> bytes:
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return PNG[:HEAD] + chunk * count + PNG[HEAD:]


def with_segments(segment: bytes) -> bytes:
    plain = saved("JPEG")
    return plain[:2] + segment * (9 * 10**6 // len(segment)) + plain[2:]


def of_scans() -> bytes:
    """A progressive JPEG whose last scan, of 56 bytes, comes again and again."""
    plain = saved("JPEG", size=4096, progressive=True)
    scan = plain[plain.rfind(b"\xff\xc4") : -2]
    return plain[:-2] + scan * (9 * 10**6 // len(scan)) + plain[-2:]


def as_many(content: bytes, *last: bytes) -> Callable[[Path], None]:
    """As many files of this content as there is room for in a zip, and others behind them."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(9_800_000 // (len(content) + 94)):
                archive.writestr(f"{i:05d}.png", content)
            for i, other in enumerate(last):
                archive.writestr(f"z{i}.png", other)

    return write


def one(make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: zipped(path, {"a.png": make()})


PGM, PPM = b"P5 4 4 255\n" + bytes(16), b"P6 4 4 255\n" + bytes(48)
WORST: dict[str, Callable[[Path], None]] = {
    "many of PPM": as_many(PGM),
    "many of PPM, the last another": as_many(PGM, PPM),
    "many of PNG, the last another": as_many(saved("PNG"), PPM),
    "many of TIFF": as_many(saved("TIFF")),
    "many of WEBP": as_many(saved("WEBP", "RGB")),
    "texts in many": as_many(with_chunks(b"zTXt", b"a\0\0" + ZEROS, 60)),
    "profiles in many, the first another": as_many(with_chunks(b"iCCP", b"a\0\0" + ZEROS, 1), b"x"),
    "profiles": one(lambda: with_chunks(b"iCCP", b"a\0\0" + ZEROS, 8000)),
    "chunks": one(lambda: with_chunks(b"aaAa", b"", 800_000)),
    "Exif": one(lambda: with_segments(b"\xff\xe1\0\x12Exif\0\0" + b"x" * 10)),
    "segments": one(lambda: with_segments(b"\xff\xe5\0\2")),
    "scans": one(of_scans),
    "pixels in Python": one(lambda: b"P5 3000 3000 100\n" + bytes(9_000_000)),
    "pixels as text": one(lambda: b"P2 2048 2048 255\n" + b"0 " * 2048 * 2048),
    "QOI": one(lambda: b"qoif" + struct.pack(">II", 3000, 3000) + b"\3\0" + b"\x40" * 9_000_000 + bytes(7) + b"\1"),
    "icons, the first two others": lambda path: zipped(
        path,
        {"0.png": PNG, "1.png": saved("PNG", "RGBA")}
        | dict.fromkeys((f"{i:03d}.ico" for i in range(100, 199)), icon()),
    ),
}


def icon() -> bytes:
    """An icon that says it is of 8x8 pixels, and has 81 million."""
    inside = png(9000, 9000, colour=0)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 8, 8, 0, 0, 1, 32, len(inside), 22) + inside


@pytest.mark.skipif(sys.platform != "linux", reason="watches memory by /proc")
@pytest.mark.slow
@pytest.mark.unwritten  # the bounds are those of the readers alone
@pytest.mark.parametrize("name", WORST)
def test_data(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    WORST[name](path)
    assert path.stat().st_size < LARGEST
    bounded(lambda: data(path, resolution=32))


def iptc(inside: bytes) -> bytes:
    """A file of the format IPTC, which holds a picture of any other format."""
    fields = [((3, 60), b"\1\0"), ((3, 20), b"\0\x08"), ((3, 30), b"\0\x08"), ((3, 120), b"\5"), ((8, 10), inside)]
    return b"".join(bytes([0x1C, *tag]) + struct.pack(">H", len(body)) + body for tag, body in fields) + bytes(5)


@pytest.mark.parametrize("name", ["a.png", "a.iim"])
def test_postscript_inside_a_picture_starts_no_program(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL opens what lies in IPTC by its content, and draws PostScript by Ghostscript."""
    started: list[object] = []

    def ghostscript(*args: object, **options: object) -> Any:
        started.append(args)
        return Image.new("L", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    content = iptc(saved("EPS", size=8))
    with Image.open(io.BytesIO(content)) as image:
        image.load()
    assert len(started) == 1  # the file is one
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"of no known format|no images in it"):
        load(DataConfig(str(tmp_path / "data")))
    assert len(started) == 1


def test_only_plain_pictures_are_opened() -> None:
    Image.init()
    assert set(pictures.formats()) <= set(pictures.FORMATS) & set(Image.ID)
    for kind in {*Image.SAVE} - {*pictures.FORMATS}:
        for mode in ("RGB", "L", "1"):
            try:
                content = saved(kind, mode, 16)
            except Exception:  # it has no such mode, or PIL writes it by a program
                continue
            try:
                with pictures.opened(content) as image:
                    assert image.format in pictures.FORMATS, kind  # MPO begins as a JPEG does
            except Image.UnidentifiedImageError:
                pass


@pytest.mark.parametrize(
    ("kind", "size", "options", "count"),
    [
        ("PNG", 16, {}, 60_000),
        ("JPEG", 64, {}, 100_000),
        ("JPEG", 1024, {"progressive": True, "icc_profile": bytes(500_000), "exif": bytes(60_000)}, 1),
        ("PNG", 256, {"icc_profile": bytes(60_000)}, 1000),
        ("TIFF", 32, {}, 60_000),
        ("AVIF", 64, {}, 60_000),
    ],
)
def test_pictures_as_people_have_them_are_not_too_much_work(
    kind: str, size: int, options: dict[str, Any], count: int
) -> None:
    if kind not in pictures.formats():
        pytest.skip("this PIL has no such format")
    file = io.BytesIO()
    Image.effect_noise((size, size), 64).save(file, kind, **options)
    content = file.getvalue()
    assert effort.of(content) * count <= effort.most(len(content) * count) and effort.passes(content) == 1


def test_a_survey_looks_at_so_many_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_SURVEYED", 3)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(saved("PNG", "RGB" if i else "L"))
    with pytest.raises(UserError, match=r"\(found among the first 3: 2 RGB 4x4, 1 grey 4x4\)$"):
        load(DataConfig(str(tmp_path)))
