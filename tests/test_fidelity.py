"""The real torch-fidelity code on weight files with random weights."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ect import evaluate
from ect.config import EvalConfig
from ect.data import Dataset
from ect.errors import UserError
from ect.files.model_file import save_model
from ect.metrics import make_evaluator
from ect.metrics.fidelity import FidelityEvaluator, FidelityOptions, read_statistics
from ect.metrics.weights import read_state
from ect.models import build

N = 6  # images a set: Inception takes 0.3 s each, VGG16 0.6 s


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache: no test sees, or leaves, files in the user's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    return tmp_path / "torch-home"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fidelity")
    yield path
    shutil.rmtree(path)  # 0.2 GB, which pytest would keep for three sessions


@pytest.fixture(scope="session")
def inception(folder: Path) -> Path:
    """Random weights, He-initialised: with torch's default the features are constant and every FID is 0."""
    from torch_fidelity import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def vgg(folder: Path) -> Path:
    """Random weights in a file of 59 MB instead of 528: rows of the large matrices are windows of one random vector."""
    import torchvision

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in torchvision.models.vgg16().state_dict().items()}
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            state[name] = torch.zeros(shape)
        elif len(shape) == 4:
            state[name] = nn.init.kaiming_normal_(torch.empty(shape))
        else:
            vector = torch.randn(shape[1] + 7 * shape[0]) * (2 / shape[1]) ** 0.5
            state[name] = vector.as_strided(shape, (7, 1))
    torch.save(state, folder / "vgg.pth")
    return folder / "vgg.pth"


def dino_file(path: Path, seed: int = 0) -> Path:
    """A DINOv2 of one block and 64 channels, random weights."""
    from ect.metrics.dinov2 import VisionTransformer

    torch.manual_seed(seed)
    net = VisionTransformer(64, depth=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def dino(folder: Path) -> Path:
    return dino_file(folder / "dino.pth")


@pytest.fixture(scope="session")
def clean() -> Tensor:
    smooth = F.interpolate(
        torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)), (32, 32), mode="bilinear"
    )
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="session")
def noisy(clean: Tensor) -> Tensor:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    return (clean + 60 * noise).clamp(0, 255).byte()


@pytest.fixture(scope="session")
def rated(
    folder: Path, inception: Path, vgg: Path, clean: Tensor, noisy: Tensor
) -> tuple[FidelityEvaluator, dict[str, float], dict[str, float]]:
    """An evaluator against `clean`, and its figures for `clean` itself and for `noisy`."""
    evaluator = FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(inception, vgg), folder / "run")
    return evaluator, evaluator.evaluate([clean]), evaluator.evaluate(iter(noisy.split(4)))


@pytest.mark.slow
def test_identical_sets_are_perfect(rated: tuple[FidelityEvaluator, dict[str, float], dict[str, float]]) -> None:
    evaluator, same, _ = rated
    assert [column.name for column in evaluator.columns] == ["FID", "KID", "IS", "precision", "recall"]
    assert evaluator.available == list(evaluator.columns)
    assert abs(same["FID"]) < 1e-3
    assert abs(same["KID"]) < 0.01
    assert same["precision"] == same["recall"] == 1.0


@pytest.mark.slow
def test_noise_makes_every_figure_worse(rated: tuple[FidelityEvaluator, dict[str, float], dict[str, float]]) -> None:
    _, same, noisy = rated
    assert noisy["FID"] > 10
    assert noisy["KID"] > 0.01
    assert noisy["precision"] < 0.9
    assert noisy["IS"] != same["IS"]
    assert noisy["IS"] > 1.0


@pytest.mark.slow
def test_cache_lies_in_the_run_folder_a_folder_for_each_weight_file(
    rated: tuple[FidelityEvaluator, dict[str, float], dict[str, float]], folder: Path, torch_home: Path
) -> None:
    evaluator = rated[0]
    data = evaluator.used["reference"]["sha256"][:16]
    expected = {f"{evaluator.used[what]['sha256'][:16]}-{data}" for what in ("Inception", "VGG16")}
    assert {path.name for path in (folder / "run" / "fidelity-cache").iterdir()} == expected
    assert len(expected) == 2
    assert not torch_home.exists()


@pytest.mark.slow
def test_edm_statistics_replace_the_data(
    rated: tuple[FidelityEvaluator, dict[str, float], dict[str, float]],
    folder: Path,
    inception: Path,
    noisy: Tensor,
    tmp_path: Path,
) -> None:
    """FID against the statistics of a set equals FID against the set; what needs its images is explained."""
    _, _, against_images = rated
    (cached,) = (folder / "run").rglob("reference-inception-v3-compat-stat-fid-2048.pt")
    statistics = torch.load(cached, weights_only=False)
    np.savez(tmp_path / "stats.npz", mu=statistics["mu"].astype(np.float64), sigma=statistics["sigma"])
    evaluator = FidelityEvaluator(None, FidelityOptions(inception, reference=tmp_path / "stats.npz"), tmp_path / "run")
    assert [column.name for column in evaluator.available] == ["FID", "IS"]
    assert evaluator.notes == [
        "KID, precision, recall: --reference holds Inception statistics only; leave it out and give the images, --data PATH"
    ]
    found = evaluator.evaluate([noisy])
    assert found["FID"] == pytest.approx(against_images["FID"], rel=1e-6)
    assert found["IS"] == pytest.approx(against_images["IS"], rel=1e-9)


@pytest.mark.slow
def test_command_rates_an_rgb_model_at_1_and_2_evaluations(
    inception: Path, clean: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    spec = {
        "precond": "ECMPrecond",
        "sigma_data": 0.5,
        "sigma_min": 0.003,
        "unet": "SongUNet",
        "kwargs": {
            "img_resolution": 32, "in_channels": 3, "out_channels": 3, "model_channels": 8, "channel_mult": [1],
            "num_blocks": 1, "attn_resolutions": [],
        },
    }  # fmt: skip
    net = build(spec)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_model(tmp_path / "model.safetensors", net.state_dict(), spec, {"data": "photos"})
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(clean):
        Image.fromarray(image.numpy()).save(tmp_path / "photos" / f"{i}.png")
    evaluate.main(
        [
            str(tmp_path / "model.safetensors"), "--data", str(tmp_path / "photos"), "--run-dir", str(tmp_path / "run"),
            "--weights", str(inception), "--no-download", "--samples", str(N), "--repeats", "1", "--device", "cpu",
        ]
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    one, two = report["rows"]
    assert (one["sampler"]["nfe"], two["sampler"]["nfe"]) == (1, 2)
    for name in ("FID", "KID", "IS"):
        assert one["mean"][name] != two["mean"][name]
    assert set(report["missing"]) == {"precision", "recall"}
    assert report["used"]["reference"]["images"] == N
    out = capsys.readouterr().out
    assert f"{one['mean']['FID']:.4g}" in out
    assert "precision, recall: VGG16 weights not found: pass --vgg PATH" in " ".join(out.split())


def test_dinov2_column_is_shown_only_where_its_weights_are_given(
    dino: Path, clean: Tensor, noisy: Tensor, tmp_path: Path
) -> None:
    data = Dataset("x", clean, None)
    without = FidelityEvaluator(data, FidelityOptions(), tmp_path)
    assert "FD-DINOv2" not in [column.name for column in without.columns]
    evaluator = FidelityEvaluator(data, FidelityOptions(dinov2=dino), tmp_path)
    assert [column.name for column in evaluator.available] == ["FD-DINOv2"]
    same, worse = evaluator.evaluate([clean])["FD-DINOv2"], evaluator.evaluate([noisy])["FD-DINOv2"]
    assert abs(same) < 1e-3
    assert worse > 100 * abs(same)


@pytest.mark.slow
def test_cache_ignores_neither_weights_nor_data(dino: Path, clean: Tensor, noisy: Tensor, tmp_path: Path) -> None:
    other = dino_file(tmp_path / "other.pth", seed=1)
    figures = []
    for data, weights in ((clean, dino), (noisy, dino), (clean, other)):
        evaluator = FidelityEvaluator(Dataset("x", data, None), FidelityOptions(dinov2=weights), tmp_path)
        figures.append(evaluator.evaluate([data])["FD-DINOv2"])  # a stale cache would make it far from 0
    assert max(map(abs, figures)) < 1e-3
    assert len(list((tmp_path / "fidelity-cache").iterdir())) == 3


def test_reference_is_read_once(dino: Path, clean: Tensor, noisy: Tensor, tmp_path: Path) -> None:
    evaluator = FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(dinov2=dino), tmp_path)
    first = evaluator.evaluate([noisy])
    evaluator._reference = noisy  # what the cache holds is used, not this
    assert evaluator.evaluate([noisy]) == first


def test_hostile_cache_is_not_executed(dino: Path, clean: Tensor, tmp_path: Path) -> None:
    evaluator = FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(dinov2=dino), tmp_path)
    evaluator.evaluate([clean])
    (cached,) = tmp_path.rglob("*stat-fid*.pt")
    torch.save(Trap(tmp_path / "executed"), cached)
    with pytest.raises(pickle.UnpicklingError):
        evaluator.evaluate([clean])
    assert not (tmp_path / "executed").exists()
    torch.load(cached, weights_only=False)  # afterwards torch.load is itself again, and the trap does work
    assert (tmp_path / "executed").exists()


def test_grey_images_are_repeated(dino: Path, clean: Tensor, noisy: Tensor, tmp_path: Path) -> None:
    figures = []
    for channels in (1, 3):
        reference, samples = (images[..., :1].repeat(1, 1, 1, channels) for images in (clean, noisy))
        evaluator = FidelityEvaluator(Dataset("x", reference, None), FidelityOptions(dinov2=dino), tmp_path)
        figures.append(evaluator.evaluate([samples])["FD-DINOv2"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_dinov2_interpolates_its_positions() -> None:
    """At its own size the position embedding is used as it is; a constant one stays constant at any size."""
    from ect.metrics.dinov2 import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(64, depth=1, grid=5)
    nn.init.normal_(net.pos_embed)
    assert torch.equal(net._position(5, 5), net.pos_embed)
    assert net._position(3, 3).shape == (1, 10, 64)
    nn.init.constant_(net.pos_embed, 0.5)
    torch.testing.assert_close(net._position(3, 3), torch.full((1, 10, 64), 0.5))
    assert net(torch.randn(2, 3, 42, 42)).shape == (2, 64)


def test_missing_weights_are_explained_per_column(clean: Tensor, tmp_path: Path, torch_home: Path) -> None:
    evaluator = make_evaluator(Dataset("x", clean, None), EvalConfig(samples=50), tmp_path)
    assert evaluator.available == []
    first, second = evaluator.notes
    assert first.startswith("FID, KID, IS: Inception weights not found: pass --weights PATH (to ect.train: --eval.w")
    assert f"into {torch_home / 'hub' / 'checkpoints'} from https://github.com/toshas/torch-fidelity/" in first
    assert second.startswith("precision, recall: VGG16 weights not found: pass --vgg PATH, or put vgg16-397923af.pth")
    assert evaluator.evaluate(pytest.fail("images were asked for") for _ in range(1)) == {}


def test_missing_torch_fidelity_is_explained(clean: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    evaluator = FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(), tmp_path)
    (note,) = evaluator.notes
    assert note.startswith("FID, KID, IS, precision, recall: torch-fidelity cannot be imported")
    assert f"pip install torch-fidelity, and the torchvision that belongs to torch {torch.__version__}" in note


def test_a_path_that_does_not_exist_is_an_error(clean: Tensor, tmp_path: Path) -> None:
    options = FidelityOptions(weights=tmp_path / "nothing.pth")
    with pytest.raises(UserError, match=r"--weights .*nothing\.pth: no such file; expected Inception weights"):
        FidelityEvaluator(Dataset("x", clean, None), options, tmp_path)


def test_hostile_weights_are_not_executed(clean: Tensor, tmp_path: Path) -> None:
    torch.save({"fc.weight": Trap(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: cannot be read safely"):
        FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(weights=tmp_path / "evil.pth"), tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("option", ["weights", "vgg", "dinov2"])
def test_weights_of_another_network_are_refused(option: str, clean: Tensor, tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    options = FidelityOptions(**{option: tmp_path / "other.pth"})
    with pytest.raises(UserError, match=rf"--{option} .*other\.pth: not .*; expected"):
        FidelityEvaluator(Dataset("x", clean, None), options, tmp_path)


@pytest.mark.slow
def test_wrong_shapes_are_refused(inception: Path, clean: Tensor, tmp_path: Path) -> None:
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in read_state(inception).items()}
    state["fc.weight"] = torch.zeros(1000, 2048)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"not torch-fidelity's Inception weights .*fc\.weight"):
        FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(weights=tmp_path / "other.pth"), tmp_path)


def write_statistics(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2048)}, "cannot be read"),
        ({"mu": np.zeros(64), "sigma": np.zeros((64, 64))}, r"mu is \[64\], sigma \[64, 64\]"),
        ({"mu": np.full(2048, np.nan), "sigma": np.zeros((2048, 2048))}, "NaN"),
    ],
)
def test_other_statistics_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--reference .*stats\.npz: .*{message}.*expected EDM's statistics"):
        read_statistics(write_statistics(tmp_path / "stats.npz", **arrays))


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    whole = write_statistics(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048)).read_bytes()
    np.save(tmp_path / "mu.npy", np.zeros(2048))
    for content in (whole[: len(whole) // 2], b"", (tmp_path / "mu.npy").read_bytes()):
        (tmp_path / "stats.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"--reference .*stats\.npz: cannot be read"):
            read_statistics(tmp_path / "stats.npz")


def test_statistics_that_are_a_pickle_are_not_executed(tmp_path: Path) -> None:
    (tmp_path / "stats.npz").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(UserError, match="cannot be read"):
        read_statistics(tmp_path / "stats.npz")
    assert not (tmp_path / "executed").exists()


def test_too_few_images_are_refused(dino: Path, clean: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data set x has 3 images; expected at least 4"):
        FidelityEvaluator(Dataset("x", clean[:3], None), FidelityOptions(), tmp_path)
    evaluator = FidelityEvaluator(Dataset("x", clean, None), FidelityOptions(dinov2=dino), tmp_path)
    with pytest.raises(UserError, match="3 images cannot be evaluated; expected at least 4"):
        evaluator.evaluate([clean[:3]])
    with pytest.raises(UserError, match="3 generated images cannot be rated; expected at least 4"):
        make_evaluator(Dataset("x", clean, None), EvalConfig(samples=3), tmp_path)
    with pytest.raises(ValueError, match="needs a data set"):
        FidelityEvaluator(None, FidelityOptions(), tmp_path)
