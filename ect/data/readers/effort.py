"""The work that a picture asks for beside its pixels, judged by its bytes: a small file must not keep the processor busy.

Metadata may unpack to a thousand times their size, or be copied as often as they come, before PIL has said what it found.
"""

from __future__ import annotations

import struct
import zlib

_FILE, _CHUNK, _MARKER, _PROBE, _UNPACKED = 65.0, 6.0, 1.5, 200.0, 3000.0
"""Microseconds: a file; a chunk of a PNG, beyond three; a marker of a JPEG; a look at what is packed; 1 MB unpacked."""
_SLOW = {b"avif": 220.0, b"WEBP": 105.0, b"II*\0": 190.0, b"MM\0*": 190.0}
"""The microseconds of a file in a format that takes longer, by its bytes 8 to 12 or 0 to 4."""
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PACKED = {b"iCCP", b"zTXt", b"iTXt"}
_SMALL = 2**16
"""Bytes that a colour profile, or a text, may unpack to at no charge."""
_COPIED = 10_000
"""Bytes that are copied in a microsecond."""
_ALWAYS, _RATE = 1e6, 0.25
"""A second always, and 2.5 for ten million bytes, so that a machine half as fast, or a busy one, takes five."""


def most(read: int) -> float:
    """Return how many microseconds may be spent beside the pixels on files of so many bytes.

    They are enough for 15,000 PNG files, however small, and for any number of those of 260 bytes: MNIST's have 270 as PNG.
    """
    return max(_ALWAYS, _RATE * read)


def of(data: bytes) -> float:
    """Return the microseconds that a picture in these bytes asks for beside its pixels."""
    if data.startswith(_PNG):
        return _FILE + max(0.0, _of_png(data))
    if data.startswith(_JPEG):
        return _FILE + _of_jpeg(data)
    return max(_FILE, _SLOW.get(data[8:12], 0.0), _SLOW.get(data[:4], 0.0))


def passes(data: bytes) -> int:
    """Return how often the pixels of a picture are walked through: a JPEG may come in any number of scans; cameras write 10."""
    return 1 + data.count(b"\xff\xda") // 16 if data.startswith(_JPEG) else 1


def _of_png(data: bytes) -> float:
    """Return the time for the chunks of a PNG beyond the three that each has, or some of it, where it is too much anyway."""
    at, spent = len(_PNG), -3 * _CHUNK
    while at + 8 <= len(data) and spent < most(len(data)):
        length, kind = struct.unpack_from(">I4s", data, at)
        spent += _CHUNK if kind not in _PACKED else _packed(kind, data[at + 8 : at + 8 + length])
        at += 12 + length
    return spent


def _packed(kind: bytes, content: bytes) -> float:
    _keyword, _, rest = content.partition(b"\0")
    if kind == b"iTXt":
        flag, rest = rest[:1], rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        if flag != b"\1":
            return _CHUNK
    else:
        rest = rest[1:]
    try:
        return _UNPACKED if len(zlib.decompressobj().decompress(rest, _SMALL)) == _SMALL else _PROBE
    except zlib.error:
        return _PROBE


def _of_jpeg(data: bytes) -> float:
    """Return the time for the markers of a JPEG. PIL joins its Exif segments one by one, each time copying those before."""
    return (
        data.count(b"\xff") * _MARKER
        - data.count(b"\xff\0") * _MARKER
        + data.count(b"\xff\xe1") * len(data) / _COPIED / 2
    )
