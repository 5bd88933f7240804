"""FID, KID, IS, precision/recall and FD-DINOv2 of RGB or grey images, computed by torch-fidelity 0.4.0.

torch-fidelity has traps, each met here:
- It loads weights and its own cache with weights_only=False, which runs what a hostile file says: see `_tensors_only`.
- Its cache is keyed by names alone: ours lies in the run folder, below a name made of the hashes of weights and data.
- One call hands one weight file to Inception and VGG16 alike: we make a call for each network.
- It wants 3 channels and as many samples as KID's subsets and IS's splits have, starts worker processes, and takes CUDA
  for granted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from ect.data import Dataset
from ect.errors import UserError
from ect.files import npz, torch_file
from ect.files.atomic import atomic
from ect.files.resume import data_fingerprint
from ect.metrics.evaluator import Column, Evaluator
from ect.metrics.weights import DINOV2, INCEPTION, VGG16, Unavailable, WeightFile, file_sha256, read_state

MIN_IMAGES = 4  # precision and recall look at the 3 nearest neighbours of an image
_BATCH = 64  # images a forward pass of an extractor
_SPLIT = 100  # images a split of IS, at least: of a single image it would be 1 whatever the image
_STATISTICS_BYTES = 1 << 27  # EDM's have 34 MB
_REFERENCE = "reference"
_INCEPTION = "inception-v3-compat"
_KEYS = {
    "FID": "frechet_inception_distance",
    "KID": "kernel_inception_distance_mean",
    "IS": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
    "FD-DINOv2": "frechet_inception_distance",
}
_RISING = {"IS", "precision", "recall"}
_FLAGS = {"FID": "fid", "KID": "kid", "IS": "isc", "precision": "prc", "recall": "prc", "FD-DINOv2": "fid"}


@dataclass(frozen=True)
class FidelityOptions:
    """Places of the extractors' weights and of the reference; None: torch's cache (DINOv2: no such column)."""

    weights: Path | None = None
    vgg: Path | None = None
    dinov2: Path | None = None
    reference: Path | None = None
    """EDM's statistics of a data set, .npz with mu [2048] and sigma [2048, 2048]; it replaces the data set."""
    download: bool = False
    """Fetch Inception and VGG16 weights that are neither given nor in torch's cache."""


@dataclass(frozen=True)
class _Network:
    extractor: str
    path: Path
    sha256: str
    columns: tuple[str, ...]


class FidelityEvaluator(Evaluator):
    """Rates images against a data set, or against EDM's statistics of one. Missing weights make missing columns.

    Args: dataset: may be None if options.reference is given. run_dir: torch-fidelity's cache goes into its
    fidelity-cache/. device: extractors run there if it is CUDA, else on the CPU.
    Raises UserError for a file that was named and does not exist or is not what it should be.
    """

    def __init__(
        self, dataset: Dataset | None, options: FidelityOptions, run_dir: Path, device: torch.device | str = "cpu"
    ) -> None:
        self._cache = Path(run_dir) / "fidelity-cache"
        self._device = torch.device(device)
        statistics = None if options.reference is None else options.reference.expanduser()
        self._statistics = None if statistics is None else read_statistics(statistics)
        if statistics is not None:
            self._reference_key = file_sha256(statistics)
            reference: dict[str, Any] = {"statistics": str(statistics), "sha256": self._reference_key}
            self._reference = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)  # torch-fidelity insists on some input
        elif dataset is not None:
            self._reference = dataset.images.cpu()
            self._reference_key = data_fingerprint(self._reference, None)
            reference = {"data": dataset.name, "images": len(self._reference), "sha256": self._reference_key}
            if len(self._reference) < MIN_IMAGES:
                found = f"data set {dataset.name} has {len(self._reference)} images"
                raise UserError(f"{found}; expected at least {MIN_IMAGES} to compare with")
        else:
            raise ValueError("FidelityEvaluator needs a data set or options.reference")
        self.used = {"reference": reference}
        self._networks: list[_Network] = []
        self.columns = (
            *self._add(INCEPTION, _INCEPTION, options.weights, ("FID", "KID", "IS"), options.download),
            *self._add(VGG16, "vgg16", options.vgg, ("precision", "recall"), options.download),
        )
        if options.dinov2 is not None:
            self.columns += self._add(DINOV2, "ect-dinov2", options.dinov2, ("FD-DINOv2",), False)

    def _add(
        self, file: WeightFile, extractor: str, given: Path | None, names: tuple[str, ...], download: bool
    ) -> tuple[Column, ...]:
        """Add the columns of one extractor; where they can be computed, it joins the networks that `evaluate` runs."""
        missing = {}
        if self._statistics is not None:
            reason = "--reference holds Inception statistics only; leave it out and give the images, --data PATH"
            missing = {name: reason for name in names if name not in ("FID", "IS")}
        wanted = tuple(name for name in names if name not in missing)
        if wanted:
            try:
                library = _torch_fidelity()
                path = file.find(given, download)
                _check_fit(library, extractor, path, file)
                self._networks.append(_Network(extractor, path, file_sha256(path), wanted))
                self.used[file.what] = {"file": str(path), "sha256": self._networks[-1].sha256}
                self.used["torch_fidelity"] = library.__version__
            except Unavailable as error:
                missing |= dict.fromkeys(wanted, str(error))
        return tuple(Column(name, missing=missing.get(name), rises=name in _RISING) for name in names)

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """Return the available figures of at least 4 images; without any, the images are not even asked for."""
        if not self._networks:
            return {}
        samples = torch.cat(list(images))
        if len(samples) < MIN_IMAGES:
            raise UserError(f"{len(samples)} images cannot be evaluated; expected at least {MIN_IMAGES}")
        values: dict[str, float] = {}
        for network in self._networks:
            values |= self._run(network, samples)
        return values

    def _run(self, network: _Network, samples: Tensor) -> dict[str, float]:
        cache = self._cache / f"{network.sha256[:16]}-{self._reference_key[:16]}"
        cache.mkdir(parents=True, exist_ok=True)
        if self._statistics is not None:
            _write_statistics(self._statistics, cache)
        cuda = self._device.type == "cuda"
        with _tensors_only(), torch.cuda.device(self._device) if cuda else contextlib.nullcontext():
            found = _torch_fidelity().calculate_metrics(
                input1=_Images(samples),
                input2=_Images(self._reference),
                input2_cache_name=_REFERENCE,
                cache_root=str(cache),
                feature_extractor=network.extractor,
                feature_extractor_weights_path=str(network.path),
                cuda=cuda,
                batch_size=_BATCH,
                kid_subset_size=min(1000, len(samples), len(self._reference)),
                isc_splits=min(10, max(len(samples) // _SPLIT, 1)),
                save_cpu_ram=True,  # reads images in this process, and takes distances in chunks
                verbose=False,
                **{_FLAGS[name]: True for name in network.columns},
            )
        return {name: float(found[_KEYS[name]]) for name in network.columns}


class _Images(torch.utils.data.Dataset[Tensor]):
    """uint8 [N, H, W, 1 or 3] as torch-fidelity wants it: items uint8 [3, H, W]."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].permute(2, 0, 1).expand(3, -1, -1)


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """Return EDM's statistics of a data set, {'mu': float32 [2048], 'sigma': float64 [2048, 2048]}.

    Raises UserError for any other file.
    """
    expected = "expected EDM's statistics, an .npz with mu [2048] and sigma [2048, 2048] such as cifar10-32x32.npz"
    try:
        found = npz.read(path, ("mu", "sigma"), _STATISTICS_BYTES)
        mu, sigma = found["mu"].astype(np.float32), found["sigma"].astype(np.float64)  # torch-fidelity's types
    except (ValueError, TypeError) as error:
        raise UserError(f"--reference {path}: cannot be read ({error}); {expected}") from error
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise UserError(f"--reference {path}: mu is {list(mu.shape)}, sigma {list(sigma.shape)}; {expected}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"--reference {path}: holds NaN or infinite values; {expected}")
    return {"mu": mu, "sigma": sigma}


def _write_statistics(statistics: dict[str, np.ndarray], cache: Path) -> None:
    """Put the statistics where torch-fidelity looks for those of the data set, so that it takes them from there."""
    with atomic(cache / f"{_REFERENCE}-{_INCEPTION}-stat-fid-2048.pt") as temp:
        torch.save(statistics, temp)


def _torch_fidelity() -> ModuleType:
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails with RuntimeError
        reason = str(error).splitlines()[0]
        raise Unavailable(
            f"torch-fidelity cannot be imported ({reason}): pip install torch-fidelity, and the torchvision that "
            f"belongs to torch {torch.__version__}"
        ) from error
    return torch_fidelity


def _check_fit(library: ModuleType, extractor: str, path: Path, file: WeightFile) -> None:
    """Raise UserError unless `path` holds this extractor's weights, by name and shape."""
    if extractor == "ect-dinov2":
        from ect.metrics import dinov2

        dinov2.register()
        dinov2.load_transformer(path)
        return
    read_state(path)
    network = library.registry.FEATURE_EXTRACTORS_REGISTRY[extractor]
    layer = network.get_default_feature_layer_for_metric("fid")
    with _tensors_only(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that copying into meta tensors does nothing
        try:
            network(extractor, [layer], feature_extractor_weights_path=str(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{file.option} {path}: not torch-fidelity's {file.what} weights ({reason}); expected {file.filename}"
            ) from error


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch.load inside be our own reader, which executes nothing, of weights and of cached statistics alike."""
    load = torch.load
    torch.load = lambda path, *_, **__: torch_file.read(Path(path))
    try:
        yield
    finally:
        torch.load = load
