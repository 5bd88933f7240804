"""The features of a data set: the augmentations that they tell, their training, their file and the command that makes it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from lib import ledger_run, recipes
from torch import Tensor

from ect.config import DataConfig
from ect.data import load
from ect.data.stream import to_float
from ect.errors import UserError
from ect.files.resume import data_fingerprint
from ect.tangent import __main__ as command
from ect.tangent import augmentation, file, training
from ect.tangent.augmentation import Augmentation, label_dim
from ect.tangent.network import Features
from tests.test_idx import idx_bytes, noise, write_folder

CPU = torch.device("cpu")
BRIGHTNESS, CONTRAST, BLUR, MIXUP, NOISE, LUMA, COS, SIN, SATURATION = range(9, 18)


def drawn(p: float, channels: int = 3, n: int = 4000, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, what became of them, and the labels."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, side, side, generator=g) * 2 - 1
    return x, *Augmentation()(x, p, g)


def only(labels: Tensor, *columns: int) -> Tensor:
    """Say for each image whether these labels alone were drawn."""
    rest = torch.ones(labels.shape[1], dtype=torch.bool)
    rest[list(columns)] = False
    return (labels[:, rest] == 0).all(1) & (labels[:, list(columns)] != 0).any(1)


@pytest.mark.parametrize(("channels", "count"), [(1, 14), (3, 18)])
def test_each_part_is_drawn_as_often_as_said(channels: int, count: int) -> None:
    x, got, labels = drawn(0.15, channels)
    assert labels.shape == (4000, count) == (4000, label_dim(channels)) and got.shape == x.shape
    share = (labels != 0).float().mean(0)
    halves = [
        0,
        1,
        6,
        *([LUMA] if channels == 3 else []),
    ]  # once drawn, no flip and an upright stretch half of the time
    want = torch.full([count], 0.15)
    want[halves] = 0.075
    torch.testing.assert_close(share, want, rtol=0, atol=0.02)
    untouched = (labels == 0).all(1)
    change = (got - x).abs().flatten(1).amax(1)
    assert float(change[untouched].max()) < 1e-6 < float(change[~untouched].min()) and 0 < int(untouched.sum()) < 1000
    assert set(labels[:, :2].unique().tolist()) == {0, 1}


def test_without_any_the_images_stay_as_they_are() -> None:
    x, got, labels = drawn(1e-9, channels=1)
    assert torch.equal(got, x) and not labels.any()
    x, got, labels = drawn(1e-9)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)  # grey and rest of a colour are summed again
    assert not labels.any()


def test_what_the_labels_say_is_what_was_done() -> None:
    x, got, labels = drawn(0.05)
    by = {name: labels[:, column].view(-1, 1, 1, 1) for name, column in {"b": BRIGHTNESS, "c": CONTRAST}.items()}
    rows = only(labels, BRIGHTNESS, CONTRAST)
    torch.testing.assert_close(got[rows], (x * 2 ** (0.5 * by["c"]) + 0.2 * by["b"])[rows])
    rows = only(labels, BLUR)
    share = labels[rows, BLUR].view(-1, 1, 1)
    inner = x[rows, :, 0:3, 1:4].mean((2, 3)), x[rows, :, 1, 2]
    torch.testing.assert_close(got[rows, :, 1, 2], inner[1] + share[..., 0] * (inner[0] - inner[1]))
    corner = x[rows, :, :2, :2].mean((2, 3))
    torch.testing.assert_close(got[rows, :, 0, 0], x[rows, :, 0, 0] + share[..., 0] * (corner - x[rows, :, 0, 0]))
    rows = only(labels, MIXUP) & (labels.flip(0) == 0).all(1)
    share = labels[rows, MIXUP].view(-1, 1, 1, 1)
    torch.testing.assert_close(got[rows], (1 - share) * x[rows] + share * x.flip(0)[rows])
    assert 0.4 < float(labels[:, MIXUP].max()) <= 0.5 and 0.9 < float(labels[:, BLUR].max()) <= 1
    rows = only(labels, NOISE)
    spread = (got - x)[rows] / (0.5 * labels[rows, NOISE].view(-1, 1, 1, 1))
    assert float(spread.std()) == pytest.approx(1, rel=0.03) and abs(float(spread.mean())) < 0.03
    assert min(int(only(labels, column).sum()) for column in (BLUR, MIXUP, NOISE, BRIGHTNESS)) > 30


def test_colours_change_as_by_the_matrices() -> None:
    """StyleGAN2-ADA's: a mirror and a turn at the grey axis, and a stretch across it, of points (r, g, b)."""
    x, got, labels = drawn(0.1)
    rows = only(labels, LUMA, COS, SIN, SATURATION)
    assert int(rows.sum()) > 200 and all((labels[rows, column] != 0).any() for column in (LUMA, COS, SATURATION))
    v = torch.full([3], 1 / math.sqrt(3), dtype=torch.float64)
    axis, cross = torch.outer(v, v), torch.linalg.cross(v.expand(3, 3), torch.eye(3, dtype=torch.float64)).T
    for before, after, row in zip(x[rows].double(), got[rows], labels[rows].double(), strict=True):
        flip, cos, sin, stretch = row[[LUMA, COS, SIN, SATURATION]]
        turn = torch.linalg.matrix_exp(cross * torch.atan2(sin, cos + 1))
        matrix = (axis + (torch.eye(3) - axis) * 2**stretch) @ turn @ (torch.eye(3) - 2 * axis * flip)
        torch.testing.assert_close(after.double(), torch.einsum("ij,jhw->ihw", matrix, before), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "maps"), [(4, [2]), (8, [4, 2]), (28, [14, 7, 3, 1]), (32, [16, 8, 4, 2])])
def test_features_of_any_side(side: int, maps: list[int]) -> None:
    phi = Features(side, 3)
    assert [found.shape[2] for found in phi.maps(torch.zeros(2, 3, side, side))] == [*maps, 1]
    assert phi(torch.zeros(2, 3, side, side)).shape == (2, label_dim(3))


def test_norms_fold_into_the_convolutions() -> None:
    trained = Features(8, 1, norms=True)
    x = torch.randn(16, 1, 8, 8)
    for _ in range(3):
        trained(3 * x + 1)  # so that means and variances are not those of a new norm
    for norm in trained.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    plain = trained.folded()
    for got, want in zip(plain.maps(x), trained.eval().maps(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not plain.training and not any(p.requires_grad for p in plain.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())


def test_training_repeats_itself_and_leaves_the_generator_alone() -> None:
    images = load(DataConfig()).images
    before = torch.random.get_rng_state()
    one, same, other = (training.train(images, 3, 8, seed, CPU) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [found.features.state_dict() for found in (one, same, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()) and one[1:] == same[1:]
    assert not torch.equal(weights[0]["labels.weight"], weights[2]["labels.weight"])


def test_strengths_ramp_up_over_the_first_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = Augmentation.forward
    monkeypatch.setattr(Augmentation, "forward", lambda self, x, p, g: seen.append(p) or original(self, x, p, g))
    monkeypatch.setattr(training, "TRIALS", 1)
    training.train(load(DataConfig()).images, 16, 2, 0, CPU)
    assert seen == pytest.approx([0.075, *[augmentation.P] * 16])


@pytest.mark.slow
def test_training_tells_augmentations_of_images_that_it_was_not_shown() -> None:
    images = load(DataConfig()).images
    found = training.train(images[:1500], 400, 64, 0, CPU)
    assert found.error < 0.9 * found.variance
    x, labels = Augmentation()(to_float(images[1500:]), augmentation.P, torch.Generator().manual_seed(3))
    assert float((found.features(x) - labels).square().mean()) < 0.9 * float(labels.var(0).mean())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_the_command_keeps_what_a_run_finds(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_folder(tmp_path / "set", {"train-images-idx3-ubyte": idx_bytes(noise(20, 12, 12))}))
    cfg = DataConfig(source, resolution=16)
    images = load(cfg).images
    command_line = f"--data.source {source} --data.resolution 16"
    with pytest.raises(
        UserError, match=rf"--objective\.direction features: .*; run python -m ect\.tangent {command_line}$"
    ):
        file.find(images, cfg)
    command.main([*shlex.split(command_line), "--steps", "2", "--batch", "4", "--device", "cpu"])
    path = file.cached(data_fingerprint(images, None))
    told = capsys.readouterr().out
    assert path.parent == cache and told.startswith(f"{path}: the labels' error is ") and "% of their variance" in told
    found = file.find(images, cfg)
    made = training.train(images, 2, 4, 0, CPU).features
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in found.state_dict().items())
    assert not any(p.requires_grad for p in found.parameters())
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="has none yet"):
        file.find(other, cfg)
    path.rename(file.cached(data_fingerprint(other, None)))
    with pytest.raises(UserError, match=r"ect-tangent-\w+\.npz belongs to other images; run"):
        file.find(other, cfg)
    command.main(["--steps", "1", "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "mine.npz")])
    features, data = file.load(tmp_path / "mine.npz")
    assert (features.side, features.channels) == (8, 1) and data == data_fingerprint(load(DataConfig()).images, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--steps 0", "--steps 0: expected at least 1"),
        ("--batch 1", "--batch 1: expected at least 2"),
        ("--data.resolution 6", "--data.resolution 6: expected a multiple of 4"),
        ("--data.source nowhere", "--data.source nowhere: no such file or folder"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--out x.pt", "--out x.pt: name a file NAME.npz"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: str, said: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command.main(options.split())
    assert end.value.code == 2 and f"error: {said}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_made_is_refused_before_it_trains(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hub").write_text("a file")
    monkeypatch.setattr(command, "train", lambda *args: pytest.fail("it trained"))
    with pytest.raises(SystemExit) as end:
        command.main(["--device", "cpu"])
    assert end.value.code == 2 and "cannot be written there (" in capsys.readouterr().err


def written(path: Path, **changes: Any) -> Path:
    """Write a features file some of whose arrays are others, or absent where None."""
    file.save(path, Features(8, 1), "0" * 64)
    with np.load(path) as arrays:
        whole = dict(arrays) | changes
    np.savez(path, **{name: array for name, array in whole.items() if array is not None})
    return path


def test_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    phi = Features(8, 1)
    file.save(tmp_path / "a.npz", phi, "ab")
    got, data = file.load(tmp_path / "a.npz")
    assert data == "ab" and all(torch.equal(v, phi.state_dict()[name]) for name, v in got.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": np.array([2**40, 1])}, "of 1 channels"),
        ({"shape": np.array([8, 2])}, "8x8 of 2 channels"),
        ({"shape": np.array([8.0, np.nan])}, "NaN"),
        ({"shape": np.array([16, 1])}, "levels.2.0.weight"),
        ({"shape": np.array([8, 3])}, "size mismatch"),
        ({"labels.bias": np.full(14, np.inf, np.float32)}, "not finite"),
        ({"labels.bias": np.zeros(15, np.float32)}, "size mismatch"),
        ({"labels.bias": np.array([None] * 14)}, "Python objects"),
        ({"labels.bias": np.zeros(2**23, np.float32)}, "unpacks to more"),
        ({"data": None}, "data"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.npz: not a file of tangent features \((.|\n)*make it anew with") as error:
        file.load(written(tmp_path / "a.npz", **changes))
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04\x95"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: not a file of tangent features"):
        file.load(tmp_path / "a.npz")


@pytest.mark.parametrize("data", recipes.SETS)
def test_a_recipe_makes_features_of_the_images_that_it_trains_on(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(
        ledger_run.subprocess, "run", lambda words, check: ran.append(words[1:]) or SimpleNamespace(returncode=0)
    )
    bench: Any = SimpleNamespace(folder=tmp_path, _spent=lambda: 0.0)
    cfg = recipes.config(data, "q64-adaptive-features", 1.0, 0, 1)
    for before in recipes.RECIPES["q64-adaptive-features"].before:
        ledger_run.Bench._before(bench, before, cfg.data, tmp_path / "teacher")
    ((dash_m, module, *options),) = ran
    source = tyro.cli(command.Options, args=options).data
    assert (dash_m, module, cfg.objective.direction) == ("-m", "ect.tangent", "features")
    assert DataConfig(source.source, source.resolution, source.convert) == cfg.data
