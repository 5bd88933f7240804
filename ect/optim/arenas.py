"""Arenas: a network's parameters, their gradients, the optimizer's moments and the weight averages, one flat tensor a role.

An optimizer step over flat arenas is a few launches whatever the number of parameters (ect_kernels.radam_ema has three).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)
_ALIGN = 8  # elements: 16 bytes in half precision, so every view can be read in 128-bit vectors


def memory_order(t: Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of the dimensions that have more than one element.

    Tensors that agree in it have their elements in one order.
    """
    return [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


class Arenas(Generic[Net]):
    """The flat fp32 arenas of `net`: parameters, gradients, moments and weight averages.

    The network's parameters become views of `params`; `moments` are by name; `emas`, the averages, start at the
    parameters.

    Args: net: moved to its device before. moments: names of the optimizer's arenas, zero at first. emas: number of
    averages. half: fp16 or bf16 for a copy `shadow` of the parameters, kept up to date; core: names of the parameters
    that `compute` takes from it, and of buffers that it has in half. Where core is empty, and not None, there is no copy.
    channels_last: lay the weights of convolutions out in memory as [out, k, k, in]. Raises ValueError for another `half`.

    `compute` is the network to train: `net` itself, or with half a twin of shared buffers whose parameters are views of
    `shadow` (core) and of `params` (the others). `inputs` are its parameters, to take gradients of.
    """

    def __init__(
        self,
        net: Net,
        moments: Sequence[str] = (),
        emas: int = 0,
        half: torch.dtype | None = None,
        core: Collection[str] | None = None,
        channels_last: bool = False,
    ) -> None:
        if half not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"half is {half}, expected torch.float16 or torch.bfloat16")
        self.net, self.half = net, half
        self._names = [name for name, _ in net.named_parameters()]
        self._shapes = [p.shape for p in net.parameters()]
        padded = [-(-shape.numel() // _ALIGN) * _ALIGN for shape in self._shapes]
        *self._offsets, end = itertools.accumulate(padded, initial=0)
        self._channels_last = channels_last
        device = next(net.parameters()).device
        self.params, self.grads = (torch.zeros(end, device=device) for _ in range(2))
        self.moments = {name: torch.zeros(end, device=device) for name in moments}
        for p, view in zip(net.parameters(), self.views(self.params), strict=True):
            view.copy_(p.detach())
            p.data = view
        self._grad_views = self.views(self.grads)
        self.emas = [self.params.clone() for _ in range(emas)]
        wanted = half is not None and (core is None or len(core) > 0)
        self.shadow = self.params.to(half) if wanted else None
        self.compute = net if half is None else self._twin(half, core or ())
        self.inputs = list(self.compute.parameters())

    def _twin(self, half: torch.dtype, core: Collection[str]) -> Net:
        """Return the network with its `core` parameters replaced by views of `shadow`, its `core` buffers by half ones.

        The other tensors are shared.
        """
        shared: dict[int, Tensor] = {
            id(buffer): buffer.to(half) if name in core else buffer for name, buffer in self.net.named_buffers()
        }
        views = self.views(self.params if self.shadow is None else self.shadow)
        for (name, p), view in zip(self.net.named_parameters(), views, strict=True):
            shared[id(p)] = nn.Parameter(view) if name in core else p
        return copy.deepcopy(self.net, shared)

    def views(self, arena: Tensor) -> list[Tensor]:
        """Return the parameters' views of an arena, in named_parameters() order."""
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
            alike = grad.stride() == view.stride() or memory_order(grad) == memory_order(view)
            groups.setdefault((grad.dtype, alike), []).append((view, grad))
        for pairs in groups.values():
            views, given = map(list, zip(*pairs, strict=True))
            if add and given[0].dtype != self.grads.dtype:
                wide = [torch.empty_like(grad, dtype=self.grads.dtype) for grad in given]
                torch._foreach_copy_(wide, given)
                given = wide
            (torch._foreach_add_ if add else torch._foreach_copy_)(views, given)

    def zero_grad(self) -> None:
        """Set all gradients in the arena to 0. `load_grads` does not need it: without `add` it overwrites them."""
        self.grads.zero_()

    @torch.no_grad()
    def follow(self, betas: Tensor) -> None:
        """Bring averages and half-precision copy up to parameters just written: ema_i <- beta_i ema_i + (1 - beta_i) params.

        Args: betas: fp64, one a weight average, on the device. For rules whose own kernels do not do it.
        """
        for ema, weight in zip(self.emas, (1 - betas).to(self.params.dtype).unbind(), strict=True):
            ema.lerp_(self.params, weight)
        if self.shadow is not None:
            self.shadow.copy_(self.params)

    def saved_arenas(self) -> dict[str, Tensor]:
        """Return what a resume needs, by name: params, each of the moments, ema0 and the further averages."""
        return {"params": self.params, **self.moments, **{f"ema{i}": ema for i, ema in enumerate(self.emas)}}

    def saved_views(self) -> dict[str, Tensor]:
        """Return the parameters' views of all saved arenas, by the name <arena>.<parameter>."""
        return {
            f"{role}.{name}": view
            for role, arena in self.saved_arenas().items()
            for name, view in zip(self._names, self.views(arena), strict=True)
        }

    def ema_state_dict(self, i: int = 0) -> dict[str, Tensor]:
        """Return copies of weight average i under all keys of net.state_dict(); buffers come from the network."""
        state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in self.net.state_dict().items()}
        for name, view in zip(self._names, self.views(self.emas[i]), strict=True):
            state[name] = view.clone(memory_format=torch.contiguous_format)
        return state

    def tensors(self) -> list[Tensor]:
        """Return every tensor that an update writes."""
        shadow = [] if self.shadow is None else [self.shadow]
        return [self.params, self.grads, *self.moments.values(), *self.emas, *shadow]

    def note(self) -> str:
        """Say in one line how much memory each copy of the parameters takes, in MB (10^6 bytes)."""
        copies = {"weights": [self.params], "gradients": [self.grads], "moments": list(self.moments.values())}
        copies |= {} if self.shadow is None else {"shadow": [self.shadow]}
        copies |= {"averages": self.emas}
        sizes = {name: sum(arena.nbytes for arena in arenas) for name, arenas in copies.items()}
        return "memory of the state: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())
