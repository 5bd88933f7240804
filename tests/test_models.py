"""Networks against the golden vectors, published sizes, and the rules of dropout and labels."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from ect.errors import UserError
from ect.models import DhariwalUNet, ECMPrecond, EDMPrecond, SongUNet, build
from ect.models.layers import MaskKey, drop_labels
from tests.golden_data import MANIFEST, load, part, rel_l2

CLASSES = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
NETS = [name for name, case in MANIFEST.items() if case["kind"] == "network"]
TINY = dict(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=[1, 2], num_blocks=1)


@pytest.mark.parametrize("name", NETS)
def test_network_matches_golden(name: str) -> None:
    case, g = MANIFEST[name], load(name)
    net = CLASSES[case["cls"]](**case["kwargs"])
    state = part(g, "state.")
    assert set(state) == set(net.state_dict())
    net.load_state_dict(state)
    x = g["x"].requires_grad_()
    y = net(x, g["noise_labels"], g.get("class_labels"), g.get("augment_labels"))
    assert rel_l2(y.detach(), g["y"]) <= 1e-5
    (y * g["grad_y"]).sum().backward()
    assert rel_l2(x.grad, g["grad_x"]) <= 1e-4
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    assert rel_l2(norms, g["grad_norms"]) <= 1e-4
    grads = {k: p.grad for k, p in net.named_parameters()}
    for key, want in part(g, "grad.").items():
        assert rel_l2(grads[key], want) <= 1e-4, key


@pytest.mark.parametrize("name", ["precond_ecm", "precond_edm"])
def test_precond_matches_golden(name: str) -> None:
    case, g = MANIFEST[name], load(name)
    net = SongUNet(**case["kwargs"])
    D = ECMPrecond(net, case["sigma_data"], case["sigma_min"]) if case["cls"] == "ECMPrecond" else EDMPrecond(net)
    D.load_state_dict(part(g, "state."))
    with torch.no_grad():
        assert rel_l2(D.train()(g["x"], g["sigma"]), g["D_train"]) <= 1e-5
        assert rel_l2(D.eval()(g["x"], g["sigma"]), g["D_eval"]) <= 1e-5


SIZES = {
    "size_ddpmpp_cifar10": dict(img_resolution=32, in_channels=3, out_channels=3),
    "size_ncsnpp_cifar10": dict(img_resolution=32, in_channels=3, out_channels=3),
    "size_adm_imagenet64": dict(img_resolution=64, in_channels=3, out_channels=3, label_dim=1000),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    case = MANIFEST[name]
    kwargs = {k: v for k, v in case.get("kwargs", {}).items() if k != "model_type"}
    with torch.device("meta"):
        cls = DhariwalUNet if "adm" in name else SongUNet
        net = cls(**SIZES[name], **kwargs)
    assert sum(p.numel() for p in net.parameters()) == case["params"]
    assert len(net.state_dict()) == case["keys"]


@pytest.mark.slow
def test_ddpmpp_sizes_with_labels_and_augmentation() -> None:
    def count(**kwargs: int) -> int:
        with torch.device("meta"):
            net = SongUNet(32, 3, 3, channel_mult=[2, 2, 2], **kwargs)
        return sum(p.numel() for p in net.parameters())

    assert count(augment_dim=9) == 55_733_891
    assert count(label_dim=10) == 55_734_147
    assert count(label_dim=10, augment_dim=9) == 55_735_299


def ddpmpp(**kwargs: object) -> ECMPrecond:
    torch.manual_seed(0)
    net = SongUNet(**{**TINY, "attn_resolutions": [4], **kwargs})
    for p in net.parameters():  # leave the near-zero output layers behind
        torch.nn.init.normal_(p, std=0.1)
    return ECMPrecond(net)


def test_ecm_is_the_identity_at_sigma_min_in_eval_mode_only() -> None:
    D, x = ddpmpp(), torch.randn(2, 1, 8, 8)
    assert torch.equal(D.eval()(x, 0.003), x)
    assert not torch.equal(D(x, 0.002), x)
    assert not torch.equal(D.train()(x, 0.003), x)
    assert torch.equal(D(x, 1e-8), x)


def test_sigma_zero_spoils_its_own_sample_only() -> None:
    D = ddpmpp().eval()
    out = D(torch.randn(3, 1, 8, 8), torch.tensor([1.0, 0.0, 2.0]))
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_fresh_network_is_c_skip_x() -> None:
    D, x = EDMPrecond(SongUNet(**TINY)).eval(), torch.randn(2, 1, 8, 8)
    assert (D(x, 0.7) - 0.25 / (0.49 + 0.25) * x).abs().max() < 1e-3


@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.full([2], 0.7), torch.full([2, 1, 1, 1], 0.7)])
def test_sigma_may_have_any_shape(sigma: float | torch.Tensor) -> None:
    D, x = ddpmpp().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    out = D(x, sigma)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, D(x.float(), torch.tensor([0.7, 0.7])))


def test_dropout_is_shared_by_key_and_drawn_without_one() -> None:
    D, x = ddpmpp(dropout=0.2).train(), torch.randn(4, 1, 8, 8)
    key = MaskKey(torch.tensor(7), 0)
    a = D(x, 1.0, mask=key)
    assert torch.equal(a, D(x, 1.0, mask=key))
    assert not torch.equal(a, D(x, 1.0, mask=MaskKey(torch.tensor(8), 0)))
    assert not torch.equal(D(x, 1.0), D(x, 1.0))
    torch.manual_seed(3)
    b = D(x, 1.0)
    torch.manual_seed(3)
    assert torch.equal(b, D(x, 1.0))
    assert torch.equal(D.eval()(x, 1.0), D(x, 1.0))
    # the second half of a batch, named by its global index, has the masks of the whole
    half = D.train()(x[2:], 1.0, mask=MaskKey(key.seed, 2))
    torch.testing.assert_close(half, a[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unet", [SongUNet, DhariwalUNet])
def test_class_labels(unet: type) -> None:
    torch.manual_seed(0)
    net = unet(**TINY, attn_resolutions=[4], label_dim=3, label_dropout=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, labels = torch.randn(64, 1, 8, 8), torch.eye(3)[torch.arange(64) % 3]
    with pytest.raises(ValueError, match="class-conditional"):
        net(x, torch.ones(64))
    D = EDMPrecond(net)
    assert not torch.equal(D.eval()(x, 1.0, labels), D(x, 1.0))
    torch.testing.assert_close(D(x, 1.0, torch.zeros(64, 3)), D(x, 1.0))


def test_label_dropout_drops_whole_rows_at_its_rate() -> None:
    labels = torch.ones(20_000, 3)
    kept = drop_labels(labels, 0.3, MaskKey(torch.tensor(5), 0))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(kept[:, 0], kept[:, 2])
    assert abs(kept[:, 0].mean() - 0.7) < 0.02
    assert torch.equal(drop_labels(labels, 0.3, None), labels)


def test_skip_variants_build_and_run() -> None:
    net = SongUNet(**TINY, attn_resolutions=[4], encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1])
    assert net(torch.randn(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="encoder_type"):
        SongUNet(**TINY, encoder_type="other")


def test_build_from_description() -> None:
    spec = {
        "precond": "ECMPrecond",
        "sigma_min": 0.002,
        "unet": "SongUNet",
        "kwargs": {**TINY, "attn_resolutions": [4]},
    }
    D = build(spec)
    assert isinstance(D, ECMPrecond) and (D.sigma_min, D.sigma_data) == (0.002, 0.5)
    assert (D.img_resolution, D.img_channels, D.label_dim) == (8, 1, 0)
    assert type(build({**spec, "precond": "EDMPrecond"})) is EDMPrecond
    impossible = ({"widht": 3}, {"model_channels": 0}, {"channel_mult": []}, {"channel_mult": [0]})
    for wrong in (
        {"unet": "os.system"},
        {"precond": "VPPrecond"},
        *({"kwargs": {**TINY, **one}} for one in impossible),
    ):
        with pytest.raises(UserError, match=r"unknown|fit"):
            build({**spec, **wrong})


@pytest.mark.parametrize("unet", CLASSES)
def test_what_cannot_run_is_not_built(unet: str) -> None:
    """Whatever the widths: levels, joined ones of the decoder, heads of attention."""
    built, said = 0, set()
    for channels, mult in itertools.product((20, 24, 132, 224), ([1], [1, 2, 3], [3, 1])):
        kwargs = {**TINY, "model_channels": channels, "channel_mult": mult, "attn_resolutions": [8, 4, 2]}
        try:
            with torch.device("meta"):
                net = build({"precond": "EDMPrecond", "unet": unet, "kwargs": kwargs})
                assert net(torch.zeros(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)
            built += 1
        except UserError as error:
            said |= {*re.findall(r"does not fit \w+: \d+ channels do not divide into \d+ (groups|heads)", str(error))}
    assert built > 3 and said == ({"groups", "heads"} if unet == "DhariwalUNet" else {"groups"})


def test_fourier_frequencies_follow_the_checkpoint() -> None:
    net = SongUNet(**TINY, embedding_type="fourier")
    net.load_state_dict({**net.state_dict(), "map_noise.freqs": torch.ones(4)})
    assert torch.equal(net.map_noise.freqs, torch.ones(4))
