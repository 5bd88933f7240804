"""No command opens a connection unless an option asks for it: whole commands, under a hook of Python's that refuses sockets."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ect import evaluate, sample, train
from ect.convert import __main__ as convert
from ect.files.model_file import save_model
from ect.models import build
from tests import edm_files as edm

NETWORK = ("socket.__new__", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
SMALL: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "img_resolution": 8, "label_dim": 0, "model_channels": 8, "channel_mult": [1],
    "num_blocks": 1, "attn_resolutions": [], "dropout": 0.1,
}  # fmt: skip
SPEC = {"precond": "EDMPrecond", "sigma_data": 0.5, "unet": "SongUNet", "kwargs": SMALL}
TINY = [
    "--batch", "8", "--total-kimg", "0.016", "--net.model-channels", "8", "--net.channel-mult", "1", "--net.num-blocks", "1",
    "--pretrain-kimg", "0.008", "--eval.samples", "0", "--objective.n-stages", "1", "--device", "cpu",
]  # fmt: skip
tried: list[str] | None = None  # None: the hook, which cannot be taken off, does nothing


def refuse(event: str, args: tuple[Any, ...]) -> None:
    if tried is not None and (event in NETWORK or event in ("subprocess.Popen", "os.system", "os.posix_spawn")):
        tried.append(event)  # another program would not be under the hook
        raise PermissionError(f"forbidden here: {event}")


@functools.cache
def hook() -> None:
    sys.addaudithook(refuse)


@pytest.fixture
def shut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The attempts to open a connection, or to start another program; all are refused."""
    global tried
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    hook()
    tried = []
    try:
        yield tried
    finally:
        tried = None


def test_the_hook_refuses_what_it_should(shut: list[str]) -> None:
    for attempt in (
        socket.socket,
        lambda: socket.getaddrinfo("localhost", 80),
        lambda: urllib.request.urlopen("http://127.0.0.1:9"),
    ):
        with pytest.raises(OSError, match="forbidden here"):
            attempt()
    assert shut == ["socket.__new__", "socket.getaddrinfo", "urllib.Request"]


@pytest.mark.slow
def test_every_command_works_on_local_files_without_the_network(shut: list[str]) -> None:
    Path("public.pkl").write_bytes(edm.edm_snapshot(edm.from_net(build(SPEC), SPEC)))
    train.main([*TINY, "--run-dir", "run"])
    train.main(["--resume", "run"])
    convert.main(["public.pkl", "public.safetensors"])
    sample.main(["run", "--count", "2", "--device", "cpu"])
    sample.main(["public.safetensors", "--count", "2", "--heun", "2", "--device", "cpu", "--out", "images"])
    evaluate.main(["run", "--samples", "20", "--repeats", "1", "--device", "cpu"])
    assert shut == [] and Path("samples.png").is_file() and len(list(Path("images").rglob("*.png"))) == 2


def test_weights_of_metrics_are_fetched_only_where_an_option_says_so(
    shut: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    net = build(SPEC)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_model(Path("model.safetensors"), net.state_dict(), {**SPEC, "precond": "ECMPrecond"}, {"data": "photos"})
    Path("photos").mkdir()
    for i in range(4):
        Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(f"photos/{i}.png")
    command = ["model.safetensors", "--data", "photos", "--samples", "4", "--repeats", "1", "--device", "cpu"]
    for options, attempts, says in (
        (["--run-dir", "first"], set(), "--download does so"),
        (["--run-dir", "second", "--download"], {"urllib.Request"}, "and the download failed"),
    ):
        shut.clear()
        with contextlib.suppress(SystemExit):  # none of the columns can be computed
            evaluate.main([*command, *options])
        shown = capsys.readouterr()
        assert set(shut) == attempts and says in " ".join((shown.out + shown.err).split())
