"""Weight files of the public feature extractors: where they come from, and a check before anything uses them."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch

from ect.errors import UserError
from ect.files import torch_file
from ect.files.atomic import atomic
from ect.files.safe_pickle import UnsafePickle

_TIMEOUT = 30  # seconds without an answer before a download counts as failed


class Unavailable(Exception):
    """Something that a metric needs is not there; the text says what and names the remedy."""


@dataclass(frozen=True)
class WeightFile:
    """One public weight file, and how a user provides it."""

    what: str
    option: str
    filename: str
    url: str
    megabytes: int
    training: str = ""
    """The option's name when training, as a remark."""

    def find(self, given: Path | None, download: bool) -> Path:
        """Return `given`, else the file in torch's cache, else a download into that cache if `download`.

        Raises UserError where `given` does not exist, Unavailable where no source has the file.
        """
        if given is not None:
            given = given.expanduser()
            if not given.is_file():
                expected = f"{self.what} weights, {self.filename}{self.training}"
                raise UserError(f"{self.option} {given}: no such file; expected {expected}")
            return given
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.filename
        if cached.is_file():
            return cached
        failure, fetched = "", "; ect.evaluate --download does so"
        if download:
            fetched = ""
            try:
                fetch(self.url, cached)
                return cached
            except (OSError, HTTPException, UserError) as error:
                failure = f", and the download failed ({error})"
        raise Unavailable(
            f"{self.what} weights not found{failure}: pass {self.option} PATH{self.training}, or put {self.filename} "
            f"({self.megabytes} MB) into {cached.parent} from {self.url}{fetched}"
        )


INCEPTION = WeightFile(
    "Inception",
    "--weights",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    96,
    " (to ect.train: --eval.weights PATH)",
)
VGG16 = WeightFile(
    "VGG16", "--vgg", "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", 528
)
DINOV2 = WeightFile(
    "DINOv2",
    "--dinov2",
    "dinov2_vitl14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    1218,
)


def fetch(url: str, path: Path) -> None:
    """Download a file, atomically. Raises OSError, HTTPException or UserError where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, atomic(path) as temp, temp.open("wb") as file:
        shutil.copyfileobj(response, file)
        expected = response.headers["Content-Length"]
        if expected is not None and file.tell() != int(expected):
            raise OSError(f"{url} ended after {file.tell()} of {expected} bytes")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight file, on the CPU; nothing in the file is executed.

    Raises UserError unless it is a plain state dict, name -> floating-point tensor (integer counters may be among
    them), with finite values only.
    """
    expected = "expected a plain state dict as torch.save writes it, tensors by name; download the file again"
    try:
        state = torch_file.read(path)
    except UnsafePickle as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot be read safely ({reason}); {expected}") from error
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds {type(state).__name__}, {expected}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: entry {name!r} is {type(tensor).__name__}; {expected}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; {expected}")
    return state


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
