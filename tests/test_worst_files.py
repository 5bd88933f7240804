"""Small files that ask for much: what unpacks a thousandfold, what is wide, deep or numerous. Each is refused, or read, within
five seconds and 1 GB."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from ect.config import DataConfig
from ect.data import load
from ect.data.readers import cifar10, labels
from ect.files import edm_pickle, torch_file
from ect.files.checkpoint import load_model
from ect.files.run_folder import load as load_config
from ect.metrics.fidelity import read_statistics
from tests.fuzz.bounded import LARGEST, bounded

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="watches memory by /proc"),
    pytest.mark.slow,
    pytest.mark.unwritten,  # the bounds are those of the readers alone
]


def data(path: Path, **options: Any) -> str:
    return load(DataConfig(str(path), **options)).describe()


def png(width: int, height: int, colour: int = 2, depth: int = 8) -> bytes:
    """A picture of zeros, as small as it can be."""
    bits = width * {0: 1, 2: 3, 3: 1, 6: 4}[colour] * depth
    packer, rows = zlib.compressobj(9), []
    line = bytes(1 + (bits + 7) // 8)
    for start in range(0, height, 64):
        rows.append(packer.compress(line * min(64, height - start)))
    body = b"".join(rows) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def small(count: int, size: int = 8) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    return {f"{i:06d}.png": file.getvalue() for i in range(count)}


def fast(content: bytes) -> bytes:
    return gzip.compress(content, 1)


def one_picture(width: int, height: int, **kind: int) -> Callable[[Path], None]:
    return lambda path: zipped(path, {"a.png": png(width, height, **kind)})


def many_large(path: Path) -> None:
    content = png(6000, 6000)
    zipped(path, {f"{i}.png": content for i in range(60)})


def many_grey(path: Path, depth: int = 8, length: int = 22_300) -> None:
    """As many as are still read: each file is as long as its pixels need it to be."""
    content = png(1000, 1000, colour=0, depth=depth).ljust(length, b"\0")
    zipped(path, {f"{i:03d}.png": content for i in range(9_800_000 // (length + 120))})


def many_of_bits(path: Path) -> None:
    many_grey(path, 1, 16_750)


def huge_first(path: Path) -> None:
    zipped(path, {"a.png": png(4096, 4096), **small(3000)})


def trailing(path: Path) -> None:
    content = small(1)["000000.png"] + bytes(200 << 20)
    zipped(path, {f"{i}.png": content for i in range(4)}, zipfile.ZIP_DEFLATED)


def nameless(path: Path) -> None:
    zipped(path, {"~": b"x"})
    path.write_bytes(path.read_bytes().replace(b"~", b"\0"))


def damaged(path: Path) -> None:
    zipped(path, small(1), zipfile.ZIP_LZMA)
    content = bytearray(path.read_bytes())
    content[60:80] = b"\xff" * 20
    path.write_bytes(content)


def labelled(text: bytes, count: int = 2, compression: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], None]:
    return lambda path: zipped(path, {**small(count), "dataset.json": text}, compression)


def classes(count: int, most: int) -> bytes:
    return json.dumps({"labels": [[f"{i:06d}.png", most if i else 0] for i in range(count)]}).encode()


def shared_member(path: Path) -> None:
    """A central directory of 100,000 names for one picture."""
    file, content = io.BytesIO(), small(1)["000000.png"]
    crc = zlib.crc32(content)
    file.write(
        struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, crc, len(content), len(content), 5, 0)
        + b"a.png"
        + content
    )
    start = file.tell()
    for i in range(60_000):
        name = f"{i:05d}.png".encode()
        fields = (0x02014B50, 20, 20, 0, 0, 0, 0, crc, len(content), len(content), len(name), 0, 0, 0, 0, 0, 0)
        file.write(struct.pack("<IHHHHHHIIIHHHHHII", *fields) + name)
    size = file.tell() - start
    file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF & 60_000, 0xFFFF & 60_000, size, start, 0))
    path.write_bytes(file.getvalue())


def tar_of(*members: tuple[str, int, bytes], pack: Callable[[bytes], bytes] = bytes) -> Callable[[Path], None]:
    """An archive of headers (name, size claimed, type), each with so many zeros behind it; all at once in memory."""

    def write(path: Path) -> None:
        file = io.BytesIO()
        for name, size, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = size, kind
            file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes((size + 511) // 512 * 512))
        path.write_bytes(pack(file.getvalue()))

    return write


def idx(shape: tuple[int, int, int], label: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        count = shape[0]
        images = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + bytes(count * shape[1] * shape[2])
        path.write_bytes(fast(images))
        beside = bytes([0, 0, 8, 1]) + struct.pack(">I", count) + bytes(count - 1) + bytes([label])
        path.with_name(path.name.replace("images-idx3", "labels-idx1")).write_bytes(fast(beside))

    return write


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def header(text: bytes) -> Callable[[Path], None]:
    return raw(len(text).to_bytes(8, "little") + text)


def described(text: str) -> Callable[[Path], None]:
    return raw(save({"x": torch.zeros(1)}, {"ect": text}))


REG, LONG, PAX = tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE
MEGA = 1 << 20
FILES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "one picture, 170 million pixels": ("s.zip", one_picture(13_000, 13_000), {"resolution": 32}),
    "one picture, untouched": ("s.zip", one_picture(8_000, 6_500), {}),
    "one picture with transparency": ("s.zip", one_picture(7_000, 7_000, colour=6), {"resolution": 32, "convert": "rgb"}),
    "one picture of bits": ("s.zip", one_picture(13_000, 13_000, colour=0, depth=1), {"resolution": 32, "convert": "grey"}),
    "one picture of a palette": ("s.zip", one_picture(7_000, 7_000, colour=3), {"resolution": 32, "convert": "rgb"}),
    "one picture of 16 bits": ("s.zip", one_picture(7_000, 7_000, colour=0, depth=16), {"resolution": 32, "convert": "rgb"}),
    "one line": ("s.zip", one_picture(1_000_000, 1), {"resolution": 32}),
    "many grey pictures": ("s.zip", many_grey, {"resolution": 32}),
    "many pictures of bits": ("s.zip", many_of_bits, {"resolution": 32, "convert": "grey"}),
    "many large pictures": ("s.zip", many_large, {"resolution": 32}),
    "a first picture that the others are to be like": ("s.zip", huge_first, {}),
    "zeros behind each picture": ("s.zip", trailing, {}),
    "a name that is empty": ("s.zip", nameless, {}),
    "damaged, of a rare compression": ("s.zip", damaged, {}),
    "many pictures": ("s.zip", lambda path: zipped(path, small(30_000)), {}),
    "one picture under many names": ("s.zip", shared_member, {}),
    "labels that unpack": ("s.zip", labelled(b'{"labels": [' + b"[]," * (60 * MEGA) + b"0]}"), {"labels": True}),
    "labels, deep": ("s.zip", labelled(b'{"labels": ' + b"[" * (4 * MEGA)), {"labels": True}),
    "labels, wide": ("s.zip", labelled(b'{"labels": [' + b"[]," * (3 * MEGA) + b"0]}"), {"labels": True}),
    "labels of a large index": ("s.zip", labelled(classes(20_000, 32_000), 20_000, zipfile.ZIP_STORED), {"labels": True}),
    "images that unpack": ("a-images-idx3-ubyte.gz", idx((9 * MEGA, 8, 8)), {}),
    "many small images": ("a-images-idx3-ubyte.gz", idx((4 * MEGA, 4, 4)), {}),
    "images to be padded": ("a-images-idx3-ubyte.gz", idx((80_000, 28, 28)), {}),
    "labels of many images": ("a-images-idx3-ubyte.gz", idx((4 * MEGA, 4, 4), 255), {"labels": True}),
    "a file to skip": ("c.tar.gz", tar_of(("x", 280 * MEGA, REG), pack=fast), {}),
    "a file to skip, bzip2": ("c.tar", tar_of(("x", 280 * MEGA, REG), pack=lambda data: bz2.compress(data, 1)), {}),
    "a file to skip, xz": ("c.tar", tar_of(("x", 280 * MEGA, REG), pack=lambda data: lzma.compress(data, preset=0)), {}),
    "a long name": ("c.tar.gz", tar_of(("x", 260 * MEGA, LONG), pack=fast), {}),
    "a long header": ("c.tar.gz", tar_of(("x", 260 * MEGA, PAX), pack=fast), {}),
    "many files": ("c.tar.gz", tar_of(*[("x", 0, REG)] * 100_000, pack=fast), {}),
    "large batches": ("c.tar.gz", tar_of(*((name, 48 * MEGA, REG) for name in cifar10.BATCHES), pack=fast), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_data(name: str, tmp_path: Path) -> None:
    file, write, options = FILES[name]
    path = tmp_path / file
    write(path)
    assert path.stat().st_size < LARGEST
    bounded(lambda: data(path, **options))


BRACKETS, PAIRS = b"[" * (9 * MEGA), b'["a",0],' * MEGA
TENSOR: dict[str, Any] = {"dtype": "F32", "data_offsets": [0, 0]}
MANY = {str(i): {**TENSOR, "shape": [0]} for i in range(120_000)}
LONG_SHAPE = {"x": {**TENSOR, "shape": [1] * 2_000_000}}
WIDE = ",".join(f'"{i}": 0' for i in range(500_000))


def config(path: Path) -> object:
    return load_config(path.parent)


def of_json(path: Path) -> object:
    return labels.from_json(path.read_bytes(), ["a"], path)


OTHERS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], None]]] = {
    "a header of brackets": (load_model, "m.safetensors", header(BRACKETS)),
    "a header of many tensors": (load_model, "m.safetensors", header(json.dumps(MANY).encode())),
    "a tensor of many sizes": (load_model, "m.safetensors", header(json.dumps(LONG_SHAPE).encode())),
    "a wide description": (
        load_model, "m.safetensors", described(f'{{"format": 1, "spec": {{"kwargs": {{{WIDE}}}}}, "info": {{}}}}')
    ),
    "a config of brackets": (config, "config.json", raw(BRACKETS)),
    "a config of objects": (config, "config.json", raw(b'{"a":' * MEGA)),
    "a wide config": (config, "config.json", raw(b"{" + b",".join(b'"%d": []' % i for i in range(700_000)) + b"}")),
    "a long field": (config, "config.json", raw(json.dumps({"preset": ["y" * 9 * MEGA]}).encode())),
    "a long number": (config, "config.json", raw(b'{"batch": ' + b"9" * (9 * MEGA) + b"}")),
    "a snapshot, which is small": (edm_pickle.read, "s.pkl", raw(b"N.")),
    "an IDX file that promises much": (data, "a-images-idx3-ubyte", raw(bytes([0, 0, 8, 3]) + b"\x00\x02\x00\x00" * 3)),
    "names of weights": (torch_file.read, "w.pth", raw(b"\x80\x04" + b"N0" * (4 * MEGA) + b".")),
    "labels, deep": (of_json, "dataset.json", raw(BRACKETS)),
    "labels, many": (of_json, "dataset.json", raw(b'{"labels": [' + PAIRS + b"0]}")),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_files(name: str, tmp_path: Path) -> None:
    read, file, write = OTHERS[name]
    path = tmp_path / file
    write(path)
    assert path.stat().st_size < LARGEST
    assert bounded(lambda: read(path)) is not None


def array(header: str) -> Callable[[Path], None]:
    """Statistics of arrays that say this of themselves, and have no values."""
    text = header.encode()
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    return lambda path: zipped(path, {"mu.npy": content, "sigma.npy": content})


ARRAYS = {
    "texts without letters": array("{'descr': '|S0', 'fortran_order': False, 'shape': (400000000,), }"),
    "wide texts without letters": array("{'descr': '<U0', 'fortran_order': False, 'shape': (40000000000,), }"),
    "signs": array("-" * 9000 + "1"),
    "brackets": array("[" * 9000),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    ARRAYS[name](path)
    assert "cannot be read (an array " in (bounded(lambda: read_statistics(path)) or "")
