from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from ect.errors import UserError
from ect.metrics.weights import INCEPTION, VGG16, Unavailable, WeightFile, read_state


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    return tmp_path / "torch-home"


def test_weights_come_from_path_cache_or_download(tmp_path: Path, torch_home: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(b"weights")
    file = WeightFile("Some", "--some", "some.pth", source.as_uri(), 1)
    with pytest.raises(
        Unavailable, match=r"Some weights not found: pass --some PATH, or put some\.pth.*--download does so"
    ):
        file.find(None, download=False)
    assert file.find(source, download=False) == source
    downloaded = file.find(None, download=True)
    assert downloaded == torch_home / "hub" / "checkpoints" / "some.pth"
    assert downloaded.read_bytes() == b"weights"
    source.unlink()
    assert file.find(None, download=True) == downloaded  # from the cache
    downloaded.unlink()
    with pytest.raises(Unavailable, match=r"not found, and the download failed .*: pass --some PATH"):
        file.find(None, download=True)
    assert list(downloaded.parent.iterdir()) == []


def test_truncated_download_is_not_kept(tmp_path: Path, torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response(io.BytesIO):
        headers = {"Content-Length": "10"}  # noqa: RUF012

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(b"12345"))
    with pytest.raises(Unavailable, match=r"failed \(.*https://x/some\.pth ended after 5 of 10 bytes"):
        WeightFile("Some", "--some", "some.pth", "https://x/some.pth", 1).find(None, download=True)
    assert list((torch_home / "hub" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds list, expected a plain state dict"),
        ({}, "holds dict, expected a plain state dict"),
        ({"epoch": 3}, "entry 'epoch' is int"),
        ({"a": torch.tensor([0.0, float("nan")])}, "a holds NaN or infinite values"),
    ],
)
def test_other_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        read_state(tmp_path / "file.pth")


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(UserError, match="cannot be read safely"):
        read_state(tmp_path / "file.pth")


def test_file_names_are_torch_fidelitys_and_torchvisions() -> None:
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert INCEPTION.url == URL_INCEPTION_V3
    assert VGG16.url == torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    assert all(file.url.endswith(f"/{file.filename}") for file in (INCEPTION, VGG16))
