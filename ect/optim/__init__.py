"""The state of training: `FlatState` is a network's arenas (arenas.py) with the rule that updates them (rule.py, radam.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ect.optim.arenas import Arenas, Net, memory_order
from ect.optim.radam import Adam, RAdam
from ect.optim.rule import Rule, Settings

__all__ = ["RULES", "Adam", "Arenas", "FlatState", "RAdam", "Rule", "Settings", "memory_order"]

RULES: dict[str, type[Rule]] = {"radam": RAdam, "adam": Adam}
"""The rules that `--optim.optimizer` knows."""


class _OfRule:
    """A setting of a state's rule, which may be read and changed between steps."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, state: FlatState[Any], owner: type) -> Any:
        return getattr(state.rule, self.name)

    def __set__(self, state: FlatState[Any], value: Any) -> None:
        setattr(state.rule, self.name, value)


class FlatState(Arenas[Net]):
    """The arenas of `net` with a rule. A step takes gradients of `inputs`, then calls `load_grads` and `step`.

    Args: net, half, core, channels_last: as for Arenas. optimizer: a name in RULES, or a Rule of one's own. lr, betas, eps,
    ema_betas, clip, loss_scale, growth_interval: as in Settings. Raises ValueError on an unknown optimizer or an impossible
    value.

    lr, eps, clip and ema_betas may be changed between steps. `grad_norm`, `loss_scale`, `nonfinite`, `skipped` and `steps` are
    the rule's, on the device.
    """

    lr, eps, clip, ema_betas = _OfRule(), _OfRule(), _OfRule(), _OfRule()

    def __init__(
        self,
        net: Net,
        optimizer: str | type[Rule] = "radam",
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ema_betas: Sequence[float] = (),
        clip: float | None = None,
        loss_scale: float | None = None,
        growth_interval: int = 2000,
        half: torch.dtype | None = None,
        core: Collection[str] | None = None,
        channels_last: bool = False,
    ) -> None:
        rule = RULES.get(optimizer) if isinstance(optimizer, str) else optimizer
        if rule is None:
            raise ValueError(f"optimizer is {optimizer!r}; known: {', '.join(map(repr, RULES))}")
        settings = Settings(lr, (betas[0], betas[1]), eps, tuple(ema_betas), clip, loss_scale, growth_interval)
        self.rule = rule(settings, next(net.parameters()).device)
        super().__init__(net, rule.moments, len(ema_betas), half, core, channels_last)
        self.grad_norm, self.loss_scale = self.rule.grad_norm, self.rule.loss_scale
        self.nonfinite, self.skipped, self.steps = self.rule.nonfinite, self.rule.skipped, self.rule.steps

    @torch.no_grad()
    def step(self) -> None:
        """Do one update of parameters, moments and averages from the gradients loaded, which the rule may change in place."""
        self.rule.step(self)

    def tensors(self) -> list[Tensor]:
        """Return every tensor that load_grads() and step() write."""
        return [*super().tensors(), *self.rule.tensors()]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies of everything a resume needs, by name.

        Per parameter: params.*, exp_avg.*, exp_avg_sq.* (the rule's moments), ema<i>.*. Then nonfinite, steps; with a
        loss scale also skipped, loss_scale, good_steps.
        """
        everything = self.saved_views() | self.rule.counters() | self.rule.scale_counters()
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in everything.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load what state_tensors() returned; other tensors are left alone.

        A state saved without a loss scale has none of its counters, and one is started afresh. Raises KeyError, naming
        them, where tensors are missing; nothing is loaded then.
        """
        wanted, scaling = self.saved_views() | self.rule.counters(), self.rule.scale_counters()
        if scaling.keys() & tensors.keys():
            wanted |= scaling
        if missing := [name for name in wanted if name not in tensors]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise KeyError(", ".join(missing[:3]) + more)
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
        if self.shadow is not None:
            self.shadow.copy_(self.params)
