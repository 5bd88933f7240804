"""Files of a stranger, given to the commands: nothing in them runs, and each is refused in one sentence, in little time and
memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ect import evaluate, sample, train
from ect.config import DataConfig
from ect.convert import __main__ as convert
from ect.data import load
from ect.data.readers import cifar10
from ect.errors import UserError
from ect.files import model_file
from ect.files.checkpoint import load_model
from ect.files.model_file import save_model
from ect.metrics.weights import read_state
from ect.models import build
from tests import edm_files as edm
from tests.edm_files import SMALL, Call
from tests.fuzz.bounded import executing_nothing

SECONDS, BYTES = 5, 1 << 30
DEEP = 200_000
TUPLES = b")" + b"\x85" * DEEP
SPEC: dict[str, Any] = {
    "precond": "ECMPrecond",
    "sigma_data": 0.5,
    "sigma_min": 0.002,
    "unet": "SongUNet",
    "kwargs": SMALL,
}
SAME_HASH = (
    b"}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(60_000)) + b"u"
)
MEMOS = b"N" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(30_000))


def raw(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def saved(body: bytes) -> bytes:
    """A file of torch.save around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", raw(body))
    return file.getvalue()


def model(header: object, tensors: dict[str, torch.Tensor] | None = None) -> Callable[[Path], None]:
    """A .safetensors file with this description, as text or as JSON; by default with the weights of SPEC."""
    text = header if isinstance(header, str) else json.dumps(header)
    return lambda path: save_file(weights() if tensors is None else tensors, path, {"ect": text})


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in build(SPEC).state_dict().items()} | changes


def described(**changes: Any) -> dict[str, Any]:
    return {"format": 1, "spec": {**SPEC, **changes}, "info": {}}


def built(**changes: Any) -> dict[str, Any]:
    return described(kwargs={**SMALL, **changes})


def cifar(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for i in range(1, 6):
                member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    return write


def link(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info.tobuf()


def statistics(path: Path) -> None:
    np.savez(path, mu=np.array([Call(os.mkdir, str(path.parent / "executed"))], dtype=object), sigma=np.zeros(1))


def huge_statistics(path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1048576, 1048576), }\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu.npy", "sigma.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


MODELS: dict[str, Callable[[Path], None]] = {
    "brackets": model("[" * DEEP),
    "objects": model('{"a":' * DEEP),
    "format infinite": model('{"format": 1e999, "spec": {}, "info": {}}'),
    "format text": model('{"format": "x", "spec": {}, "info": {}}'),
    "sigma_data text": model(described(sigma_data="abc")),
    "sigma_data list": model(described(sigma_data=[1])),
    "sigma_data 0": model(described(sigma_data=0)),
    "sigma_data NaN": model(described(sigma_data=float("nan"))),
    "sigma_data huge": model(described(sigma_data=10**4000)),
    "sigma_min": model(described(sigma_min=-1)),
    "sigma_min object": model(described(sigma_min={})),
    "unet list": model(described(unet=["x"])),
    "unet object": model(described(unet={})),
    "unet nested": model(f'{{"format": 1, "spec": {{"unet": {"[" * 500}{"]" * 500}}}, "info": {{}}}}'),
    "precond": model(described(precond=[["EDMPrecond"]])),
    "kwargs list": model(described(kwargs=[1])),
    "kwargs missing": model({"format": 1, "spec": {"precond": "EDMPrecond", "unet": "SongUNet"}, "info": {}}),
    "kwargs unknown": model(built(eval="1")),
    "many blocks": model(built(num_blocks=10**7), {"x": torch.zeros(1)}),
    "many levels": model(built(channel_mult=[1] * 200_000), {"x": torch.zeros(1)}),
    "as many as may be": model(built(num_blocks=24, channel_mult=[1] * 8, img_resolution=1024), {"x": torch.zeros(1)}),
    "wide": model(built(model_channels=10**9)),
    "float channels": model(built(model_channels=8.0)),
    "text resolution": model(built(img_resolution="8")),
    "dropout": model(built(dropout=2)),
    "NaN weights": model(described(), weights(**{"model.map_layer0.bias": torch.full((32,), float("nan"))})),
    "mid_t": model({**described(), "info": {"mid_t": ["a"]}}),
    "header beyond the file": lambda path: path.write_bytes(b"\xff" * 7 + b"\x0f" + b"{}") and None,
    "git-lfs": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 1\n") and None,
}  # fmt: skip
SNAPSHOTS: dict[str, bytes] = {
    "deep key": raw(b"}" + TUPLES + b"Ns"),
    "same hash": raw(SAME_HASH),
    "memo": raw(MEMOS),
    "a million instructions": raw(b"N0" * (1 << 20)),
    "long keys": raw(b"}X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"Ns"),
    "set of tuples": raw(b"\x8f(" + TUPLES + b"\x90"),
    "inst": raw(b"(S'echo'\niposix\nsystem\n"),
    "web page": b"<html><body>404</body></html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
    "state dict": pickle.dumps({"a.weight": torch.ones(2)}, 4),
    "path": pickle.dumps({"ema": Path("x")}, 4),
    "many blocks": edm.dump({"ema": edm.small_net({**SMALL, "num_blocks": 10**7})}),
    "sigma_data 0": edm.dump({"ema": edm.with_state(edm.small_net(), sigma_data=0)}),
    "as many as may be": edm.dump({"ema": edm.small_net({**SMALL, "num_blocks": 24, "channel_mult": [1] * 8})}),
    "code in a storage": edm.dump(
        {"ema": edm.small_net(weight=edm.View(edm.Storage(edm.blob_of(Call(os.system, "true"))), 0, (1,), (1,)))}
    ),
    "class of a value": raw(b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\n\x8c\x09__class__tR"),
    "copyreg": raw(b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR"),
    "extension": raw(b"\x82\x01"),
    "buffer": b"\x80\x05\x97\x98.",
    "name from the memo": raw(b"\x8c\x02os\x94\x8c\x06system\x940\x68\x00\x68\x01\x93\x8c\x04true\x85R"),
    "name with dots": raw(b"\x8c\x0btorch.Size.\x8c\x0c__init__.__x\x93"),
}
WEIGHTS: dict[str, bytes] = {
    "deep key": saved(b"}" + TUPLES + b"Ns"),
    "deep": saved(TUPLES),
    "same hash": saved(SAME_HASH),
    "memo": saved(MEMOS),
    "inst": saved(b"(S'echo'\niposix\nsystem\n"),
    "git-lfs": SNAPSHOTS["git-lfs"],
    "empty": b"",
    "objects of numpy": saved(b"cnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R"),
    "code in old form": b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {}))
    + raw(b"cos\nsystem\n\x8c\x04true\x85R"),
    "hooks": saved(b"ctorch._utils\n_rebuild_parameter\n(NI01\n}\x8c\x01acos\nsystem\nstR"),
}
TARS: dict[str, Callable[[Path], None]] = {
    "deep key": cifar(raw(b"}" + TUPLES + b"Ns")),
    "same hash": cifar(raw(SAME_HASH)),
    "deep": cifar(raw(TUPLES)),
    "code": cifar(raw(b"cposix\nsystem\n\x8c\x04echo\x85R")),
    "damaged": lambda path: path.write_bytes(b"\x1f\x8b" + bytes(100)) and None,
    "of images": lambda path: tarfile.open(path, "w").close(),
    "a link out": lambda path: path.write_bytes(b"".join(link(name) for name in cifar10.BATCHES) + bytes(1024)) and None,
}  # fmt: skip


def check(capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], Any], *arguments: object) -> str:
    """The sentence with which a command refuses its arguments."""
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with executing_nothing():
        try:
            status = command([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    assert time.process_time() - begin < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < BYTES
    _, err = capsys.readouterr()
    assert status == 2 and len(err.splitlines()) == 1 and "Traceback" not in err
    assert err.startswith("error: ") and err.strip().isprintable()
    return err


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"file.safetensors", "file.pkl", "file.pth", "file.tar", "file.npz", "home", "digits.safetensors"}, (
        left
    )


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    MODELS[name](path)
    assert "file.safetensors" in check(capsys, sample.main, path, "--count", 1, "--device", "cpu") or name == "mid_t"


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(SNAPSHOTS[name])
    assert f"{path}: " in check(capsys, convert.main, path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(WEIGHTS[name])
    with executing_nothing(), pytest.raises(UserError, match=r"cannot be read safely|holds tuple"):
        read_state(path)


@pytest.mark.parametrize("name", TARS)
def test_tarballs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.tar"
    TARS[name](path)
    arguments = ["--data.source", path, "--device", "cpu", "--net.channel-mult", 1]
    assert f"{path}" in check(capsys, train.main, *arguments)


@pytest.mark.parametrize("write", [statistics, huge_statistics])
def test_statistics(write: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, net = tmp_path / "file.npz", tmp_path / "digits.safetensors"
    write(path)
    save_model(net, weights(), SPEC, {})
    arguments = [net, "--reference", path, "--no-download", "--device", "cpu", "--run-dir", tmp_path / "home"]
    assert f"--reference {path}: cannot be read" in check(capsys, evaluate.main, *arguments)


@pytest.mark.parametrize("name", ["set.zip", "x.tar.gz", "train-images-idx3-ubyte", "m.safetensors", "m.pkl", "m.pth"])
def test_a_pointer_of_git_lfs_is_named_by_every_reader(
    name: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path_factory.mktemp("lfs") / name
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    read = {".safetensors": load_model, ".pkl": load_model, ".pth": read_state}.get(path.suffix)
    with pytest.raises(UserError, match=r"git-lfs pointer|not an IDX file"):
        read(path) if read else load(DataConfig(str(path)))


def test_a_model_that_is_whole_is_read_and_a_flipped_bit_in_it_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_model(path, weights(), SPEC, {})
    load_model(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged: its weights are not those that were written"):
        load_model(path)
    assert model_file.read_model_file(path, weights=False).spec == SPEC


def test_there_are_enough() -> None:
    assert len(MODELS) + len(SNAPSHOTS) + len(WEIGHTS) + len(TARS) + 2 >= 60
