"""Compare weights with a network: names, shapes and number must agree, and each value be finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ect.errors import UserError


@contextlib.contextmanager
def about(tensors: int) -> Iterator[None]:
    """Let no network be made inside that has far more parameters than the `tensors` of a file: one too many raises UserError.

    A few too many pass: `check_names` then names those that the file lacks.
    """
    room = 2 * tensors + 100

    def count(_module: nn.Module, _name: str, _parameter: nn.Parameter | None) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise UserError(f"it asks for far more tensors than the {tensors} that the file holds")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_names(expected: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Raise UserError, naming `source` and what differs, unless names and shapes agree."""
    wrong = [f"missing {key}" for key in expected if key not in state]
    wrong += [f"unexpected {key}" for key in state if key not in expected]
    wrong += [
        f"{key} is {_shape(state[key])} instead of {_shape(tensor)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(f"{source}: the weights do not fit the network: {'; '.join(wrong[:6])}{more}")


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """Raise UserError, naming `source` and the first tensor with a NaN or infinite value, where there is one."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{source}: {name} holds NaN or infinite values: the run that wrote it had diverged; "
                "take an earlier checkpoint of it"
            )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
