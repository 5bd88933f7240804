"""The ranks tell each other how each was started, before anything else: numbers, refusals and options must fit together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NAMED = 3
"""Options that a refusal names."""
LONGEST = 4000
"""Characters of a refusal that are passed on."""


def hello(options: Any, status: int | None, said: str) -> dict[str, Any]:
    """Return what a rank tells of its command line: options by name, or the status with which it refused it, and its words."""
    told = {} if options is None else {name: str(value) for name, value in _fields(options)}
    return {"options": told, "status": status, "said": said.strip()[:LONGEST]}


def _fields(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each field of a dataclass, nested ones included; of anything else its own value."""
    if not dataclasses.is_dataclass(options):
        yield prefix.rstrip(".") or "command", options
        return
    for field in dataclasses.fields(options):
        yield from _fields(getattr(options, field.name), f"{prefix}{field.name.replace('_', '-')}.")


def refusal(hellos: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """Return (exit status, what rank 0 says) where the ranks do not fit together, else None. All ranks find the same.

    Where rank 0 refuses its own command line, it has said why, and says nothing more.
    """
    first = hellos[0]
    for other in hellos[1:]:
        if other["size"] != first["size"]:
            text = f"rank {other['rank']} was started as one of {other['size']} (WORLD_SIZE), rank 0 as one of {first['size']}"
            return 2, f"{text}; start all of them with one number"
    ranks = [told["rank"] for told in hellos]
    if twice := [rank for rank in ranks if ranks.count(rank) > 1]:
        return 2, f"RANK={twice[0]}: two processes have this number; give each its own"
    if first["status"]:
        return first["status"], ""
    for other in hellos[1:]:
        who = f"rank {other['rank']} of {len(ranks)}"
        if other["status"]:
            return other["status"], f"{who} refuses its command line: {other['said']}"
        if other["status"] != first["status"]:
            alone = who if first["status"] is None else f"rank 0 of {len(ranks)}"
            why = "has nothing to run (--help or --dry-run), and others have"
            return 2, f"{alone} {why}; give all the same options"
    if first["status"] is not None:
        return first["status"], ""
    for other in hellos[1:]:
        theirs, ours = other["options"], first["options"]
        if differ := [name for name in ours if theirs.get(name) != ours[name]]:
            told = ", ".join(f"--{name} {theirs.get(name)} for {ours[name]}" for name in differ[:NAMED])
            told += f" and {len(differ) - NAMED} more" * (len(differ) > NAMED)
            return 2, f"rank {other['rank']} of {len(ranks)} has other options than rank 0: {told}; give all the same"
    return None
