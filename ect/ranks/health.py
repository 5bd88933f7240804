"""Health of a run: how many of its updates were finite, and what to say where it has diverged.

An update is bad where its loss, or most of its gradient values, are not finite: the rule puts numbers in their place, which
teach nothing. With a loss scale such a step is skipped and the scale halves, which is normal; it is bad only where the scale
can fall no further. All of it is counted on the device: reading the counts waits for it, once a row or a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from ect_kernels.radam_ema import SCALE_RANGE
from torch import Tensor

from ect.errors import Diverged
from ect.ranks.distributed import World
from ect.step import TrainStep

PATIENCE = 3
"""A run stops after so many rows of statistics in a row, each with at least one bad update."""


class Health:
    """Losses and bad updates since the last row of statistics.

    Args: step: of the run. world: every method but `add` is called by all ranks together, and answers the same on all.
    """

    def __init__(self, step: TrainStep, world: World = World()) -> None:
        self.step, self.state, self.world = step, step.state, world
        self.values = sum(p.numel() for p in self.state.inputs)
        self.bad_rows = 0
        """Bad rows in a row, up to now."""
        self._unbroken = True  # no bad update between the last checkpoint and the last row
        self._begin(torch.zeros((), device=self.state.params.device))

    def _begin(self, loss: Tensor, counts: tuple[float, float] = (0.0, 0.0), steps: int = 0) -> None:
        self.loss, self.steps = loss, steps
        self.counts = torch.tensor(counts, dtype=torch.float64, device=loss.device)  # finite losses, bad updates
        self._seen = self.state.nonfinite.clone()

    def add(self, loss: Tensor) -> None:
        """Count an update that was just done. Args: loss: mean over this rank's images, a 0-d tensor."""
        finite, met = loss.isfinite(), self.state.nonfinite - self._seen
        if self.state.loss_scale is None:
            bad = ~finite | (2 * met > self.values)
        else:
            bad = (met > 0) & (self.state.loss_scale <= SCALE_RANGE[0])
        self.loss = self.loss + torch.where(finite, loss, 0.0)
        self.counts += torch.stack([finite, bad])
        self._seen.copy_(self.state.nonfinite)
        self.steps += 1

    def _read(self) -> tuple[float, float, float, bool]:
        """Sum of the finite losses, their number, number of bad updates: means over the ranks. And whether none was bad."""
        none = self.counts[1:] == 0
        loss, finite, bad, good = torch.cat([self.loss.double().view(1), self.counts, none]).tolist()
        return self.world.mean(loss), self.world.mean(finite), self.world.mean(bad), not self.world.any(not good)

    def row(self) -> dict[str, Any]:
        """Return the mean of the finite losses since the last row (nan without one) and how many updates were bad."""
        loss, finite, bad, good = self._read()
        self.bad_rows = 0 if good else self.bad_rows + 1
        self._unbroken &= good
        row = {"loss": loss / finite if finite else math.nan, "bad_steps": math.ceil(bad)}
        self._begin(torch.zeros_like(self.loss))
        return row

    def judge(self, nimg: int, last: bool, back: Callable[[], Path]) -> str | None:
        """Return what to say of the row of these images seen, None of a good one or one that is like the one before.

        Raises Diverged after PATIENCE bad rows, or where the last row of a run is bad; back: as for `diverged`.
        """
        rows = self.bad_rows
        if rows >= PATIENCE or (last and rows):
            why = f"a loss or most gradients were not finite in the last {rows} row(s) of statistics"
            raise self.diverged(nimg, why, back)
        if rows != 1:
            return None
        return (
            f"at {nimg / 1000:g} kimg: a loss or most gradients were not finite since the last row of statistics; "
            f"the run stops after {PATIENCE} such rows"
        )

    def diverged(self, nimg: int, why: str, back: Callable[[], Path]) -> Diverged:
        """Return what to raise. back: lets the run folder stand for its last healthy checkpoint, and returns its model file."""
        kept = self.world.first(lambda: str(back()))
        bad = self.first_bad()
        named = "" if bad is None else f"; the first bad tensor is {bad}"
        return Diverged(
            f"the run diverged and stopped at {nimg / 1000:g} kimg: {why}{named}. The "
            f"last healthy checkpoint is {kept}: start a new run from it with --init-from {kept} and a lower --optim.lr, "
            "--optim.clip 1 or --precision fp32"
        )

    def saved(self) -> tuple[bool, dict[str, Tensor], dict[str, Any]]:
        """Return (whether no update since the last checkpoint was bad, the tensors, the numbers that a resume needs)."""
        loss, finite, bad, good = self._read()
        healthy, self._unbroken = self._unbroken and good, True
        return healthy, {"tally_loss": torch.tensor(loss)}, {"tally_steps": self.steps, "tally_counts": [finite, bad]}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Load what `saved` returned, to go on where it was; a checkpoint of version 0.1 counted no bad updates."""
        steps = meta["tally_steps"]
        finite, bad = meta.get("tally_counts", (steps, 0))
        self._begin(tensors["tally_loss"].to(self.loss.device), (finite, bad), steps)

    def first_bad(self) -> str | None:
        """Return the name of the first tensor that is not finite: of the state, else of the last images' gradients."""
        state, step = self.state, self.step
        for name, view in state.saved_views().items():
            if not all_finite([view]):
                return name
        step.use(compiled=False, graph=False)  # whatever is captured overwrites non-finite gradients
        try:
            step.gradients()
        except torch.OutOfMemoryError:  # a captured update leaves little room
            return None
        names = (name for name, _ in state.net.named_parameters())
        for name, view in zip(names, state.views(state.grads), strict=True):
            if not all_finite([view]):
                return f"the gradient of {name}"
        return None


def all_finite(arenas: Iterable[Tensor]) -> bool:
    """Return whether every value of non-empty tensors is finite; no copy is made of them."""
    return bool(torch.stack([end for arena in arenas for end in torch.aminmax(arena)]).isfinite().all())
