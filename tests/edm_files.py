"""Build snapshots as EDM and ECT write them, without their code: stand-ins for their modules exist while a file is written.

`Persistent` pickles like an object of EDM's persistent classes, `snapshot` gives the bytes of a whole file, `from_net` wraps
a network of ours so. The stand-in for EDM's loader executes the embedded source, as the real one does: `load_unsafely`
shows that a hostile file is hostile.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ect.errors import UserError
from ect.files.edm_pickle import UnsafePickle, read

SOURCE = "class EDMPrecond: pass\n"
WEIGHT = torch.arange(6.0).reshape(2, 3)
SMALL: dict[str, Any] = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=0, model_channels=8)
SMALL |= dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.13)
PLAIN_STATE = (
    "_backward_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Persistent:
    """Pickles as torch_utils.persistence does: one call, on a dictionary with class name, source and state."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = SOURCE, **meta: Any) -> None:
        self.class_name, self.state, self.source, self.meta = class_name, state, source, meta

    def __reduce__(self) -> tuple[Any, ...]:
        meta = dict(type="class", version=6, module_src=self.source, class_name=self.class_name, state=self.state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, **self.meta},)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __call__(self) -> None:
        """Only what is callable can be pickled as a function: the result of a call may be called in turn."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class Storage:
    """Pickles as a storage whose nested file is `blob`."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.blob,)


class View:
    """Pickles as a tensor with any claim about its geometry."""

    def __init__(self, storage: object, offset: Any, size: Any, stride: Any, *more: Any) -> None:
        self.args = (storage, offset, size, stride, *(more or (False, OrderedDict())))

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.args


def blob_of(value: object, zipped: bool = False) -> bytes:
    """What torch.save writes of `value`."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def storage_of(tensor: torch.Tensor) -> torch.TypedStorage:
    """The typed storage of a tensor, as torch pickles it."""
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


@contextlib.contextmanager
def public_modules() -> Iterator[None]:
    """EDM's modules, as far as a pickle names them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> object:
        exec(meta["module_src"], {})
        return types.SimpleNamespace(**meta["state"])

    class EasyDict(dict):  # type: ignore[type-arg]
        pass

    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    for item in (_reconstruct_persistent_obj, EasyDict):
        item.__qualname__ = item.__name__
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    parents = {name: types.ModuleType(name) for name in ("torch_utils", "dnnlib")}
    added = {**parents, "torch_utils.persistence": persistence, "dnnlib.util": util}
    assert not added.keys() & sys.modules.keys()
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def dump(value: object, protocol: int = 4) -> bytes:
    """pickle.dumps while EDM's modules exist."""
    with public_modules():
        return pickle.dumps(value, protocol)


def load_unsafely(data: bytes) -> object:
    """What pickle.load makes of a file where EDM is installed: it executes whatever the file says."""
    with public_modules():
        return pickle.loads(data)


def module_state(parameters: dict[str, Any], modules: dict[str, Any], **attributes: Any) -> dict[str, Any]:
    """The __dict__ of an nn.Module, as torch 1.12 (EDM's) laid it out."""
    return {
        **{name: OrderedDict() for name in PLAIN_STATE},
        "training": False,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict(),
        "_non_persistent_buffers_set": set(),
        "_is_full_backward_hook": None,
        "_modules": OrderedDict(modules),
        **attributes,
    }


def with_state(module: Persistent, **state: Any) -> Persistent:
    """`module` with more, or other, attributes."""
    module.state.update(state)
    return module


def small_net(
    kwargs: dict[str, Any] = SMALL,
    *,
    precond: str = "EDMPrecond",
    unet: str = "SongUNet",
    source: str = SOURCE,
    weight: object = None,
    **state: Any,
) -> Persistent:
    """The least that reads as a network: a few tensors. `kwargs` made the U-Net, `state` replaces attributes of it."""
    parameters = {"weight": nn.Parameter(WEIGHT.clone()) if weight is None else weight}
    inner = Persistent(unet, {**module_state(parameters, {}), "_init_args": (), "_init_kwargs": kwargs, **state})
    return Persistent(precond, module_state({}, {"model": inner}), source)


def from_net(net: nn.Module, spec: dict[str, Any]) -> Persistent:
    """A network of ours as an object of EDM's or ECT's class, made with the arguments in `spec`."""
    kwargs = dict(spec["kwargs"])
    unet = with_state(from_module(net.get_submodule("model")), _init_args=(), _init_kwargs=dict(kwargs))
    resolution, channels, label_dim = (kwargs.pop(name) for name in ("img_resolution", "in_channels", "label_dim"))
    del kwargs["out_channels"]
    own = dict(img_resolution=resolution, img_channels=channels, label_dim=label_dim)
    given = {**own, "model_type": spec["unet"], **kwargs}
    own |= dict(use_fp16=False, sigma_min=0, sigma_max=float("inf"))
    own |= {name: spec[name] for name in ("sigma_data", "sigma_min") if name in spec}
    return Persistent(spec["precond"], module_state({}, {"model": unet}, _init_args=(), _init_kwargs=given, **own))


EDM2_CLASSES = {"EDM2UNet": "UNet", "EDM2Block": "Block"}


def edm2_from_net(net: nn.Module, spec: dict[str, Any], logvar: int = 0) -> Persistent:
    """A network of ours as an object of EDM2's classes, in fp16; logvar: width of the head that weighs its loss, if any."""
    kwargs = {name: value for name, value in spec["kwargs"].items() if name not in ("out_channels", "augment_dim")}
    own = dict(img_resolution=kwargs.pop("img_resolution"), img_channels=kwargs.pop("in_channels"))
    own["label_dim"] = kwargs.pop("label_dim")
    unet = with_state(
        from_module(net.get_submodule("unet").half()), _init_args=tuple(own.values()), _init_kwargs=kwargs
    )
    modules: dict[str, Any] = {"unet": unet}
    if logvar:
        fourier, linear = nn.Module(), nn.Module()
        fourier.register_buffer("freqs", torch.ones(logvar))
        linear.weight = nn.Parameter(torch.ones(1, logvar))
        modules |= {"logvar_fourier": from_module(fourier.half()), "logvar_linear": from_module(linear.half())}
    state = module_state({}, modules, _init_args=(), _init_kwargs={**own, **kwargs}, **own, use_fp16=True)
    return Persistent("Precond", {**state, "sigma_data": spec["sigma_data"]})


def from_module(module: nn.Module) -> Any:
    """A module and all in it: containers stay what they are, everything else becomes persistent."""
    children = {name: from_module(child) for name, child in module.named_children()}
    if isinstance(module, nn.ModuleDict | nn.ModuleList | nn.Sequential):
        container = type(module)()
        container._modules.update(children)
        return container
    state = module_state(module._parameters, children, skip_scale=np.sqrt(0.5), num_heads=np.int64(1), eps=1e-6)
    state["_buffers"].update(module._buffers)
    state["_non_persistent_buffers_set"].update(module._non_persistent_buffers_set)
    name = type(module).__name__
    return Persistent(EDM2_CLASSES.get(name, name), state)


def edm2_snapshot(net: object, protocol: int = 4, encoder: str = "StandardRGBEncoder", loss: str = "EDM2Loss") -> bytes:
    """A file of EDM2's training loop, or of ECT's for ImageNet: an attribute dictionary with an encoder of images."""
    arrays = (
        {"scale": np.float32([0.1, 0.2]), "bias": np.float32([0.0, 1.0])} if encoder != "StandardRGBEncoder" else {}
    )
    with public_modules():
        easy = sys.modules["dnnlib.util"].EasyDict
        state: dict[str, Any] = {"P_mean": -0.8, "P_std": 1.6, "sigma_data": 0.5}
        if loss == "ECMLoss":
            state["t_to_r"] = Call(getattr, Persistent(loss, state), "t_to_r_sigmoid")
        given = {"_init_args": (), "_init_kwargs": easy(), **arrays}
        return pickle.dumps(
            easy(
                encoder=Persistent(encoder, given), dataset_kwargs=easy(path="img64.zip", use_labels=True),
                loss_fn=Persistent(loss, state), ema=net,
            ),
            protocol,
        )  # fmt: skip


def edm_snapshot(net: object, protocol: int = 4) -> bytes:
    """A file of EDM's training loop."""
    with public_modules():
        data = sys.modules["dnnlib.util"].EasyDict(path="cifar10-32x32.zip", use_labels=False, xflip=True)
        loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "_init_args": ()})
        pipe = Persistent("AugmentPipe", {"p": 0.12, "xflip": 1e8, "_init_kwargs": {"p": 0.12}})
        return pickle.dumps({"ema": net, "loss_fn": loss, "augment_pipe": pipe, "dataset_kwargs": data}, protocol)


def ect_snapshot(net: object, protocol: int = 4) -> bytes:
    """A file of ECT's training loop: its loss function keeps a bound method of itself."""
    state: dict[str, Any] = {"P_mean": -1.1, "q": 2, "stage": 0}
    loss = Persistent("ECMLoss", state)
    state["t_to_r"] = Call(getattr, loss, "t_to_r_sigmoid")
    state["k"] = 8.0
    return dump({"ema": net, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"xflip": False}}, protocol)


def refusal(path: Path, data: bytes) -> str:
    """The message with which the file is refused: one line that begins with its name."""
    path.write_bytes(data)
    with pytest.raises(UnsafePickle) as caught:
        read(path)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, pickle.UnpicklingError)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message.removeprefix(f"{path}: ")
