"""Read the network of an EDM, EDM2 or ECT snapshot (a pickle) without executing anything that is in it.

A snapshot is {'ema': network, 'loss_fn': ..., 'augment_pipe': ..., 'dataset_kwargs': ...}; EDM2's has an 'encoder' of images
instead of augmentation, and weights in fp16. A module in it is pickled as
`torch_utils.persistence._reconstruct_persistent_obj(meta)`, meta = {type, version, module_src, class_name, state}; the
public loader executes module_src. Here `ect.files.safe_pickle` reads the file with the table of globals below, and a module
becomes a `_Persistent`: class name, source as text, state. Names, memory and arguments are checked when the network is
taken out of what was read.
"""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ect import models
from ect.errors import UserError
from ect.files.foreign import what_it_is
from ect.files.pickled_tensors import ARRAYS, NUMBERS, TENSORS, TORCH_MAGIC, load_storage
from ect.files.safe_pickle import Budget, Built, Dictionary, Machine, UnsafePickle, describe, make_set, sequence, show
from ect.models import spec as bounds

__all__ = ["LICENSE", "Snapshot", "UnsafePickle", "read"]

LICENSE = "weights derived from EDM's are CC BY-NC-SA 4.0"

_MAX_DEPTH = 16  # of nested modules; EDM's networks have 4
_PRECOND_ARGS = [
    "img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type"
]  # fmt: skip
_EDM2_PRECOND_ARGS = ["img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels"]
_EDM2_ARGS = [
    "img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb",
    "num_blocks", "attn_resolutions", "label_balance", "concat_balance",
]  # fmt: skip
_LOGVAR = ("logvar_fourier.", "logvar_linear.")
"""EDM2's head that weighs its loss, which ECT has left out: no output depends on it."""
_OTHER_PRECOND = (
    "not supported, its U-Net takes noise levels in another parametrisation. Use a checkpoint with EDM's "
    "preconditioning, such as edm-cifar10-32x32-uncond-vp.pkl, edm-ffhq-64x64-uncond-ve.pkl or "
    "edm-imagenet-64x64-cond-adm.pkl ('vp' and 've' in these names are architectures), not a baseline-*.pkl"
)
_UNSUPPORTED = {
    "VPPrecond": _OTHER_PRECOND,
    "VEPrecond": _OTHER_PRECOND,
    "iDDPMPrecond": _OTHER_PRECOND,
}


@dataclass(frozen=True)
class Snapshot:
    """A network at rest: how to build it, its weights, and where it comes from."""

    spec: dict[str, Any]
    """The description that `ect.models.build` takes; JSON-able."""
    state: dict[str, Tensor]
    """Parameters and persistent buffers as in `net.state_dict()`; `read` gives them fp32, contiguous, on the CPU."""
    info: dict[str, Any]
    """Free, JSON-able."""


def read(path: Path | str, key: str = "ema", max_bytes: int = 8 << 30) -> Snapshot:
    """Return the network stored under `key` in the EDM, EDM2 or ECT snapshot at `path`.

    Args: max_bytes: refuse larger files. Raises UserError when the file cannot be read, and its subclass UnsafePickle,
    naming file and culprit, when the content is hostile, damaged, or no network that this package has.
    """
    path = Path(path)
    data = _read_bytes(path, max_bytes)
    try:
        root = _root(data)
        net = _network(root, key)
        spec, state = _spec(net, root), _state(net)
    except UserError as error:
        raise UnsafePickle(f"{path}: {error}") from error.__cause__
    except Exception as error:  # whatever a damaged file trips over, callers see one kind of error
        cause = what_it_is(data[:64]) or f"{type(error).__name__}: {show(str(error))}"
        raise UnsafePickle(
            f"{path}: truncated, damaged or no EDM/ECT snapshot ({cause}; it begins with {data[:12]!r}); download it again"
        ) from error
    info = {
        "source": path.name, "key": key, "class": net.class_name, "sha256": hashlib.sha256(data).hexdigest(),
        "source_sha256": hashlib.sha256(net.source.encode("utf-8", "surrogatepass")).hexdigest(), "license": LICENSE,
    }  # fmt: skip
    return Snapshot(spec, state, info)


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected an EDM or ECT snapshot (.pkl)")
        large = path.stat().st_size > max_bytes  # not by a read of so many bytes, whose memory Python takes at once
        data = b"" if large else path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if large:
        raise UnsafePickle(f"{path}: larger than the limit max_bytes = {max_bytes}; is it an EDM or ECT snapshot?")
    return data


def _root(data: bytes) -> Any:
    not_a_snapshot = "written by torch.save, as ECT's training-state-*.pt is; give the network-snapshot-*.pkl instead"
    if data.startswith(b"PK\x03\x04"):
        raise UnsafePickle(not_a_snapshot)
    if not data:
        raise UnsafePickle("the file is empty; download it again")
    budget = Budget(work=2 * len(data) + (1 << 20))
    table = {**_TABLE, "torch.storage._load_from_bytes": lambda blob: load_storage(blob, budget)}
    root = Machine(table, budget).run(io.BytesIO(data))
    if type(root) is int and root == TORCH_MAGIC:
        raise UnsafePickle(not_a_snapshot)
    return root


def _network(root: Any, key: str) -> _Persistent:
    if not isinstance(root, dict):
        raise UnsafePickle(f"holds {describe(root)}; expected a dictionary with the network under {key!r}")
    if key not in root and root and all(isinstance(value, Tensor) for value in root.values()):
        raise UnsafePickle(
            "weights by name (a state dict), without the description of their network; give the snapshot that they are "
            "from, network-snapshot-*.pkl"
        )
    if key not in root:
        names = ", ".join(show(str(name)) for name in list(root)[:8])
        asked = "" if key == "ema" else ", which --key asks for"
        raise UnsafePickle(f"has no {key!r}{asked}; it holds {names or 'nothing'}")
    if type(root[key]) is not _Persistent:
        raise UnsafePickle(f"{key!r} is {describe(root[key])}; expected a network")
    return root[key]


# --- what the globals answer -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Persistent:
    """A module whose class is source text in the file."""

    class_name: str
    source: str
    state: dict[Any, Any]  # may still be filling up when the call comes, for it may refer to its owner


class _Container(Built):
    """A container of torch.nn: its state is its __dict__."""


def _persistent(meta: Any) -> _Persistent:
    if not isinstance(meta, dict) or meta.get("type") != "class" or meta.get("version") != 6:
        raise UnsafePickle("unknown persistent object; expected type 'class', version 6")
    name, source, state = meta.get("class_name"), meta.get("module_src"), meta.get("state")
    if type(name) is not str or type(source) is not str or not isinstance(state, dict):
        raise UnsafePickle("a persistent object without class_name, module_src or state")
    return _Persistent(name, source, state)


def _bound_method(owner: object, name: object) -> object:
    # ECT's loss function keeps a bound method of itself, pickled as getattr(loss, name).
    if type(owner) is not _Persistent or type(name) is not str:
        raise UnsafePickle(f"an attribute of {describe(owner)}")
    return "bound method", owner.class_name, name


_TABLE: dict[str, Callable[..., object] | None] = {
    **TENSORS,  # but for torch.storage._load_from_bytes, which needs the budget of the file
    **NUMBERS,
    **ARRAYS,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": lambda: {},
    "collections.OrderedDict": lambda: Dictionary(),
    "torch.nn.modules.container.ModuleDict": lambda: _Container(),
    "torch.nn.modules.container.ModuleList": lambda: _Container(),
    "torch.nn.modules.container.Sequential": lambda: _Container(),
    "builtins.getattr": _bound_method,
    "builtins.set": make_set,
}


# --- from what was read to weights and description -------------------------------------------------------------------


def _state(net: _Persistent) -> dict[str, Tensor]:
    """Return what net.state_dict() would be: same keys, same order."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()  # dictionaries of modules visited
    room: dict[int, int] = {}  # bytes of each storage not yet in use

    def entries(module: Any, kind: str) -> list[tuple[str, Any]]:
        found = module.state.get(kind)
        if not found:
            return []
        if id(found) in seen:
            raise UnsafePickle("a module that contains itself, or is in the network twice")
        seen.add(id(found))
        for name in found:
            if type(name) is not str or not 0 < len(name) <= 100 or "." in name:
                raise UnsafePickle(f"a module with an impossible name among its {kind}")
        return [(name, value) for name, value in found.items() if value is not None]

    def visit(module: Any, prefix: str) -> None:
        if type(module) not in (_Persistent, _Container) or not isinstance(module.state, dict):
            raise UnsafePickle(f"{show(prefix)} is {describe(module)} instead of a module")
        if prefix in _LOGVAR:
            return
        if prefix.count(".") > _MAX_DEPTH:
            raise UnsafePickle(f"{show(prefix)} is nested deeper than any known network")
        transient = module.state.get("_non_persistent_buffers_set") or ()
        tensors = entries(module, "_parameters")
        tensors += [(name, value) for name, value in entries(module, "_buffers") if name not in transient]
        for name, value in tensors:
            if not isinstance(value, Tensor) or not value.is_floating_point() or prefix + name in out:
                raise UnsafePickle(f"{show(prefix + name)} is no tensor of real numbers, or is there twice")
            base = value.untyped_storage()
            pointer, size = base.data_ptr(), base.nbytes()
            room[pointer] = room.get(pointer, size) - value.nbytes
            if room[pointer] < 0:
                raise UnsafePickle(f"{show(prefix + name)} shares its memory with other weights")
            out[prefix + name] = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, child in entries(module, "_modules"):
            visit(child, f"{prefix}{name}.")

    visit(net, "")
    if not out:
        raise UnsafePickle("the network has no weights")
    return out


def _spec(net: _Persistent, root: dict[Any, Any]) -> dict[str, Any]:
    """Return the description that `ect.models.build` takes, from the arguments that the networks were made with."""
    if net.class_name == "Precond":
        return _edm2_spec(net, root)
    if net.class_name not in ("EDMPrecond", "ECMPrecond"):
        reason = _UNSUPPORTED.get(net.class_name, "unknown; expected EDMPrecond, ECMPrecond or EDM2's Precond")
        raise UnsafePickle(f"network class {show(net.class_name)}: {reason}")
    given = _arguments(net, _PRECOND_ARGS)
    given |= {name: net.state[name] for name in _PRECOND_ARGS if name in net.state}
    spec: dict[str, Any] = {"precond": net.class_name, "sigma_data": bounds.sigma_data(given.get("sigma_data", 0.5))}
    if net.class_name == "ECMPrecond":
        spec["sigma_min"] = bounds.sigma_min(given.get("sigma_min", 0.003))
    unet = (net.state.get("_modules") or {}).get("model")
    if type(unet) is not _Persistent or unet.class_name not in ("SongUNet", "DhariwalUNet"):
        name = show(unet.class_name) if type(unet) is _Persistent else describe(unet)
        raise UnsafePickle(f"the network's 'model' is {name}; expected SongUNet or DhariwalUNet")
    return {**spec, "unet": unet.class_name, "kwargs": _unet_kwargs(unet, given)}


def _unet_kwargs(unet: _Persistent, precond: dict[str, Any]) -> dict[str, Any]:
    """Return all keyword arguments of the U-Net. Ours has EDM's signature and defaults, so it serves as the schema."""
    cls = getattr(models, unet.class_name)
    kinds = bounds.arguments(cls)
    given = _arguments(unet, list(kinds))
    if not given:  # then the preconditioner knows what it passed on
        given = {name: value for name, value in precond.items() if name not in _PRECOND_ARGS}
        given |= {name: precond[name] for name in ("img_resolution", "label_dim") if name in precond}
        given |= dict.fromkeys(("in_channels", "out_channels"), precond.get("img_channels"))
    return _complete(cls, unet.class_name, given)


def _complete(cls: type[models.UNet], class_name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return all keyword arguments of our network `cls`, as given or at their defaults, each held against its bounds."""
    kinds = bounds.arguments(cls)
    unknown = [name for name in given if name not in kinds]
    if unknown:
        raise UnsafePickle(f"{class_name} was made with the unknown argument {show(str(unknown[0]))}")
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    return {name: bounds.checked(name, given.get(name, defaults[name]), kind) for name, kind in kinds.items()}


def _edm2_spec(net: _Persistent, root: dict[Any, Any]) -> dict[str, Any]:
    """Return the description of an EDM2 network, of EDM2 itself or of ECT, whose files have the same classes."""
    encoder, loss = root.get("encoder"), root.get("loss_fn")
    if type(encoder) is _Persistent and encoder.class_name != "StandardRGBEncoder":
        raise UnsafePickle(
            f"a network of what {show(encoder.class_name)} makes of images; only those of images are read"
        )
    unet = (net.state.get("_modules") or {}).get("unet")
    if type(unet) is not _Persistent or unet.class_name != "UNet":
        name = show(unet.class_name) if type(unet) is _Persistent else describe(unet)
        raise UnsafePickle(f"the network's 'unet' is {name}; expected EDM2's UNet")
    of_precond = _arguments(net, _EDM2_PRECOND_ARGS)
    of_precond |= {name: net.state[name] for name in _EDM2_PRECOND_ARGS if name in net.state}
    given = {name: value for name, value in of_precond.items() if name in _EDM2_ARGS or name not in _EDM2_PRECOND_ARGS}
    given |= _arguments(unet, _EDM2_ARGS)
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("resample_filter") == [1, 1]:  # its default, and the only one that ours has
        del given["resample_filter"]
    channels = given.pop("img_channels", None)
    kwargs = _complete(models.EDM2UNet, "EDM2's UNet", given | {"in_channels": channels, "out_channels": channels})
    del kwargs["img_channels"]
    tuned = type(loss) is _Persistent and loss.class_name.startswith("ECM")  # by ECT
    sigma_data = bounds.sigma_data(of_precond.get("sigma_data", 0.5))
    precond = "ECM2Precond" if tuned else "EDM2Precond"
    return {"precond": precond, "sigma_data": sigma_data, "unet": "EDM2UNet", "kwargs": kwargs}


def _arguments(module: _Persistent, names: list[str]) -> dict[str, Any]:
    """Return the arguments that a persistent object was made with, by name."""
    args, kwargs = sequence(module.state.get("_init_args", ())), module.state.get("_init_kwargs", {})
    if len(args) > len(names):
        raise UnsafePickle(f"{show(module.class_name)} was made with {len(args)} arguments instead of {len(names)}")
    return {**dict(zip(names, args, strict=False)), **kwargs}
