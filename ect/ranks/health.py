"""Health of a run: how many of its updates were finite, and what to say where it has diverged.

An update is bad where its loss, or most of its gradient values, are not finite: the rule puts numbers in their place, as the
public code does, which teach nothing. With a loss scale such a step is skipped and the scale halves, which is normal; it is
bad only where the scale can fall no further. A bad update here and there harms little: the weights stay finite, and the next
images teach again. So a row of statistics is bad where at least half of its updates are, and a run has diverged after
PATIENCE bad rows in a row; or where its very last update is bad, for nobody knows whether it would recover. All of it is
counted on the device: reading the counts waits for it, once a row or a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ect_kernels.radam_ema import SCALE_RANGE
from torch import Tensor

from ect.errors import Diverged
from ect.ranks.distributed import World
from ect.ranks.first_bad import agreed, all_finite, beside, first_bad
from ect.step import TrainStep

PATIENCE = 3
"""A run stops after so many bad rows of statistics in a row. A row is bad where at least half of its updates are."""
_WHAT = "a loss or most gradients were not finite"


class Health:
    """Losses and bad updates since the last row of statistics.

    Args: step: of the run. world: every method but `add` is called by all ranks together, and answers the same on all.
    """

    def __init__(self, step: TrainStep, world: World = World()) -> None:
        self.step, self.state, self.world = step, step.state, world
        self.values = sum(p.numel() for p in self.state.inputs)
        self.bad_rows = 0
        """Bad rows in a row, up to now."""
        self.grad_norm_max = 0.0
        """The largest gradient norm of an update of the last row, without skipped ones."""
        self._some = ""  # how many updates of the last row were bad, "" for none
        self._first = False  # whether it is the first such row in a row
        self._ends_badly = False
        self._ago = 1  # how many updates before the end of the last row its last bad one began
        self._unbroken = True  # no bad update between the last checkpoint and the last row
        self._begin(torch.zeros((), dtype=torch.float64, device=self.state.params.device))

    def _begin(
        self, loss: Tensor, counts: tuple[float, float] = (0.0, 0.0), steps: int = 0, largest: float = 0.0
    ) -> None:
        self.loss, self.steps = loss, steps  # a sum in fp64: that of finite fp32 numbers is finite
        self.counts = torch.tensor(counts, dtype=torch.float64, device=loss.device)  # finite losses, bad updates
        self._seen = self.state.nonfinite.clone()
        self._largest = torch.full_like(loss, largest)
        self._latest = torch.full_like(self._seen, -1)  # number of the last bad update in this row

    def add(self, loss: Tensor) -> None:
        """Count an update that was just done. Args: loss: mean over this rank's images, a 0-d tensor."""
        kept = torch.nan_to_num(loss, 0.0, 0.0, 0.0)
        finite, met = kept == loss, self.state.nonfinite - self._seen
        if self.state.loss_scale is None:
            bad = ~finite | (2 * met > self.values)
        else:
            bad = (met > 0) & ~(self.state.loss_scale > SCALE_RANGE[0])  # where the scale itself is NaN, too
        self.loss = self.loss + kept
        self.counts += torch.stack([finite, bad])
        norm = torch.nan_to_num(self.state.grad_norm, 0.0, 0.0)  # inf where the step was skipped
        self._largest = torch.maximum(self._largest, norm)
        self._latest.masked_fill_(bad, self.steps)
        self._seen.copy_(self.state.nonfinite)
        self.steps += 1

    def _read(self) -> tuple[float, float, float, bool]:
        """Sum of the finite losses, their number, number of bad updates: means over the ranks. And whether none was bad."""
        none = self.counts[1:] == 0
        loss, finite, bad, good = torch.cat([self.loss.view(1), self.counts, none]).tolist()
        return self.world.mean(loss), self.world.mean(finite), self.world.mean(bad), not self.world.any(not good)

    def row(self) -> dict[str, Any]:
        """Return the mean of the finite losses since the last row (nan without one) and how many updates were bad."""
        steps, (loss, finite, bad, good) = self.steps, self._read()
        most, latest, self.grad_norm_max = torch.stack(
            [2 * self.counts[1] >= steps, self._latest, self._largest]
        ).tolist()
        self._ago = steps - int(latest) if latest >= 0 else 1
        most = self.world.any(not good and bool(most))
        self._ends_badly = self.world.any(latest == steps - 1)
        self.bad_rows = self.bad_rows + 1 if most else 0
        self._unbroken &= good
        row = {"loss": loss / finite if finite else math.nan, "bad_steps": math.ceil(bad)}
        self._first = not good and not self._some
        self._some = "" if good else f"{row['bad_steps']} of {steps} updates"
        self._begin(torch.zeros_like(self.loss))
        return row

    def judge(self, nimg: int, last: bool, back: Callable[[], Path]) -> str | None:
        """Return what to say of the row that ends at these images seen; None of a good one, or of one after its like.

        Raises Diverged after PATIENCE bad rows, or where the last update of a run is bad; back: as for `diverged`.
        """
        if self.bad_rows >= PATIENCE or (last and self._ends_badly):
            why = f"{_WHAT} in the last {max(self.bad_rows, 1)} row(s) of statistics"
            raise self.diverged(nimg, why, back)
        if not self._first:
            return None
        return (
            f"at {nimg / 1000:g} kimg: {_WHAT} since the last row of statistics, in {self._some}; the run stops after "
            f"{PATIENCE} rows in a row that have as many bad updates as others"
        )

    def refuse_to_save(self, nimg: int, back: Callable[[], Path]) -> None:
        """Raise Diverged, on all ranks, where a checkpoint of now would hold a number that is not finite on any of them."""
        if self.world.any(not all_finite([*self.state.saved_arenas().values(), *beside(self.state).values()])):
            raise self.diverged(nimg, "weights, moments, averages or the loss scale are not finite", back)

    def diverged(self, nimg: int, why: str, back: Callable[[], Path]) -> Diverged:
        """Return what to raise. back: lets the run folder stand for its last healthy checkpoint, and returns its model file."""
        kept = self.world.first(lambda: str(back()))
        bad = agreed(first_bad(self.step, max(nimg - self._ago * self.step.batch, 0)), self.world)
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
        numbers = {"tally_steps": self.steps, "tally_counts": [finite, bad], "bad_rows": self.bad_rows}
        numbers["grad_norm_max"] = float(self._largest)
        return healthy, {"tally_loss": torch.tensor(loss, dtype=torch.float64)}, numbers

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Load what `saved` returned, to go on where it was; a checkpoint of version 0.1 counted no bad updates."""
        steps = meta["tally_steps"]
        finite, bad = meta.get("tally_counts", (steps, 0))
        self.bad_rows = meta.get("bad_rows", 0)
        loss = torch.nan_to_num(tensors["tally_loss"].to(self.loss), 0.0, 0.0, 0.0)
        self._begin(loss, (finite, bad), steps, meta.get("grad_norm_max", 0.0))
