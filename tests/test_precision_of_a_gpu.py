"""What torch is told of arithmetic, and which arithmetic a GPU has, on a mocked one."""

from __future__ import annotations

import pytest
import torch

from ect import precision
from ect.errors import UserError

GPU = torch.device("cuda")
CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_every_switch_is_set_whatever_it_was(name: str, before: bool) -> None:
    """Sums of half-precision products stay fp32 in every precision: consistency tuning learns from a small difference."""
    halves = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    for where, switch in ((CUDNN, "allow_tf32"), (CUDNN, "benchmark"), *((MATMUL, s) for s in ("allow_tf32", *halves))):
        setattr(where, switch, before)  # a fixture of conftest.py puts it back
    precision.apply(precision.PRECISIONS[name])
    assert (CUDNN.allow_tf32, MATMUL.allow_tf32) == (name == "tf32",) * 2
    assert [getattr(MATMUL, switch) for switch in halves] == [False, False]
    assert CUDNN.benchmark is True


def test_a_precision_is_what_its_name_says() -> None:
    assert {p.name: (p.half, p.tf32, p.loss_scale) for p in precision.PRECISIONS.values()} == {
        "fp32": (None, False, None),
        "tf32": (None, True, None),
        "fp16": (torch.float16, False, 65536.0),
        "bf16": (torch.bfloat16, False, None),
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (7, 5))
    return monkeypatch


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_an_arithmetic_that_the_gpu_lacks_is_refused(gpu: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=rf"--precision {name}: Tesla T4 \(sm_75\) has no {name}.*fp16 or fp32"):
        precision.resolve(name, GPU)
    assert precision.resolve(name, torch.device("cpu")).name == name, "a CPU emulates it"
    gpu.setattr(torch.cuda, "get_device_capability", lambda d=None: (8, 0))
    assert precision.resolve(name, GPU).name == name


@pytest.mark.parametrize(("name", "found"), [("auto", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")])
def test_the_others_run_anywhere(gpu: pytest.MonkeyPatch, name: str, found: str) -> None:
    assert precision.resolve(name, GPU).name == found


@pytest.mark.parametrize(("capability", "found"), [((7, 5), "fp32"), ((8, 6), "TF32"), ((12, 0), "TF32")])
def test_tf32_products_are_named_where_they_are(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], found: str
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda d=None: capability)
    with precision.sampling(precision.PRECISIONS["fp16"]):
        assert precision.products(GPU) == found
