"""EDM2: the golden vectors, the published sizes, when weights are normalised and what is averaged, and what is in half."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ect.assembly import flat_state, network_spec, train_step
from ect.config import Config, DataConfig, NetConfig
from ect.cost.signal_noise import signal_noise
from ect.data import ImageStream, load
from ect.errors import UserError
from ect.models import ECM2Precond, EDM2Precond, EDM2UNet, MaskKey, build, describe, fitting
from ect.models.edm2_unet import EDM2Block, MPConv, MPFourier, magnitude
from ect.options import check
from ect.presets import PRESETS
from ect.schedule import lr_at, stage_at
from ect.step import TrainStep
from tests import tiny
from tests.golden_data import MANIFEST, part, rel_l2
from tests.golden_data import load as golden

DIGITS = load(DataConfig())
NET = NetConfig(
    arch="edm2-narrow", model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.2
)
LABELLED: dict[str, Any] = dict(img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=[1, 2])
LABELLED |= dict(num_blocks=1, attn_resolutions=[4], channels_per_head=16, label_dim=3)


def config(**changes: Any) -> Config:
    cfg = tiny.config(net=NET, precision="fp32", **changes)
    return replace(cfg, optim=replace(cfg.optim, optimizer="adam", lr=0.05, emas=(".5",)))


def made(cfg: Config) -> TrainStep:
    """An update of a small network with gains that are not 0."""
    torch.manual_seed(0)
    net = build(network_spec(cfg.net, "ECMPrecond", DIGITS, 0)).train()
    for name, p in net.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(p, 0.5)
    return train_step(cfg, flat_state(cfg, net), ImageStream(DIGITS, cfg.seed, "cpu", cfg.batch))


def weights(net: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in net.modules() if isinstance(layer, MPConv)]


def furthest(net: nn.Module) -> float:
    """How far the magnitude of any output's weights is from what one normalisation leaves."""
    return max(float((magnitude(w.detach()) - 1e-4 - 1).abs().max()) for w in weights(net))


# --- the golden vectors ------------------------------------------------------------------------------------------------


def test_network_matches_golden() -> None:
    """In eval mode, then in train mode, which normalises the weights in place before anything else."""
    case, g = dict(MANIFEST["net_edm2"]["kwargs"]), golden("net_edm2")
    D = EDM2Precond(EDM2UNet(**{k: v for k, v in case.items() if k != "sigma_data"}), case["sigma_data"])
    state = part(g, "state.")
    assert set(state) == set(D.state_dict())
    D.load_state_dict(state)
    inputs = g["x"], g["sigma"], g["class_labels"]
    with torch.no_grad():
        assert rel_l2(D.eval()(*inputs), g["D_eval"]) <= 1e-5
    assert all(torch.equal(D.state_dict()[name], value) for name, value in state.items())
    out = D.train()(*inputs)
    assert rel_l2(out.detach(), g["D_train"]) <= 1e-5
    for name, value in part(g, "state_after_forward.").items():
        assert rel_l2(D.state_dict()[name], value) <= 1e-6, name
    (out * g["grad_y"]).sum().backward()
    grads: dict[str, Any] = {name: p.grad for name, p in D.named_parameters()}
    assert rel_l2(torch.stack([grad.norm() for grad in grads.values()]), g["grad_norms"]) <= 1e-4
    for name, value in part(g, "grad.").items():
        assert rel_l2(grads[name], value) <= 1e-4, name


PUBLISHED = {  # millions of parameters, billions of multiply-adds a 64x64 image
    "edm2-xs": (124.711, 44.9), "edm2-s": (280.209, 100.8), "edm2-m": (497.803, 178.9), "edm2-l": (777.492, 279.3),
    "edm2-xl": (1119.277, 402.0),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    params, gmac = PUBLISHED[name]
    options = vars(fitting(NetConfig(arch=name), 0)) | {"img_resolution": 64, "in_channels": 3, "out_channels": 3}  # type: ignore[arg-type]
    kwargs = {k: v for k, v in options.items() if k not in ("arch", "sigma_data")} | {"label_dim": 1000}
    with torch.device("meta"):
        net = build(describe(name, "EDMPrecond", 0.5, kwargs)).eval()
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            net(torch.zeros(1, 3, 64, 64), torch.ones(1), torch.zeros(1, 1000))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == params
    assert round(counted.get_total_flops() / 2e9, 1) == gmac
    if name == "edm2-s":
        assert sum(p.numel() for p in net.parameters()) == 280_209_253


# --- when weights are normalised ---------------------------------------------------------------------------------------


def test_a_pass_in_train_mode_normalises_until_an_update_does() -> None:
    net = EDM2UNet(8, 1, 1, model_channels=16, channel_mult=[1, 2], num_blocks=1)
    x, noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert furthest(net) > 0.01
    net.eval()(x, noise)
    assert furthest(net) > 0.01
    net.train()(x, noise)
    assert furthest(net) < 2e-4
    net.begin_step()
    weights(net)[0].data.mul_(2)
    net(x, noise)
    assert furthest(net) > 0.9
    net.begin_step()
    assert furthest(net) < 2e-4


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes and normalisations of the weights, in their order."""
    seen: list[str] = []
    normalise, forward = EDM2UNet.normalize_weights, EDM2UNet.forward
    monkeypatch.setattr(EDM2UNet, "normalize_weights", lambda net: (seen.append("weights"), normalise(net))[1])

    def watched(net: EDM2UNet, *args: Any) -> Tensor:
        seen.append("student" if torch.is_grad_enabled() else "teacher")
        return forward(net, *args)

    monkeypatch.setattr(EDM2UNet, "forward", watched)
    return seen


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_an_update_normalises_once_before_all_passes(normalised: list[str], micro_batch: int | None) -> None:
    step = made(config(batch_per_device=micro_batch))
    step.update()
    assert normalised == ["weights", *["teacher", "student"] * (2 if micro_batch else 1)]
    (part,) = step.parts()
    assert part == step.update  # what a graph captures


def test_teacher_and_student_see_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """At r = t, with the same noise and mask, they are equal bit for bit, though a step has moved the weights."""
    step = made(config(objective=replace(tiny.config().objective, weighting="uniform")))
    step.net.model.on_ops = False  # the op `levels` has a mapping of its own
    step.update()
    assert furthest(step.net) > 1e-3
    monkeypatch.setattr("ect.objective.Mapping.__call__", lambda mapping, t, stage: t)
    step.gradients()
    assert step.mean_loss == 0 and furthest(step.net) < 2e-4


def test_averages_are_of_the_weights_that_the_optimizer_made() -> None:
    """They are off the sphere, and no later normalisation changes the average."""
    step = made(config())
    step.net.model.begin_step()
    step.state.emas[0].copy_(step.state.params)
    before = step.state.params.clone()
    step.update()
    torch.testing.assert_close(step.state.emas[0], (before + step.state.params) / 2)
    assert furthest(step.net) > 1e-3
    average = step.state.emas[0].clone()
    step.gradients()
    assert torch.equal(step.state.emas[0], average) and furthest(step.net) < 2e-4


def test_micro_batches_are_one_batch_and_a_warm_up_leaves_no_trace() -> None:
    whole, parts = made(config()), made(config(batch_per_device=2))
    start = parts.state.params.clone()
    parts.warm_up()
    assert torch.equal(parts.state.params, start)
    for step in (whole, parts):
        step(0, 1)
    torch.testing.assert_close(parts.mean_loss, whole.mean_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.state.grads, whole.state.grads, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_fast_form_of_a_step_is_the_plain_one() -> None:
    plain, fast = made(config()), made(config())
    plain.net.model.on_ops, fast.net.model.on_ops = False, True
    for step in (plain, fast):
        step(0, 1)
    torch.testing.assert_close(fast.mean_loss, plain.mean_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.state.grads, plain.state.grads, rtol=1e-3, atol=1e-5)


# --- half precision ----------------------------------------------------------------------------------------------------


def seen_dtypes(net: nn.Module, run: Callable[[], object]) -> dict[str, set[torch.dtype]]:
    """The dtypes of each layer's input."""
    found: dict[str, set[torch.dtype]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, set()).add(args[0].dtype)  # type: ignore[misc]
        )
        for name, layer in net.named_modules() if isinstance(layer, MPConv | MPFourier)
    ]  # fmt: skip
    run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_blocks_are_in_half_and_weights_embedding_and_ends_are_not(half: torch.dtype) -> None:
    step = made(replace(config(), precision={torch.float16: "fp16", torch.bfloat16: "bf16"}[half]))
    assert step.state.shadow is None and step.net.half_weights() == set()
    assert [p.data_ptr() for p in step.state.inputs] == [p.data_ptr() for p in step.state.net.parameters()]
    dtypes = seen_dtypes(step.net, lambda: step(0, 1))
    wide = ("emb_fourier", "emb_noise", "emb_linear", "8x8_conv", "out_conv")
    assert len(dtypes) > 20
    for name, found in dtypes.items():
        assert found == {torch.float32 if name.endswith(wide) else half}, name
    assert furthest(step.net) > 1e-3  # the step has moved the fp32 weights
    step.gradients()
    assert furthest(step.net) < 2e-4
    assert seen_dtypes(step.state.net, lambda: step.state.net(torch.zeros(1, 1, 8, 8), 1.0)).keys() == dtypes.keys()


@pytest.mark.slow
def test_fp16_puts_little_more_noise_on_the_signal_than_tf32() -> None:
    """Of a network with gains, as of DDPM++ (benchmarks/precision.py has a trained one); the sums of blocks are in fp32."""
    net = made(config()).net
    noise = {p: signal_noise(net, p, DIGITS.images[:64], levels=(0.3, 1.0, 10.0)) for p in ("fp32", "tf32", "fp16")}
    for t, tf32 in noise["tf32"].items():
        assert 0 < noise["fp32"][t] < 0.01 * tf32 and noise["fp16"][t] <= 1.3 * tf32, t
    dtypes: set[torch.dtype] = set()
    step = made(replace(config(), precision="fp16"))
    for block in step.net.modules():
        if isinstance(block, EDM2Block):
            block.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    step(0, 1)
    assert dtypes == {torch.float32}


def test_the_network_that_is_sampled_stays_in_fp32() -> None:
    step = made(replace(config(), precision="fp16"))
    dtypes = seen_dtypes(step.state.net, lambda: step.state.net.eval()(torch.zeros(1, 1, 8, 8), 1.0))
    assert set.union(*dtypes.values()) == {torch.float32}


# --- the rest ----------------------------------------------------------------------------------------------------------


def test_dropout_is_at_16_and_below() -> None:
    with torch.device("meta"):
        net = EDM2UNet(64, 3, 3, model_channels=64, num_blocks=1, dropout=0.4)
    for name, block in net.named_modules():
        if isinstance(block, EDM2Block):
            size = int(name.split(".")[1].split("x")[0])
            assert block.dropout == (0.4 if size <= 16 else 0.0), name
    layers = [block.layer for block in net.modules() if isinstance(block, EDM2Block)]
    assert sorted(layers) == list(range(len(layers)))


def test_dropout_is_shared_by_key() -> None:
    net = EDM2UNet(**LABELLED | {"label_dim": 0, "dropout": 0.5}).train()
    net.begin_step()
    for name, p in net.named_parameters():
        if name.endswith("gain"):
            nn.init.ones_(p)
    x, noise = torch.randn(4, 1, 8, 8), torch.zeros(4)
    key = MaskKey(torch.tensor(7), 0)
    a = net(x, noise, mask=key)
    assert torch.equal(a, net(x, noise, mask=key))
    assert not torch.equal(a, net(x, noise, mask=MaskKey(torch.tensor(8), 0)))
    torch.testing.assert_close(net(x[2:], noise[2:], mask=MaskKey(key.seed, 2)), a[2:], rtol=1e-4, atol=1e-5)


def test_class_labels() -> None:
    torch.manual_seed(0)
    net = EDM2UNet(**LABELLED, label_dropout=0.5)
    for name, p in net.named_parameters():
        if name.endswith("gain"):
            nn.init.ones_(p)
    x, labels = torch.randn(64, 1, 8, 8), torch.eye(3)[torch.arange(64) % 3]
    with pytest.raises(ValueError, match="class-conditional"):
        net(x, torch.ones(64))
    D = EDM2Precond(net)
    assert not torch.equal(D.eval()(x, 1.0, labels), D(x, 1.0))
    torch.testing.assert_close(D(x, 1.0, torch.zeros(64, 3)), D(x, 1.0))
    assert not torch.equal(D.train()(x, 1.0, labels), D.eval()(x, 1.0, labels))  # some lack their label


@pytest.mark.parametrize("precond", [EDM2Precond, ECM2Precond])
def test_preconditioning_is_the_same_in_both_modes(precond: type[EDM2Precond]) -> None:
    D = precond(EDM2UNet(**LABELLED))
    D.model.begin_step()
    x = torch.randn(2, 1, 8, 8)
    assert D.unet is D.model and D.is_edm and torch.equal(D.train()(x, 0.003), D.eval()(x, 0.003))
    assert D.is_edm and {name.split(".")[0] for name in D.state_dict()} == {"unet"}


def test_magnitudes_stay_at_one() -> None:
    """Of a fresh network's activations, whatever the depth, and a fresh network returns 0."""
    torch.manual_seed(0)
    net = EDM2UNet(16, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=3, attn_resolutions=[8])
    sizes: list[float] = []
    for block in net.modules():
        if isinstance(block, EDM2Block):
            block.register_forward_hook(lambda _, args, out: sizes.append(float(out.detach().square().mean().sqrt())))
    out = net(torch.randn(8, 3, 16, 16), torch.zeros(8))
    assert len(sizes) == 18 and all(0.75 < size < 1.25 for size in sizes) and not out.any()


def test_named_sizes_take_no_others() -> None:
    cfg = fitting(NetConfig(arch="edm2-m"), 0)
    assert (cfg.model_channels, cfg.channel_mult, cfg.num_blocks) == (256, (1, 2, 3, 4), 3)
    assert fitting(NET, 0) == NET
    with pytest.raises(UserError, match=r"--net\.num-blocks 2: expected 3, for which --net\.arch edm2-m stands"):
        fitting(NetConfig(arch="edm2-m", num_blocks=2), 0)
    with pytest.raises(UserError, match=r"--net\.channel-mult 1 2: expected 1 2 3 4"):
        fitting(NetConfig(arch="edm2-m", channel_mult=(1, 2)), 0)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("imagenet64-")])
def test_recipes_for_imagenet(name: str) -> None:
    """Learning rate, gap and lengths at the start and the end are the published ones."""
    cfg = PRESETS[name]
    size, total_img = name.split("-")[1], round(cfg.total_kimg * 1000)
    lr = {"s": 1.0e-3, "m": 0.9e-3, "l": 0.8e-3, "xl": 0.7e-3}[size]
    assert fitting(cfg.net, 0).arch == f"edm2-{size}" and total_img == cfg.batch * 100_000
    assert lr_at(2000 * cfg.batch, cfg.batch, total_img, cfg.optim) == pytest.approx(lr)
    falls = 1.0 if name.endswith("fast") else 1 / math.sqrt(50)
    assert lr_at(total_img, cfg.batch, total_img, cfg.optim) == pytest.approx(lr * falls)
    assert [stage_at(share * total_img // 8, cfg.objective) for share in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert cfg.objective.q**cfg.objective.n_stages == 256
    check(cfg)


def test_augmentation_labels_are_refused() -> None:
    with pytest.raises(UserError, match=r"--net\.arch edm2-narrow: this network has no labels of augmentation"):
        network_spec(NET, "EDMPrecond", DIGITS, 9)
    with pytest.raises(UserError, match=r"augment_dim is 9; EDM2 has no such labels: train it with --data\.augment 0"):
        build({"precond": "EDM2Precond", "unet": "EDM2UNet", "kwargs": {**LABELLED, "augment_dim": 9}})
    with pytest.raises(UserError, match="neither img_channels nor in_channels"):
        build({"precond": "EDM2Precond", "unet": "EDM2UNet", "kwargs": {"img_resolution": 8}})
