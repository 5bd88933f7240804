"""The registration of the ops with PyTorch, which calls them by name: torch.ops.ect.<name>.

Not by torch.library.custom_op: a call of such an op costs three times as much on the host, where small networks spend most of
their time, and the first one imports the compiler, seconds that a run without it would pay for nothing. The ops have no
gradient of their own; the functions around them are torch.autograd.Functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions that run, by the name of the op."""

_libraries: dict[str, torch.library.Library] = {}


def register(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ect::<name>, anew if it is known, and return it as a function.

    schema: "(arguments) -> (results)". fake: makes the results of arguments that have shapes but no values.
    """
    if (old := _libraries.pop(name, None)) is not None:
        old._destroy()
    library = _libraries[name] = torch.library.Library("ect", "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ect::{name}", fake, lib=library)
    FUNCTIONS[name] = function
    return getattr(torch.ops.ect, name).default
