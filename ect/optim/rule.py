"""Rule: how an optimizer changes the parameters. A new optimizer is one file with one subclass of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ect_kernels.radam_ema import F64, I64, MAX_EMAS, OPTIMIZERS, new_state
from torch import Tensor

from ect.optim.arenas import Arenas


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of a rule. Raises ValueError, naming it, on an impossible value."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the moments, as torch.optim has them."""
    eps: float = 1e-8
    ema_betas: tuple[float, ...] = ()
    """Decays of the weight averages per step, at most 4."""
    clip: float | None = None
    """Largest global gradient norm; None: no clipping."""
    loss_scale: float | None = None
    """The first factor on the loss, and so on the gradients, that follows overflow from then on; None: no scaling."""
    growth_interval: int = 2000
    """Good steps before the loss scale doubles."""

    def __post_init__(self) -> None:
        for name, ok in [
            ("lr", self.lr >= 0),
            ("betas", all(0 <= b < 1 for b in self.betas)),
            ("eps", self.eps >= 0),
            ("ema_betas", len(self.ema_betas) <= MAX_EMAS and all(0 <= b <= 1 for b in self.ema_betas)),
            ("clip", self.clip is None or self.clip > 0),
            ("loss_scale", self.loss_scale is None or 0 < self.loss_scale < math.inf),
            ("growth_interval", self.growth_interval >= 1),
        ]:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}, out of range")


class _Setting:
    """A Python number that `step` reads at `index` of the device scalars; assigning it writes both, reading no device."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __get__(self, rule: Rule, owner: type) -> Any:
        return rule._values[self.index]

    def __set__(self, rule: Rule, value: float | None) -> None:
        rule._set(self.index, value)


class Rule(ABC):
    """An optimizer: it makes one update of the parameters from the gradients.

    A subclass says what arenas it keeps (`moments`) and writes `step`. lr, eps, clip and ema_betas may be changed between
    steps. Everything that a step reads or counts is on the device, in `state_f64` and `state_i64` (ect_kernels.radam_ema
    names their entries), and a step reads nothing on the host: one CUDA graph of an update serves every learning rate.

    `steps`, `nonfinite` (gradient values that were not finite, in all), `skipped` (steps), `grad_norm` (of the last step,
    before the clip) and `loss_scale` (None without one) are 0-d tensors there, which a step writes in place.

    Args: settings: hyper-parameters. device: of the arenas. Raises ValueError for a loss scale that the rule does not undo.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    """Names of the arenas that it keeps beside parameters and gradients; a checkpoint has them under these names."""
    takes_loss_scale: ClassVar[bool] = False
    """True where `step` divides the gradients by `loss_scale`, and skips steps that overflow."""
    op_name: ClassVar[str] = OPTIMIZERS[0]
    """The name of the rule in the op radam_ema. A rule that does not run on that op leaves it as it is."""

    lr, eps, clip = _Setting(F64.LR), _Setting(F64.EPS), _Setting(F64.CLIP)

    def __init__(self, settings: Settings, device: torch.device) -> None:
        s = settings
        if s.loss_scale is not None and not self.takes_loss_scale:
            raise ValueError(
                f"loss_scale is {s.loss_scale}; the rule {type(self).__name__} knows none, so fp16 cannot use it"
            )
        self.betas = s.betas
        self.state_f64, self.state_i64 = new_state(
            self.op_name, s.lr, s.betas, s.eps, s.clip, s.ema_betas, s.loss_scale, s.growth_interval, device
        )
        self._values: dict[int, float | None] = {F64.LR: s.lr, F64.EPS: s.eps, F64.CLIP: s.clip}
        self._values |= {F64.EMA_BETA0 + i: beta for i, beta in enumerate(s.ema_betas)}
        self._emas = range(F64.EMA_BETA0, F64.EMA_BETA0 + len(s.ema_betas))
        self.device_lr, self.device_ema_betas = (
            self.state_f64[F64.LR],
            self.state_f64[self._emas.start : self._emas.stop],
        )
        self.steps, self.nonfinite, _, self.skipped = self.state_i64[: I64.GROWTH_INTERVAL].unbind()
        self.grad_norm = self.state_f64[F64.GRAD_NORM]
        self.loss_scale = None if s.loss_scale is None else self.state_f64[F64.LOSS_SCALE]

    @property
    def ema_betas(self) -> tuple[float, ...]:
        """Decays of the weight averages. Assigning raises ValueError unless there is one for each."""
        return tuple(self._values[index] or 0.0 for index in self._emas)

    @ema_betas.setter
    def ema_betas(self, values: Sequence[float]) -> None:
        if len(values) != len(self._emas):
            raise ValueError(f"ema_betas is {values}; there are {len(self._emas)} weight averages")
        for index, value in zip(self._emas, values, strict=True):
            self._set(index, value)

    def _set(self, index: int, value: float | None) -> None:
        if self._values[index] != value:
            self._values[index] = value
            self.state_f64[index].fill_(math.inf if value is None else value)

    @abstractmethod
    def step(self, arenas: Arenas[Any]) -> None:
        """Change `arenas.params` by `arenas.grads` and `arenas.moments`, in place.

        Averages and half-precision copy come along (`arenas.follow`). It is called without gradients being recorded.
        """

    def counters(self) -> dict[str, Tensor]:
        """Return what every saved state has beside the arenas."""
        return {"nonfinite": self.nonfinite, "steps": self.steps}

    def scale_counters(self) -> dict[str, Tensor]:
        """Return what a saved state has in addition where there is a loss scale."""
        if self.loss_scale is None:
            return {}
        return {"skipped": self.skipped, "loss_scale": self.loss_scale, "good_steps": self.state_i64[I64.GOOD_STEPS]}

    def tensors(self) -> list[Tensor]:
        """Return every tensor that `step` writes beside the arenas."""
        return [self.state_f64, self.state_i64]
