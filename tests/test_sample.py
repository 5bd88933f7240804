"""python -m ect.sample, end to end on tiny random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ect import sample as cli
from ect.files.checkpoint import Checkpoints, load_model, read_model
from ect.files.model_file import save_model
from ect.models import build
from ect.sampler import Consistency, Heun, generate
from ect.show.grid import make_grid


def write_model(path: Path, info: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A random network whose output depends on noise level and class (a fresh one is zero in its last layers)."""
    kwargs = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
    kwargs |= {"num_blocks": 1, "attn_resolutions": [4], "label_dim": changes.pop("label_dim", 0)}
    kwargs |= changes.pop("more", {})
    spec = {"precond": "ECMPrecond", "sigma_data": 0.5, "unet": "SongUNet", "kwargs": kwargs, **changes}
    state = build(spec).state_dict()
    generator = torch.Generator().manual_seed(7)
    for key, value in state.items():
        if "resample" not in key:
            scale = 2.0 if "map_label" in key else 0.2
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    save_model(path, state, spec, info or {})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.safetensors")


def run(*args: Any) -> None:
    cli.main(["--device", "cpu", "--threads", "1", *map(str, args)])


def images_of(npz: Path) -> np.ndarray:
    with np.load(npz) as arrays:
        return arrays["images"]


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.mark.slow
def test_grid_folder_and_npz_hold_the_same_images(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("grid.png", "new/folder", "deep/er/images.npz"):
        run(model, "--seeds", "0-2,998-1001", "--batch", 3, "--out", tmp_path / out)
    shown = capsys.readouterr().out
    assert f"{model}: 2 NFE at sigma 80, 0.821" in shown
    assert f"wrote 7 images to {tmp_path / 'grid.png'} in " in shown and " img/s, products in fp32)" in shown
    with np.load(tmp_path / "deep/er/images.npz", allow_pickle=False) as arrays:
        images, seeds = arrays["images"], arrays["seeds"].tolist()
        assert arrays["sigmas"].tolist() == [80.0, 0.821]
        assert arrays["class"].tolist() == [-1] * 7
    assert images.shape == (7, 8, 8, 3) and images.dtype == np.uint8 and images.std() > 10
    assert seeds == [0, 1, 2, 998, 999, 1000, 1001]
    folder = tmp_path / "new" / "folder"
    names = [f"000000/{seed:06d}.png" for seed in seeds[:5]] + ["001000/001000.png", "001000/001001.png"]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == names
    for name, image in zip(names, images, strict=True):
        with Image.open(folder / name) as picture:
            assert np.array_equal(np.array(picture), image)
    with Image.open(tmp_path / "grid.png") as picture:
        assert np.array_equal(np.array(picture), make_grid(torch.from_numpy(images)).numpy())


@pytest.mark.slow
def test_an_image_depends_on_its_seed_and_not_on_the_batch(model: Path, tmp_path: Path) -> None:
    out = [tmp_path / f"{i}.npz" for i in range(3)]
    run(model, "--seeds", "3-9", "--batch", 7, "--out", out[0])
    run(model, "--seed", 3, "--count", 7, "--batch", 2, "--out", out[1])
    run(model, "--seeds", "8", "--batch", 64, "--out", out[2])
    together, apart, alone = (images_of(path).astype(int) for path in out)
    assert (
        abs(together - apart).max() <= 1 and abs(together[5] - alone[0]).max() <= 1
    )  # rounding at the edge of a level
    assert all(abs(together[i] - together[j]).max() > 10 for i in range(7) for j in range(i))


@pytest.mark.slow
def test_noise_levels_come_from_options_then_the_model_then_the_default(tmp_path: Path) -> None:
    plain, own = tmp_path / "plain.safetensors", tmp_path / "own.safetensors"
    write_model(plain)
    write_model(own, info={"mid_t": [0.5, 0.25]})
    number = write_model(tmp_path / "number.safetensors", info={"mid_t": 1.5})
    for path, options, sigmas in [
        (plain, [], [80, 0.821]),
        (plain, ["--nfe", 2], [80, 0.821]),
        (own, [], [80, 0.5]),
        (number, [], [80, 1.5]),
        (own, ["--nfe", 1], [80]),
        (own, ["--mid-t", 3, 2, 1], [80, 3, 2, 1]),
        (own, ["--mid-t", 3, 2, "--nfe", 3], [80, 3, 2]),
        (plain, ["--heun", 3], []),
    ]:
        out = tmp_path / "x.npz"
        run(path, "--count", 2, "--out", out, *options)
        with np.load(out) as arrays:
            assert arrays["sigmas"].tolist() == sigmas
            images = torch.from_numpy(arrays["images"])
        net, _ = cli.load_model(path)
        sampler = Consistency(tuple(sigmas)) if sigmas else Heun(3)
        assert torch.equal(images, torch.cat(list(generate(net, [0, 1], sampler))))


@pytest.mark.slow
def test_a_diffusion_model_takes_the_heun_sampler_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_model(tmp_path / "teacher.safetensors", precond="EDMPrecond")
    run(teacher, "--count", 1, "--out", tmp_path / "a.npz")
    assert "Heun sampler, 18 steps, 35 NFE" in capsys.readouterr().out
    run(teacher, "--count", 1, "--nfe", 1, "--out", tmp_path / "b.npz")
    assert "1 NFE at sigma 80" in capsys.readouterr().out


@pytest.mark.slow
def test_classes_are_given_or_drawn_by_the_seed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "cond.safetensors", label_dim=5)
    run(model, "--seeds", "0-19", "--out", tmp_path / "drawn.npz")
    with np.load(tmp_path / "drawn.npz") as arrays:
        classes, drawn = arrays["class"], arrays["images"].astype(int)
    assert set(classes) == {0, 1, 2, 3, 4}
    for class_idx in range(5):
        run(model, "--seeds", "0-19", "--class", class_idx, "--out", tmp_path / "given.npz")
        with np.load(tmp_path / "given.npz") as arrays:
            assert arrays["class"].tolist() == [class_idx] * 20
            apart = abs(arrays["images"].astype(int) - drawn).reshape(20, -1).max(1)
        assert (apart[classes == class_idx] <= 1).all() and (apart[classes != class_idx] > 1).all()


def test_a_run_folder_is_a_checkpoint(tmp_path: Path, model: Path) -> None:
    snapshot = read_model(model)
    (tmp_path / "run").mkdir()
    Checkpoints(tmp_path / "run").save(1000, snapshot.state, snapshot.spec, snapshot.info, {}, {})
    run(tmp_path / "run", "--count", 2, "--out", tmp_path / "a.npz")
    run(model, "--count", 2, "--out", tmp_path / "b.npz")
    assert np.array_equal(images_of(tmp_path / "a.npz"), images_of(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", 1], "--class 1: this model is unconditional"),
        (["--seeds", "5-3"], "--seeds 5-3: cannot read '5-3'; expected numbers and ranges such as 0-63,100"),
        (["--seeds", "1,,2"], "cannot read ''"),
        (["--seeds", "1-2-3"], "cannot read '1-2-3'"),
        (["--seeds", "a"], "cannot read 'a'"),
        (["--seeds=-1"], "cannot read '-1'"),
        (["--seeds", str(2**32)], "below 2^32"),
        (["--seeds", "1", "--count", 3], "--seeds says it all"),
        (["--seed", -1], "--seed -1: expected a number from 0 on"),
        (["--count", 0], "--count 0: expected at least 1"),
        (["--batch", 0], "--batch 0: expected at least 1"),
        (["--threads", 0], "--threads 0: expected at least 1"),
        (["--nfe", 0], "--nfe 0: expected at least 1"),
        (["--nfe", 3], "--nfe 3: also give its 2 later noise levels, --mid-t"),
        (["--nfe", 2, "--mid-t", 3, 1], "--nfe 2 takes 1 noise levels in --mid-t, got 2"),
        (["--mid-t", 1, 3], "--mid-t 1 3: expected strictly decreasing levels between 0 and 80"),
        (["--mid-t", 1, 1], "strictly decreasing"),
        (["--mid-t", 80], "between 0 and 80"),
        (["--mid-t", 0], "between 0 and 80"),
        (["--mid-t", "nan"], "between 0 and 80"),
        (["--heun", 0], "--heun 0: expected at least 1 step"),
        (["--count", 10**12], "--count 1000000000000: expected at most 1,000,000"),
        (["--seeds", "0-99999999999999"], "--seeds 0-99999999999999: expected at most 1,000,000 images"),
        (["--seeds", "0-600000,0-600000"], "expected at most 1,000,000 images"),
        (["--seeds", "0-" + "9" * 5000], "cannot read"),
        (["--batch", 10**11], "expected at most 1,048,576"),
        (["--threads", 100_000], "--threads 100000: expected at most 1,024"),
        (["--heun", 10**9], "and at most 1,000"),
        (["--device", "meta"], "--device meta: not usable here (it holds shapes, and no numbers)"),
        (["--heun", 5, "--nfe", 1], "leave out --nfe and --mid-t"),
        (["--out", "x.jpg"], "--out x.jpg: cannot write .jpg files; expected NAME.png, NAME.npz or a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[Any], message: str
) -> None:
    out = [] if "--out" in options else ["--out", model.parent / "x.png"]
    assert message in refused(capsys, model, *options, *out)
    assert not (model.parent / "x.png").exists()


def test_a_class_out_of_range_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "cond.safetensors", label_dim=5)
    message = refused(capsys, model, "--class", 5, "--out", tmp_path / "x.png")
    assert "--class 5: expected 0 to 4" in message


def test_places_that_cannot_be_written_are_refused_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("loaded the model first")

    monkeypatch.setattr(cli, "load_model", never)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused(capsys, model, "--out", tmp_path / "folder.png")
    for out in (model / "x.png", model / "folder", model):
        assert f"--out {out}: cannot write" in refused(capsys, model, "--out", out)
    assert "--nfe 0" in refused(capsys, model, "--nfe", 0, "--out", tmp_path / "x.png")


def test_a_name_may_have_any_case_and_begin_at_home(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cli.main([str(model), "--count", "2", "--nfe", "1", "--device", "cpu", "--out=~/x.PNG"])
    assert (tmp_path / "home/x.PNG").is_file() and not (tmp_path / "~").exists()


def test_a_device_that_is_not_there_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([str(model), "--device", "cuda:99", "--out", str(model.parent / "x.png")])
    assert "error: --device cuda:99: not usable here (" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["group_norm_silu=cuda", "perturb=cuda", "nonsense"])
def test_a_backend_asked_for_by_name_that_cannot_run_is_refused(
    choice: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECT_KERNELS", choice)
    assert refused(capsys, model, "--out", tmp_path / "images").startswith("error: ECT_KERNELS: ")
    assert not (tmp_path / "images").exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, tmp_path / "none.safetensors", "--out", tmp_path / "x.png")
    assert f"{tmp_path / 'none.safetensors'}: no such file" in message


@pytest.mark.parametrize(("device", "channels_last"), [("cuda:0", True), ("cpu", False)])
def test_a_model_for_a_gpu_has_channels_last_weights(
    device: str, channels_last: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, devices = nn.Module.to, []

    def to_cpu(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        devices.extend(args)
        return move(self, **kwargs) if kwargs else self

    monkeypatch.setattr(nn.Module, "to", to_cpu)
    net, _ = load_model(model, device=device)
    weights = [p for p in net.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert devices == [device] and weights
    for p in weights:
        assert p.is_contiguous(memory_format=torch.channels_last) is channels_last
