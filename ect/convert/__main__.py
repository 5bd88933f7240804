"""python -m ect.convert model.pkl model.safetensors makes a model file of a public EDM or ECT snapshot, executing nothing."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ect.errors import UserError
from ect.files import edm_pickle
from ect.files.edm_pickle import Snapshot
from ect.files.fit import check_finite
from ect.files.model_file import check_fits, save_model
from ect.ranks.distributed import World
from ect.ranks.launch import launch


@dataclass(frozen=True)
class Options:
    """Convert an EDM or ECT snapshot (.pkl) to a model file (.safetensors). Code in the snapshot is never executed."""

    source: tyro.conf.Positional[Path]
    """The snapshot, e.g. edm-cifar10-32x32-uncond-vp.pkl or network-snapshot-000100.pkl."""
    destination: tyro.conf.Positional[Path]
    """The file to write; its name ends in .safetensors."""
    key: str = "ema"
    """The network of the snapshot to convert: 'ema' has the averaged weights."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        print(report(convert(options)))
        print(f"wrote {options.destination}")
        return 0

    if status := launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.convert"), work):
        raise SystemExit(status)


def convert(options: Options) -> Snapshot:
    """Read the snapshot, check it, write the model file, and return the snapshot.

    Raises UserError on a snapshot that cannot be read, does not fit or is not finite (`UnsafePickle` on hostile content), and
    on a destination of another name than *.safetensors. Nothing is written then.
    """
    source, destination = options.source.expanduser(), options.destination.expanduser()
    if destination.suffix != ".safetensors":
        raise UserError(f"{destination}: the file to write must be named *.safetensors")
    snapshot = edm_pickle.read(source, options.key)
    check_fits(snapshot, str(source))
    check_finite(snapshot.state, str(source))  # which no command would read
    save_model(destination, snapshot.state, snapshot.spec, snapshot.info)
    return snapshot


def report(snapshot: Snapshot) -> str:
    """Say in a few lines what was found: networks, weights, checksums, licence."""
    spec, info = snapshot.spec, snapshot.info
    numel = sum(tensor.numel() for tensor in snapshot.state.values())
    kwargs = ", ".join(f"{name}={value!r}" for name, value in spec["kwargs"].items())
    return "\n".join(
        [
            f"{info['source']}: {spec['precond']} around {spec['unet']}({kwargs})",
            f"{numel:,} weights in {len(snapshot.state)} tensors; all finite: yes",
            f"sha256 of the file: {info['sha256']}",
            f"sha256 of the embedded source, which was not executed: {info['source_sha256']}",
            f"licence: {info['license']}",
        ]
    )


if __name__ == "__main__":
    main()
