"""The wiring from configuration to objects, and what a trainer saves and where it starts."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ect import precision, schedule
from ect.config import DataConfig, EvalConfig, LogConfig, NetConfig, ObjectiveConfig, OptimConfig
from ect.cost.categories import GEMMS
from ect.cost.trace import trace
from ect.data import ImageStream, load
from ect.errors import UserError
from ect.files import checkpoint, model_file
from ect.files.checkpoint import Checkpoints, read_model
from ect.job import Job
from ect.metrics import Column, Evaluator
from ect.models import DhariwalUNet, EDMPrecond
from ect.models.layers import FourierEmbedding
from ect.objective import ConsistencyObjective, DiffusionObjective, Mapping
from ect.show.log import RunLog
from ect.show.report import strips
from ect.step import TrainStep
from ect.trainer import Trainer
from tests.tiny import BATCH, STEPS, config, run

EVERYTHING = config(
    seed=5,
    batch_per_device=4,
    net=NetConfig("adm", 16, (1, 2), 2, (4,), 0.3, 0.15, 0.6),
    data=DataConfig(labels=True, xflip=True, augment=0.25),
    objective=ObjectiveConfig("consistency", -0.9, 1.7, "const", 3.0, 5.0, 2.0, 0.05, "inverse_t", 3, 0.024),
    optim=OptimConfig("adam", 3e-4, (0.8, 0.95), 1e-6, 0.7, 0.016, "linear", 0.04, (".97", ".9"), 0.05),
)


def make(cfg: Any, folder: Path) -> Trainer:
    return Trainer(cfg, folder, load(cfg.data), torch.device("cpu"))


@pytest.mark.slow
def test_every_field_reaches_its_object(tmp_path: Path) -> None:
    trainer = make(EVERYTHING, tmp_path)
    step, state, net = trainer.step, trainer.state, trainer.net
    assert step.objective == ConsistencyObjective(Mapping("const", 3.0, 5.0, 2.0), 0.05, "inverse_t", 0.6, -0.9, 1.7)
    assert (step.seed, step.batch, step.micro_batch, step.xflip, step.augment.p) == (5, 8, 4, True, 0.25)
    assert step.stream.order.seed == 5 and step.stream.labels is not None
    assert (state.rule.op_name, state.rule.betas, float(state.rule.eps), state.rule.clip) == (
        "adam",
        (0.8, 0.95),
        1e-6,
        0.7,
    )
    assert isinstance(net.model, DhariwalUNet) and net.sigma_data == 0.6
    kwargs = trainer.spec["kwargs"]
    assert (kwargs["dropout"], kwargs["label_dropout"], kwargs["num_blocks"]) == (0.3, 0.15, 2)
    assert (kwargs["label_dim"], kwargs["augment_dim"], kwargs["attn_resolutions"]) == (10, 9, [4])
    assert net.training and not trainer.ema_net.training


@pytest.mark.slow
def test_diffusion_and_ncsnpp(tmp_path: Path) -> None:
    cfg = replace(EVERYTHING, net=replace(EVERYTHING.net, arch="ncsnpp"))
    cfg = replace(cfg, objective=ObjectiveConfig(kind="diffusion", P_mean=-0.7, P_std=0.9))
    trainer = make(cfg, tmp_path)
    assert trainer.step.objective == DiffusionObjective(0.6, -0.7, 0.9)
    assert isinstance(trainer.net.model.map_noise, FourierEmbedding)
    assert any("aux_residual" in name for name in trainer.net.model.enc)


@pytest.mark.slow
def test_schedules_reach_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = TrainStep.__call__

    def call(self: TrainStep, nimg: int, stage: int) -> torch.Tensor:
        seen.append((nimg, stage, float(self.state.lr), self.state.ema_betas))
        return original(self, nimg, stage)

    monkeypatch.setattr(TrainStep, "__call__", call)
    trainer = make(EVERYTHING, tmp_path)
    with RunLog(tmp_path, trainer.total_img, quiet=True) as log:
        trainer.run(log)
    cfg = EVERYTHING
    for nimg, stage, lr, betas in seen:
        assert stage == schedule.stage_at(nimg, cfg.objective)
        assert lr == pytest.approx(schedule.lr_at(nimg, 8, trainer.total_img, cfg.optim))
        assert betas == pytest.approx(schedule.ema_betas_at(nimg, 8, cfg.optim))
    assert len({row[1] for row in seen}) == 3 and len({row[2] for row in seen}) > 5 and len(seen) == 10


@pytest.mark.slow
def test_the_model_file_holds_the_average(tmp_path: Path) -> None:
    run(config(), tmp_path / "run")
    model = read_model(tmp_path / "run").state
    state = load_file(tmp_path / "run" / "checkpoint-000000.080.state.safetensors")
    for name, value in model.items():
        if f"ema0.{name}" in state:
            assert torch.equal(value, state[f"ema0.{name}"])
    assert not torch.equal(state["ema0.model.map_layer0.weight"], state["params.model.map_layer0.weight"])


@pytest.mark.slow
def test_tuning_starts_at_the_pretrained_average(tmp_path: Path) -> None:
    cfg = config(pretrain="digits-diffusion", pretrain_kimg=0.08, log=replace(config().log, keep=99))
    run(cfg, tmp_path / "run")
    teacher = read_model(tmp_path / "run" / "pretrain").state
    start = read_model(tmp_path / "run" / "checkpoint-000000.000.safetensors").state
    assert all(torch.equal(start[name], teacher[name]) for name in teacher)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "call"), [("grids", 2), ("evaluate", 1)])
def test_a_checkpoint_is_saved_before_what_may_fail_and_a_resume_makes_up_for_that(
    method: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count, folder = getattr(Trainer, method), [0], tmp_path / "run"

    def fails(self: Trainer) -> None:
        count[0] += 1
        if count[0] == call:
            raise OSError("disk full")
        original(self)

    log = LogConfig(stats_kimg=0.016, sample_kimg=0.032, eval_kimg=0.032, checkpoint_kimg=0.032)
    cfg = config(log=log, eval=EvalConfig(samples=2, batch=2))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, fails)
        with pytest.raises(OSError, match="disk full"):
            Job(replace(cfg, run_dir=folder), Console(quiet=True)).run()
    assert read_model(folder).info["nimg"] == 32
    for _ in range(2):  # the second one finds that nothing is missing
        run(replace(cfg, resume=folder), folder)
        rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
        assert [row["nimg"] for row in rows if "nfe1/FDc" in row] == [32, 64]
        assert len(list(folder.glob("nfe*-000000.032.png"))) == 2


@pytest.mark.slow
def test_a_lost_pointer_does_not_restart_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config(), folder)
    stats = (folder / "stats.jsonl").read_text()
    (folder / "latest").unlink()
    for source in (folder, folder / "checkpoint-000000.080.safetensors"):
        run(replace(config(), resume=source), folder)
        assert (folder / "stats.jsonl").read_text() == stats


@pytest.mark.slow
def test_a_resume_reads_and_hashes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(config(), folder)
    read: dict[str, list[str]] = {"_fingerprint": [], "read_tensors": []}
    for name, paths in read.items():
        original = getattr(checkpoint, name)

        def counted(path: Path, *args: Any, original: Any = original, paths: list[str] = paths) -> Any:
            paths.append(path.name)
            return original(path, *args)

        for module in (checkpoint, model_file):
            monkeypatch.setattr(module, name, counted, raising=False)
    trainer = make(replace(config(), resume=folder), folder)
    model, state = "checkpoint-000000.080.safetensors", "checkpoint-000000.080.state.safetensors"
    assert read == {
        "_fingerprint": [model, state],
        "read_tensors": [state, model],
    }  # of the model its description alone
    assert trainer.nimg == STEPS * BATCH and trainer.spec == read_model(folder).spec


@pytest.mark.slow
def test_a_damaged_training_state_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(config(), folder)
    tensors, meta, path = Checkpoints.load(folder)
    for name in ("steps", "grad_norm"):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        monkeypatch.setattr(Checkpoints, "load", lambda source, left=left: (left, meta, path))
        with pytest.raises(UserError, match=rf"--resume .*run: .* missing {name}; resume from another checkpoint"):
            make(replace(config(), resume=folder), folder)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [False, True])
def test_the_streams_thread_ends_with_the_run(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    threads, original, kept = [], ImageStream.seek, []

    def seek(self: ImageStream, nimg: int) -> None:
        kept.append(self)  # for a thread also ends with the last reference to its executor
        original(self, nimg)
        threads.extend(thread for thread in threading.enumerate() if thread.name.startswith("images"))
        if failing:
            raise OSError("disk gone")

    monkeypatch.setattr(ImageStream, "seek", seek)
    before = set(threading.enumerate())
    if failing:
        with pytest.raises(OSError, match="disk gone"):
            run(config(), tmp_path / "run")
    else:
        run(config(), tmp_path / "run")
    assert threads and not {thread for thread in threads if thread not in before and thread.is_alive()}


Flags = tuple[bool, bool]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trains", "samples"),
    [("fp32", False, False), ("tf32", True, True), ("fp16", False, True), ("bf16", False, True)],
)
def test_images_are_made_and_rated_in_tf32_but_trained_on_as_asked(
    name: str, trains: bool, samples: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags() -> Flags:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    seen: dict[str, set[Flags]] = {"step": set(), "sample": set(), "rate": set()}

    class Rater(Evaluator):
        columns, used = (Column("mean"),), {}

        def evaluate(self, images: Any) -> dict[str, float]:
            seen["rate"].add(flags())
            return {"mean": torch.cat(list(images)).double().mean().item()}

    call, forward = TrainStep.__call__, EDMPrecond.forward

    def step(self: TrainStep, nimg: int, stage: int) -> torch.Tensor:
        seen["step"].add(flags())
        return call(self, nimg, stage)

    def sample(self: EDMPrecond, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training and args[0].device.type != "meta":  # on which memory is predicted
            seen["sample"].add(flags())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(EDMPrecond, "forward", sample)
    monkeypatch.setattr("ect.job.make_evaluator", lambda *args, **kwargs: Rater())
    log = LogConfig(stats_kimg=0.016, sample_kimg=0.032, checkpoint_kimg=0.08, eval_kimg=0.032)
    try:
        run(config(precision=name, eval=EvalConfig(samples=4), log=log), tmp_path / "run")
        assert flags() == (trains, trains)
    finally:
        precision.apply(precision.PRECISIONS["fp32"])
    assert seen == {"step": {(trains, trains)}, "sample": {(samples, samples)}, "rate": {(samples, samples)}}


@pytest.mark.slow
def test_the_benchmark_times_the_step_under_the_trainers_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that torch is told about kernels and arithmetic is the same, whoever runs the step."""
    import step_time
    from lib import waterfall

    def settings() -> dict[str, bool]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return {
            "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "conv tf32": cudnn.allow_tf32,
            "tf32": matmul.allow_tf32, "fp16 sums": matmul.allow_fp16_reduced_precision_reduction,
            "bf16 sums": matmul.allow_bf16_reduced_precision_reduction,
        }  # fmt: skip

    seen: list[dict[str, bool]] = []
    call = TrainStep.__call__

    def step(self: TrainStep, nimg: int, stage: int) -> torch.Tensor:
        seen.append(settings())
        return call(self, nimg, stage)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(waterfall, "case", lambda *args: waterfall.Case("digits", config(), load(DataConfig())))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # and what it was afterwards
    run(config(total_kimg=0.008), tmp_path / "run")
    trained = len(seen)
    torch.backends.cudnn.benchmark = False
    step_time.main(
        ["--net", "digits", "--device", "cpu", "--rounds", "1", "--no-append", "--rows", "trainer's default"]
    )
    assert seen[0]["benchmark"] and len(seen) > trained and all(found == seen[0] for found in seen)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_made_by_weights_in_the_memory_order_of_training(channels_last: bool, tmp_path: Path) -> None:
    """Also after an average was loaded: else a GPU's convolutions would convert every weight at each call."""
    trainer = make(config(channels_last=channels_last, total_kimg=0.008), tmp_path)

    def order(net: EDMPrecond) -> list[tuple[int, ...]]:
        return [p.stride() for p in net.parameters()]

    assert order(trainer.ema_net) == order(trainer.net)
    assert order(trainer.average()) == order(trainer.net)
    weight = trainer.ema_net.model.dec["8x8_block0"].conv0.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert not weight.requires_grad and weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.slow
def test_the_noise_of_half_precision_is_measured_without_slow_arithmetic(tmp_path: Path) -> None:
    """GPUs for games do fp64 at a 64th of their speed; only the small difference of two outputs is taken in it."""
    notes: list[str] = []
    events = trace(lambda: notes.extend(make(config(precision="fp16", total_kimg=0.008), tmp_path).notes))
    products = [event for event in events if event.name.rstrip("_") in ("convolution", *GEMMS)]
    dtypes = {t.dtype for event in products for t in event.inputs}
    assert any("noise of fp16 on the signal" in note for note in notes)
    assert torch.float32 in dtypes and torch.float64 not in dtypes


@pytest.mark.slow
def test_a_moved_data_set_is_the_same_data_set(tmp_path: Path) -> None:
    from ect.show.grid import save_png

    images = torch.randint(0, 256, [10, 8, 8, 1], dtype=torch.uint8)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            save_png(image, tmp_path / folder / f"{i}.png")
    run(
        config(data=DataConfig(source=str(tmp_path / "here"))), tmp_path / "run"
    )  # ten images: fewer than a strip shows
    moved = config(data=DataConfig(source=str(tmp_path / "there")), resume=tmp_path / "run", total_kimg=0.08)
    run(moved, tmp_path / "run")


def test_strips_of_unequal_length() -> None:
    few, many = torch.zeros(2, 4, 4, 1, dtype=torch.uint8), torch.zeros(5, 4, 4, 1, dtype=torch.uint8)
    assert strips({"a": few, "b": many}, 2).shape[1] == strips({"b": many}, 2).shape[1]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (NetConfig(model_channels=8, channel_mult=(1, 1, 1, 1, 1)), "--net.channel-mult 1 1 1 1 1: images of 8x8"),
        (NetConfig(model_channels=132, channel_mult=(1,)), "--net.model-channels 132"),
        (
            NetConfig(model_channels=24, channel_mult=(1, 2, 3)),
            "--net.model-channels 24, --net.channel-mult 1 2 3: 144 channels do not divide into 32 groups of a norm",
        ),
    ],
)
def test_impossible_networks_are_named_and_leave_nothing_behind(net: NetConfig, said: str, tmp_path: Path) -> None:
    cfg = config(net=net, run_dir=tmp_path / "run", pretrain="digits-diffusion", pretrain_kimg=0.08)
    with pytest.raises(UserError, match=said):
        Job(cfg, Console(quiet=True)).run()
    assert not list(tmp_path.iterdir())
