"""The place of this process among those that torchrun, or another launcher, started: read from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ect.errors import UserError

REMEDY = "start the processes with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Place:
    """Process `rank` of `size`, `local_rank` of the `local_size` on its machine; rank 0 is found at address and port.

    served: a launcher keeps torch.distributed's store at that port, and not rank 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    served: bool = False

    @classmethod
    def read(cls) -> Place:
        """Return the place that the environment names: alone where it names none.

        Raises UserError where a variable is missing, no number, or beyond what the others allow.
        """
        size = _number("WORLD_SIZE", 1, 1, 2**20)
        if size > 1 and "RANK" not in os.environ:
            raise UserError(f"WORLD_SIZE={size}: RANK is not set, so this process has no number; {_or_alone()}")
        rank = _number("RANK", 0, 0, size - 1, f"below WORLD_SIZE={size}")
        if size == 1:
            return cls()
        local_size = _number("LOCAL_WORLD_SIZE", 1, 1, size, f"up to WORLD_SIZE={size}")
        most = local_size - 1 if "LOCAL_WORLD_SIZE" in os.environ else size - 1
        local_rank = _number("LOCAL_RANK", 0, 0, most, f"below LOCAL_WORLD_SIZE={most + 1}")
        address = os.environ.get("MASTER_ADDR", "")
        if not address or "MASTER_PORT" not in os.environ:
            missing = "MASTER_PORT" if address else "MASTER_ADDR"
            raise UserError(f"{missing} is not set, and WORLD_SIZE={size}: rank 0 cannot be found; {_or_alone()}")
        port = _number("MASTER_PORT", 0, 1, 65535, "a port")
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, size, local_rank, local_size, address, port, served)

    def again(self, module: str, options: str) -> str:
        """Return the command that starts `python -m module options` again by as many processes."""
        if self.local_size == self.size:
            return f"torchrun --nproc-per-node {self.size} -m {module} {options}"
        return f"python -m {module} {options} (by the launcher that started these {self.size} processes)"


def _number(name: str, default: int, least: int, most: int, which: str = "") -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    number = int(text) if text.strip().isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        expected = f"a number from {least} to {most}" + f", {which}" * bool(which)
        raise UserError(f"{name}={text:.60}: expected {expected}; {_or_alone()}")
    return number


def _or_alone() -> str:
    return f"{REMEDY}, or unset RANK and WORLD_SIZE to run one process alone"
