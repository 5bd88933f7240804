"""The search for the tensor that went bad first: after the fact, so that no update of a healthy run pays for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ect.models import EDMPrecond
from ect.optim import FlatState
from ect.ranks.distributed import World
from ect.step import TrainStep

_BYTES = 200  # of a name that ranks tell each other


def first_bad(step: TrainStep, nimg: int) -> str | None:
    """Return the name of the first tensor that is not finite, in the order in which an update meets them; None without one.

    These are the state (weights, moments, averages, loss scale, buffers, a teacher's weights) as it is now; then, where the
    update of the images from nimg on is repeated, what enters and leaves the layers, in the order of the forward pass, and the
    gradients, in the order of the layers; then the loss. The repetition is launched: no compiled network and no graph, which
    would hide them. It has the weights of now, so that what came with the weights of then may be gone.
    """
    state = step.state.saved_views() | beside(step.state)
    teacher = _network(step.teacher)
    state |= {f"the teacher's {name}": tensor for name, tensor in teacher.state_dict().items()} if teacher else {}
    for name, tensor in state.items():
        if not all_finite([tensor]):
            return name
    step.use(compiled=False, graph=False)
    step.stream.seek(nimg)
    step.key.fill_((step.seed << 32) | (nimg // step.batch))
    seen = _Seen()
    try:
        with seen.watching(step):
            step.gradients()
    except torch.OutOfMemoryError:  # a captured update leaves little room
        return seen.name
    lost = "" if all_finite([step.mean_loss]) else ", after a loss that is not finite"
    names = (name for name, _ in step.state.net.named_parameters())
    grads = zip(names, step.state.views(step.state.grads), strict=True)
    bad = (f"the gradient of {name}{lost}" for name, view in grads if not all_finite([view]))
    return seen.name or next(bad, "the loss" if lost else None)


def beside(state: FlatState[EDMPrecond]) -> dict[str, Tensor]:
    """Return what a checkpoint holds beside the arenas and can go bad, by name: the loss scale, and the network's buffers."""
    scale = {} if state.loss_scale is None else {"loss_scale": state.loss_scale}
    return scale | {f"the buffer {name}": t for name, t in state.net.named_buffers() if t.is_floating_point()}


def agreed(name: str | None, world: World) -> str | None:
    """Return the name that the first rank with one found; a call by all ranks."""
    mine = (name or "").encode()[:_BYTES]
    told = world.gather(torch.frombuffer(bytearray(mine.ljust(_BYTES, b"\0")), dtype=torch.uint8))
    names = (bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in told)
    return next(filter(None, names), None)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every value of these tensors is finite; no copy is made of them."""
    ends = [end.double() for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach())]
    return bool(torch.stack(ends).isfinite().all()) if ends else True


def _network(teacher: object) -> nn.Module | None:
    """Return a teacher that is a network: one that is a mean of the images has no weights and no layers."""
    return teacher if isinstance(teacher, nn.Module) else None


class _Seen:
    """The first input or output of a layer that is not finite, in the order of computation."""

    def __init__(self) -> None:
        self.name: str | None = None

    def watching(self, step: TrainStep) -> ExitStack:
        """Check all layers of the network, and of a teacher, until the block ends."""
        stack = ExitStack()
        for whole, net in (("the network", step.net), ("the teacher", _network(step.teacher))):
            for name, module in [] if net is None else net.named_modules():
                called = f"{'' if net is step.net else 'the teacher: '}{name}" if name else whole
                for handle in self._hooks(called, module):
                    stack.callback(handle.remove)
        return stack

    def _hooks(self, called: str, module: nn.Module) -> Iterator[Any]:
        arguments = list(inspect.signature(module.forward).parameters)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            for name, value in [*zip(arguments, args, strict=False), *kwargs.items()]:
                self.look(f"{name}, an input of {called}", value)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.look(f"the output of {called}", output)

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def look(self, name: str, value: Any) -> None:
        """Keep the name where it is the first one, and its value a tensor that is not finite."""
        if self.name is None and isinstance(value, Tensor) and value.is_floating_point() and not all_finite([value]):
            self.name = name
