"""--data.source teacher: the teacher of --init-from draws the images, once; a resume finds them in the run's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from ect.config import DRAWN, Config, DataConfig, EvalConfig, ObjectiveConfig
from ect.config.sampling import SEEDS
from ect.data import load
from ect.errors import UserError
from ect.evaluate import main as evaluate
from ect.files.checkpoint import load_model
from ect.files.drawn import FILE, first_seed
from ect.job import Job
from ect.options import parse
from ect.ranks.distributed import World
from ect.sampler import Heun, draw, generate
from tests.test_job import final_state, interrupt_after
from tests.tiny import config, run

COUNT = 20


@pytest.fixture(scope="module", params=[False, True], ids=["unconditional", "classes"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model of the digits."""
    folder: Path = tmp_path_factory.mktemp("teacher") / "run"
    diffusion, data = ObjectiveConfig(kind="diffusion"), DataConfig(labels=request.param)
    return run(config(objective=diffusion, total_kimg=0.008, data=data), folder).run_dir


def without_data(teacher: Path, **changes: object) -> Config:
    labels = bool(load_model(teacher)[0].label_dim)
    data = DataConfig("teacher", labels=labels, teacher_samples=COUNT)
    return config(init_from=teacher, data=data, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["self", "teacher"])
def test_a_run_learns_its_teachers_images_and_resumes_bit_for_bit(
    teacher: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = without_data(teacher, objective=ObjectiveConfig(n_stages=4, stage_kimg=0.024, target=target))  # type: ignore[arg-type]
    whole = run(cfg, tmp_path / "whole")
    net, _ = load_model(teacher)
    first = 2**31  # of seed 0
    want = torch.cat(list(generate(net, range(first, first + COUNT), Heun(18))))
    assert torch.equal(whole.dataset.images, want) and whole.seconds["drawing"] > 0
    assert whole.dataset.describe().startswith(f"digits-drawn: {COUNT} images, 8x8 grey")
    assert (whole.dataset.labels is not None) == bool(net.label_dim)
    if whole.dataset.labels is not None:
        assert whole.dataset.has_classes and whole.dataset.label_dim == 10
        for number in (0, 7):  # the class is the one that the image was drawn with
            label = int(whole.dataset.labels[number].argmax())
            (again,) = generate(net, [first + number], Heun(18), class_idx=label)
            # Rounding alone depends on the batch.
            assert (again[0].int() - want[number].int()).abs().max() <= 1
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert not Job(replace(cfg, run_dir=tmp_path / "run"), Console(quiet=True)).run()
    with monkeypatch.context() as patch:
        patch.setattr("ect.files.drawn.generate", None)  # it draws no more
        run(parse(["--resume", str(tmp_path / "run")]), tmp_path / "run")
    got, want_state = final_state(tmp_path / "run"), final_state(tmp_path / "whole")
    assert all(torch.equal(got[name], want_state[name]) for name in want_state)


@pytest.mark.slow
def test_another_seed_draws_others_and_images_of_the_digits_are_rated_against_them(tmp_path: Path) -> None:
    one = run(config(objective=ObjectiveConfig(kind="diffusion"), total_kimg=0.008), tmp_path / "teacher").run_dir
    cfg = without_data(one, eval=EvalConfig(samples=8))
    jobs = [Job(replace(cfg, seed=seed, run_dir=tmp_path / f"{seed}"), Console(quiet=True)) for seed in (0, 1)]
    assert not torch.equal(jobs[0].dataset.images, jobs[1].dataset.images)
    assert [column.name for column in jobs[0].evaluator.columns][:2] == ["FDc", "FDp"]  # type: ignore[union-attr]
    assert jobs[0].drawn is not None and torch.equal(jobs[0].drawn.reference().images, load(DataConfig()).images)


@pytest.mark.slow
def test_where_it_cannot_be_it_says_so_and_leaves_nothing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = bool(load_model(teacher)[0].label_dim)
    cfg = without_data(teacher)
    if not labels:
        with pytest.raises(UserError, match=r"--data\.labels: the teacher .* has no classes; leave the option out"):
            run(replace(cfg, data=replace(cfg.data, labels=True)), tmp_path / "run")
    run(config(total_kimg=0.008), tmp_path / "ect")
    with pytest.raises(UserError, match=r"--data\.source teacher: --init-from .*ect is a consistency model"):
        run(replace(cfg, init_from=tmp_path / "ect"), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match=r"--data\.source teacher: expected --init-from with it"):
        parse(["--data.source", "teacher"])
    with pytest.raises(UserError, match=r"--data\.teacher-samples 7: expected 50000, its default"):
        parse(["--data.teacher-samples", "7"])
    with pytest.raises(UserError, match=r"drawn for a run of ect\.train alone; give a path"):
        load(DataConfig("teacher"))
    with pytest.raises(SystemExit) as left:
        evaluate([str(tmp_path / "ect"), "--data", "teacher", "--samples", "8"])
    assert left.value.code == 2 and "--data teacher: such images are drawn" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["gone", "cut", "other"])
def test_a_resume_without_its_images_is_refused(teacher: Path, spoil: str, tmp_path: Path) -> None:
    folder = run(without_data(teacher, total_kimg=0.008), tmp_path / "run").run_dir
    path = folder / FILE
    whole = path.read_bytes()
    if spoil == "gone":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, "images": arrays["images"] ^ 1})
    what = "teacher holds other images or labels" if spoil == "other" else "drew for this run are gone .* put them back"
    with pytest.raises(UserError, match=what):
        Job(parse(["--resume", str(folder)]), Console(quiet=True), World()).run()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**70])
def test_no_image_shares_its_latents_with_an_evaluation(seed: int) -> None:
    first = first_seed(seed)
    assert first >= 2**31 and first + DRAWN <= SEEDS
    assert len({first_seed(number) for number in range(seed, seed + 100)}) == 100


def test_images_are_as_many_as_their_seeds_are_said_to_be() -> None:
    """The bound is torch's own: the seed after the last one draws the image of seed 0 again."""
    net = SimpleNamespace(img_channels=1, img_resolution=4, label_dim=0)
    assert torch.equal(draw(net, SEEDS)[0], draw(net, 0)[0])  # type: ignore[arg-type]
    assert not torch.equal(draw(net, SEEDS - 1)[0], draw(net, 0)[0])  # type: ignore[arg-type]
