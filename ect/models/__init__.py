"""Networks and preconditioning, their named configurations, and how to build them from a JSON-able description."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from ect.config import NetConfig, admit, refuse_taken
from ect.errors import UserError
from ect.models import spec as bounds
from ect.models.adm_unet import DhariwalUNet
from ect.models.edm2_unet import EDM2UNet
from ect.models.layers import MaskKey
from ect.models.precond import PRECONDS, ECM2Precond, ECMPrecond, EDM2Precond, EDMPrecond
from ect.models.song_unet import SongUNet
from ect.models.unet import UNet

__all__ = [
    "DhariwalUNet", "ECM2Precond", "ECMPrecond", "EDM2Precond", "EDM2UNet", "EDMPrecond", "MaskKey", "SongUNet", "UNet",
    "build", "describe", "fitting", "known_architectures", "preconditioning", "register",
]  # fmt: skip

_UNETS: dict[str, type[UNet]] = {}
_Net = TypeVar("_Net", bound=UNet)


def known_architectures() -> dict[str, type[UNet]]:
    """Return the network of each named configuration."""
    return {name: unet for unet in _UNETS.values() for name in unet.architectures}


def register(unet: type[_Net]) -> type[_Net]:
    """Make a network known to build(), by its class's name, and to describe() and --net.arch, by its architectures'; return it.

    It can decorate the class. Raises ValueError where another class has one of these names.
    """
    known = known_architectures()
    refuse_taken("network", unet.__name__, _UNETS.get(unet.__name__), unet)
    for name in unet.architectures:
        refuse_taken("architecture", name, known.get(name), unet)
    _UNETS[unet.__name__] = unet
    for name in unet.architectures:
        admit("Architecture", name)
    return unet


register(SongUNet)
register(DhariwalUNet)
register(EDM2UNet)


def fitting(cfg: NetConfig, augment_dim: int) -> NetConfig:
    """Return the options with the widths and depths that the architecture's name stands for, if for any.

    Raises UserError where one of these options has another value, which is not its default, and where the network has no
    labels of augmentation but augment_dim > 0.
    """
    known = known_architectures()
    if cfg.arch not in known:
        return cfg  # which describe() refuses
    if augment_dim and not known[cfg.arch].takes_augment_labels:
        raise UserError(
            f"--net.arch {cfg.arch}: this network has no labels of augmentation; take --data.augment 0 or another network"
        )
    fixed: dict[str, Any] = {
        name: own for name, own in known[cfg.arch].architectures[cfg.arch].items() if name in vars(cfg)
    }
    fixed = {name: tuple(own) if isinstance(own, list) else own for name, own in fixed.items()}
    for name, own in fixed.items():
        given = getattr(cfg, name)
        if given not in (own, getattr(NetConfig, name)):
            told, wanted = (" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (given, own))
            raise UserError(
                f"--net.{name.replace('_', '-')} {told}: expected {wanted}, for which --net.arch {cfg.arch} stands"
            )
    return replace(cfg, **fixed)


def describe(arch: str, precond: str, sigma_data: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what build() needs for the named configuration `arch` with further keyword arguments `kwargs`.

    Args: precond: name of the preconditioning class. sigma_data: standard deviation of the data. Raises UserError where no
    network has this configuration.
    """
    known = known_architectures()
    if arch not in known:
        raise UserError(f"--net.arch {arch}: no network has this configuration; known: {', '.join(known)}")
    kwargs = {**kwargs, **known[arch].architectures[arch]}
    unet = known[arch].__name__
    return {"precond": preconditioning(unet, precond), "sigma_data": sigma_data, "unet": unet, "kwargs": kwargs}


def preconditioning(unet: Any, precond: str) -> str:
    """Return what the network of this class's name has in the place of a preconditioning: EDMPrecond or ECMPrecond.

    A name that no network has, as of a damaged file, changes nothing: build() refuses it.
    """
    preconds = _UNETS[unet].preconds if isinstance(unet, str) and unet in _UNETS else {}
    return preconds.get(precond, precond)


def build(spec: dict[str, Any]) -> EDMPrecond:
    """Make the network that a model file describes, with random weights, in train mode.

    Args: spec: {"precond": a name in PRECONDS, "sigma_data": 0.5, "sigma_min": 0.003 (ECMPrecond only), "unet": the name of a
    registered class, "kwargs": its keyword arguments}. Raises UserError on unknown names or arguments, and on values beyond
    the bounds of ect.models.spec.
    """
    unet, precond = spec.get("unet"), spec.get("precond")
    if type(unet) is not str or unet not in _UNETS:
        raise UserError(f"unknown network {bounds.shown(unet)} in the model's description; known: {', '.join(_UNETS)}")
    if type(precond) is not str or precond not in PRECONDS:
        raise UserError(
            f"unknown preconditioning {bounds.shown(precond)} in the model's description; known: {', '.join(PRECONDS)}"
        )
    kwargs = bounds.checked_arguments(_UNETS[unet], spec.get("kwargs"))
    sigma_data, sigma_min = (
        bounds.sigma_data(spec.get("sigma_data", 0.5)),
        bounds.sigma_min(spec.get("sigma_min", 0.003)),
    )
    try:
        net = _UNETS[unet](**kwargs)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:  # of no level, or no channel, among others
        raise UserError(f"the model's description does not fit {unet}: {error}") from error
    return ECMPrecond(net, sigma_data, sigma_min) if precond == "ECMPrecond" else PRECONDS[precond](net, sigma_data)
