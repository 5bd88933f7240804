"""The names of ops and of their backends, and the reader of a choice among them. No torch is needed, so `--dry-run` has it."""

from __future__ import annotations

OPS = (
    "group_norm_silu",
    "residual_group_norm_silu",
    "skip_product",
    "levels",
    "perturb",
    "consistency_loss",
    "radam_ema",
)
NAMES = ("reference", "native", "triton", "cuda", "apex", "emulated")
"""The backends."""
KNOWN = dict.fromkeys(OPS)
"""The ops that a choice may name: those above, and each that somebody makes (`ect_kernels.dispatch.Op`)."""


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says which, why, and what can."""


def read(text: str, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """Return {"op or *": "backend"} of "op=backend,*=backend"; a lone backend name stands for all ops. Raises BackendError."""
    choice = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, name = part.rpartition("=")
        op = op.strip() or "*"
        if name not in names or (op != "*" and op not in KNOWN):
            raise BackendError(f"cannot read {part!r} in {text!r}; expected {expected(names)}")
        choice[op] = name
    return choice


def expected(names: tuple[str, ...] = NAMES) -> str:
    """Return what a choice is made of, for a message."""
    return f"op=backend with ops {', '.join(KNOWN)} or *; backends {', '.join(names)}"


def can_be_read(text: str) -> bool:
    """Return whether a text is a choice, whatever runs on this machine."""
    try:
        read(text)
    except BackendError:
        return False
    return True
