"""Strategies that spoil what is valid: bytes, and values of JSON."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -1, -(2**63), 0, 1, 255, 65536]
FLOATS = [float("nan"), float("inf"), float("-inf"), 1e300, -1e300, 5e-324, -0.0, 0.5]
LIMIT = 9_000_000  # bytes of a file
WORDS = [
    "",
    "a",
    "\0",
    "é☃",
    "\x1b[2J",
    "a\nb",
    "../../x",
    "/etc/passwd",
    "y" * 3000,
    "__class__",
    "\ud800",
    "ema",
    "None",
]
_BLOCKS = [
    b"",
    b"\0" * 8,
    b"\xff" * 8,
    b"(" * 500,
    b"[" * 1000,
    b"]" * 1000,
    b"." * 4,
    b"\x85" * 2000,
    b"}" * 300,
    b"PK\x03\x04",
]
_BLOCKS += [
    b"cos\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"\x80\x04",
    b"\x94" * 200,
    b"\x7f\xff\xff\xff",
    b"0" * 600,
]
_BLOCKS += [n.to_bytes(8, order) for n in (2**31, 2**32 - 1, 2**40, 2**63 - 1, 10**6) for order in ("little", "big")]  # type: ignore[arg-type]


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes, most: int = 6) -> bytes:
    """A file with up to `most` faults: bits flipped, cut short, a part removed, doubled, moved, overwritten, inserted."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, most))):
        size = len(data)
        at = draw(st.integers(0, max(size - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 8, 16, 64, 512, size]))
        part = bytes(data[at : at + length])
        kind = draw(
            st.sampled_from(["flip", "byte", "cut", "remove", "double", "move", "write", "insert", "repeat", "random"])
        )
        if kind == "flip" and size:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and size:
            data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x28, 0x2E]) | st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = part
        elif kind == "move":
            to = draw(st.integers(0, max(size - 1, 0)))
            data[to : to + len(part)] = part
        elif kind == "write":
            block = draw(st.sampled_from(_BLOCKS))
            data[at : at + len(block)] = block
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from(_BLOCKS))
        elif kind == "repeat":
            data[at:at] = part * min(draw(st.sampled_from([2, 100, 5000])), LIMIT // max(len(part), 1))
        elif kind == "random":
            data[at:at] = draw(st.binary(max_size=40))
    return bytes(data[:LIMIT])


def nested(depth: int, kind: str) -> Any:
    """Lists, or objects, inside one another."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def anything() -> st.SearchStrategy[Any]:
    """A value of JSON of any type: plain, huge, deep, wide."""
    plain = st.sampled_from([None, True, False, *HUGE, *FLOATS, *WORDS]) | st.integers() | st.text(max_size=5)
    deep = st.builds(nested, st.sampled_from([1, 5, 100, 400, 700]), st.sampled_from(["list", "object"]))
    wide = st.sampled_from([2, 40, 5000]).flatmap(
        lambda n: st.sampled_from([[0] * n, ["a"] * n, {str(i): i for i in range(n)}])
    )
    return st.one_of(
        plain, deep, wide, st.lists(plain, max_size=4), st.dictionaries(st.text(max_size=4), plain, max_size=3)
    )


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each node of a value of JSON, the root's among them; not far down, or what is put there would be too deep for
    json itself."""
    if len(prefix) == 50:
        return [prefix]
    inside = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [prefix, *(path for key, item in inside for path in paths(item, (*prefix, key)))]


@st.composite
def spoilt_json(draw: st.DrawFn, whole: Any, most: int = 3) -> Any:
    """A value of JSON with up to `most` nodes replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, most))):
        path = draw(st.sampled_from(paths(value)))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename", "wrap"]))
        if not path:
            value = draw(anything()) if kind == "replace" and draw(st.booleans()) else value
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        key = path[-1]
        if kind == "replace":
            owner[key] = draw(anything())
        elif kind == "wrap":
            owner[key] = draw(st.sampled_from([[owner[key]], {"a": owner[key]}, [owner[key]] * 3]))
        elif kind == "remove":
            del owner[key]
        elif isinstance(owner, list):
            owner.insert(key, draw(anything()))
        elif kind == "add":
            owner[draw(st.sampled_from(WORDS))] = draw(anything())
        else:
            owner[draw(st.sampled_from(WORDS))] = owner.pop(key)
    return value


@st.composite
def spoilt_text(draw: st.DrawFn, whole: Any) -> bytes:
    """A file of JSON: a value that is spoilt, written down, and at times the text spoilt too."""
    text = json.dumps(draw(spoilt_json(whole))).encode()
    return draw(st.one_of(st.just(text), st.just(text), spoilt(text, 2)))
