"""FlatState: a network's parameters, gradients, moments and weight averages in flat arenas, updated by RAdam or Adam.

One arena a role means three launches a step whatever the number of parameters (`ect_kernels.radam_ema`, which has formulas
and sources); the results equal torch.optim's.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from ect_kernels.radam_ema import F64, I64, MAX_EMAS, OPTIMIZERS, new_state, radam_ema
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)
_ALIGN = 8  # elements: 16 bytes in half precision, so every view can be read in 128-bit vectors


def memory_order(t: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions that have more than one element: tensors that agree have their elements in one order."""
    return [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


class _Setting:
    """A Python number that the kernels read at `index` of the device scalars; assigning it writes both, reading no device."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __get__(self, state: FlatState, owner: type) -> Any:
        return state._settings[self.index]

    def __set__(self, state: FlatState, value: float | None) -> None:
        state._set(self.index, value)


class _EmaBetas(list[float]):
    """The EMA betas as a list whose items, when assigned, are written to the device scalars."""

    def __init__(self, state: FlatState, values: Iterable[float]) -> None:
        super().__init__(values)
        self.state = state
        for i, value in enumerate(self):
            state._set(F64.EMA_BETA0 + i, value)

    def __setitem__(self, i: Any, value: Any) -> None:
        super().__setitem__(i, value)
        for k, beta in enumerate(self):  # i may be a slice
            self.state._set(F64.EMA_BETA0 + k, beta)


class FlatState(Generic[Net]):
    """Optimizer state of `net`. The network's parameters become views into the arena `params`.

    Args: net: moved to its device before. optimizer: 'radam' or 'adam'. lr, betas, eps: torch's meaning. ema_betas: one
    weight average per entry (at most 3), ema <- beta ema + (1 - beta) params, starting at the parameters. clip: largest
    global gradient norm, or None. loss_scale: where the gradients are those of `loss_scale` times the loss: the first value
    of a scale that follows overflow; growth_interval: good steps before it doubles. half: fp16 or bf16 for a copy `shadow`
    of the parameters, kept up to date; core: names of the parameters that `compute` takes from it,
    and of buffers that it has in half. channels_last: lay the
    weights of convolutions out in memory as [out, k, k, in]. Raises ValueError on an unknown optimizer or an impossible value.

    `compute` is the network to train: `net` itself, or with half a twin of shared buffers whose parameters are views of
    `shadow` (core) and of `params` (the others). A step takes gradients of `inputs`, its parameters, then calls
    `load_grads` and `step`.

    lr, eps, clip and ema_betas may be changed between steps. Non-finite gradients never enter the moments: without a loss
    scale nan becomes 0 and inf +-1e5 (the public code's rule), with one the whole step is skipped; `nonfinite` counts the
    values and `skipped` the steps. These, `steps`, `grad_norm` and `loss_scale` are 0-d tensors on the device, written by
    step(), which reads nothing on the host.
    """

    lr, eps, clip = _Setting(F64.LR), _Setting(F64.EPS), _Setting(F64.CLIP)

    def __init__(
        self,
        net: Net,
        optimizer: str = "radam",
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ema_betas: Sequence[float] = (),
        clip: float | None = None,
        loss_scale: float | None = None,
        growth_interval: int = 2000,
        half: torch.dtype | None = None,
        core: Collection[str] = (),
        channels_last: bool = False,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}; known: 'radam', 'adam'")
        emas_ok = len(ema_betas) <= MAX_EMAS and all(0 <= b <= 1 for b in ema_betas)
        for name, value, ok in [
            ("lr", lr, lr >= 0), ("betas", betas, all(0 <= b < 1 for b in betas)), ("eps", eps, eps >= 0),
            ("ema_betas", ema_betas, emas_ok), ("clip", clip, clip is None or clip > 0),
            ("loss_scale", loss_scale, loss_scale is None or 0 < loss_scale < math.inf),
            ("growth_interval", growth_interval, growth_interval >= 1),
            ("half", half, half in (None, torch.float16, torch.bfloat16)),
        ]:  # fmt: skip
            if not ok:
                raise ValueError(f"{name} is {value}, out of range")
        self.net, self.optimizer, self.betas = net, optimizer, tuple(betas)
        self._names = [name for name, _ in net.named_parameters()]
        self._shapes = [p.shape for p in net.parameters()]
        padded = [-(-shape.numel() // _ALIGN) * _ALIGN for shape in self._shapes]
        *self._offsets, end = itertools.accumulate(padded, initial=0)
        self._channels_last = channels_last
        device = next(net.parameters()).device
        self.state_f64, self.state_i64 = new_state(
            optimizer, lr, betas, eps, clip, ema_betas, loss_scale, growth_interval, device
        )
        self._settings: dict[int, float | None] = {F64.LR: lr, F64.EPS: eps, F64.CLIP: clip}
        self._ema_betas = _EmaBetas(self, ema_betas)
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(end, device=device) for _ in range(4))
        for p, view in zip(net.parameters(), self.views(self.params), strict=True):
            view.copy_(p.detach())
            p.data = view
        self._grad_views = self.views(self.grads)
        self.emas = [self.params.clone() for _ in self.ema_betas]
        self.shadow = None if half is None else self.params.to(half)
        self.compute = net if self.shadow is None else self._twin(self.shadow, core)
        self.inputs = list(self.compute.parameters())
        self.steps, self.nonfinite, _, self.skipped = self.state_i64[: I64.GROWTH_INTERVAL].unbind()
        self.loss_scale = None if loss_scale is None else self.state_f64[F64.LOSS_SCALE]

    def _twin(self, shadow: Tensor, core: Collection[str]) -> Net:
        """The network with its `core` parameters replaced by views of `shadow`, its `core` buffers by copies in half; the other
        tensors are shared."""
        shared: dict[int, Tensor] = {
            id(buffer): buffer.to(shadow.dtype) if name in core else buffer for name, buffer in self.net.named_buffers()
        }
        views = self.views(shadow)
        for (name, p), view in zip(self.net.named_parameters(), views, strict=True):
            shared[id(p)] = nn.Parameter(view) if name in core else p
        return copy.deepcopy(self.net, shared)

    def _set(self, index: int, value: float | None) -> None:
        if index not in self._settings or self._settings[index] != value:
            self._settings[index] = value
            self.state_f64[index].fill_(math.inf if value is None else value)

    @property
    def ema_betas(self) -> list[float]:
        return self._ema_betas

    @ema_betas.setter
    def ema_betas(self, values: Sequence[float]) -> None:
        if len(values) != len(self.emas):
            raise ValueError(f"ema_betas is {values}; there are {len(self.emas)} weight averages")
        self._ema_betas = _EmaBetas(self, values)

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient, before the clip; inf where the step was skipped."""
        return self.state_f64[F64.GRAD_NORM]

    @grad_norm.setter
    def grad_norm(self, value: Tensor) -> None:
        self.grad_norm.copy_(value)

    def views(self, arena: Tensor) -> list[Tensor]:
        """The parameters' views of an arena, in named_parameters() order."""
        return [
            self._view(arena[offset : offset + shape.numel()], shape)
            for offset, shape in zip(self._offsets, self._shapes, strict=True)
        ]

    def _view(self, flat: Tensor, shape: torch.Size) -> Tensor:
        if not self._channels_last or len(shape) != 4:
            return flat.view(shape)
        out, channels, height, width = shape
        return flat.view(out, height, width, channels).permute(0, 3, 1, 2)

    @torch.no_grad()
    def load_grads(self, grads: Sequence[Tensor], add: bool = False) -> None:
        """Put gradients of `inputs`, of a micro-batch, into the arena, or add them to what is there; any float dtypes.

        One call for all gradients of a dtype in the arena's memory order: PyTorch moves such lists many tensors a kernel, mixed
        ones a tensor a kernel, and it adds fp32 alone to fp32.
        """
        groups: dict[tuple[torch.dtype, bool], list[tuple[Tensor, Tensor]]] = {}
        for view, grad in zip(self._grad_views, grads, strict=True):
            groups.setdefault((grad.dtype, memory_order(grad) == memory_order(view)), []).append((view, grad))
        for pairs in groups.values():
            views, given = map(list, zip(*pairs, strict=True))
            if add and given[0].dtype != self.grads.dtype:
                wide = [torch.empty_like(grad, dtype=self.grads.dtype) for grad in given]
                torch._foreach_copy_(wide, given)
                given = wide
            (torch._foreach_add_ if add else torch._foreach_copy_)(views, given)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients loaded, which are left cleaned and clipped (a loss scale stays on them)."""
        radam_ema(
            self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.emas, self.shadow,
            self.state_f64, self.state_i64,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """Every tensor that load_grads() and step() write."""
        shadow = [] if self.shadow is None else [self.shadow]
        arenas = [self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.emas, *shadow]
        return [*arenas, self.state_f64, self.state_i64]

    def note(self) -> str:
        """Memory of each copy of the parameters, in a line."""
        copies = {"weights": self.params, "gradients": self.grads, "moments": self.exp_avg, "shadow": self.shadow}
        sizes = {
            name: arena.nbytes * (2 if name == "moments" else 1) for name, arena in copies.items() if arena is not None
        }
        sizes["averages"] = sum(ema.nbytes for ema in self.emas)
        return "memory of the state: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())

    def ema_state_dict(self, i: int = 0) -> dict[str, Tensor]:
        """Copies of weight average i under all keys of net.state_dict(); buffers come from the network."""
        state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in self.net.state_dict().items()}
        for name, view in zip(self._names, self.views(self.emas[i]), strict=True):
            state[name] = view.clone(memory_format=torch.contiguous_format)
        return state

    def _arenas(self) -> dict[str, Tensor]:
        arenas = {"params": self.params, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return arenas | {f"ema{i}": ema for i, ema in enumerate(self.emas)}

    def _scale_counters(self) -> dict[str, Tensor]:
        if self.loss_scale is None:
            return {}
        return {"skipped": self.skipped, "loss_scale": self.loss_scale, "good_steps": self.state_i64[I64.GOOD_STEPS]}

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs: per parameter and named params.*, exp_avg.*, exp_avg_sq.*, ema<i>.*; nonfinite, steps;
        with a loss scale also skipped, loss_scale, good_steps."""
        everything = self._saved() | self._scale_counters()
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in everything.items()}

    def _saved(self) -> dict[str, Tensor]:
        """What every saved state has."""
        named = {
            f"{role}.{name}": view
            for role, arena in self._arenas().items()
            for name, view in zip(self._names, self.views(arena), strict=True)
        }
        return named | {"nonfinite": self.nonfinite, "steps": self.steps}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of state_tensors(); other tensors are left alone. A state saved without a loss scale has none of its
        counters, and one is started afresh. Raises KeyError, naming them, where tensors are missing; nothing is loaded then."""
        wanted, scaling = self._saved(), self._scale_counters()
        if scaling.keys() & tensors.keys():
            wanted |= scaling
        if missing := [name for name in wanted if name not in tensors]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise KeyError(", ".join(missing[:3]) + more)
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
        if self.shadow is not None:
            self.shadow.copy_(self.params)
