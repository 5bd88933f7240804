"""Networks and preconditioning, and how to build them from a JSON-able description."""

from __future__ import annotations

from typing import Any

from ect.errors import UserError
from ect.models.adm_unet import DhariwalUNet
from ect.models.layers import MaskKey
from ect.models.precond import ECMPrecond, EDMPrecond
from ect.models.song_unet import SongUNet
from ect.models.unet import UNet

__all__ = ["DhariwalUNet", "ECMPrecond", "EDMPrecond", "MaskKey", "SongUNet", "UNet", "build"]

_UNETS: dict[str, type[UNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def build(spec: dict[str, Any]) -> EDMPrecond:
    """The network of a model file.

    Args: spec: {"precond": "EDMPrecond" | "ECMPrecond", "sigma_data": 0.5, "sigma_min": 0.003 (ECM only), "unet": "SongUNet" |
    "DhariwalUNet", "kwargs": the U-Net's keyword arguments}. Raises UserError on unknown names or arguments.
    """
    unet, precond = spec.get("unet"), spec.get("precond")
    if unet not in _UNETS:
        raise UserError(f"unknown network {unet!r} in the model's description; known: {', '.join(_UNETS)}")
    if precond not in ("EDMPrecond", "ECMPrecond"):
        raise UserError(
            f"unknown preconditioning {precond!r} in the model's description; known: EDMPrecond, ECMPrecond"
        )
    try:
        net = _UNETS[unet](**spec["kwargs"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the model's description does not fit {unet}: {error}") from error
    sigma_data = float(spec.get("sigma_data", 0.5))
    if precond == "ECMPrecond":
        return ECMPrecond(net, sigma_data, float(spec.get("sigma_min", 0.003)))
    return EDMPrecond(net, sigma_data)
