"""python -m ect.doctor RUN prints what happened to a run, from what its folder holds; it changes nothing there."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ect.config import Config
from ect.doctor.findings import checkpoint, kimg, of_phase, plain
from ect.doctor.records import Phase
from ect.errors import UserError
from ect.files import kept
from ect.files.lock import holder
from ect.files.run_folder import CONFIG, load
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.show.log import HISTORY, STATS


@dataclass(frozen=True)
class Options:
    """Say what happened to a run: rows, bad and skipped steps, restarts, divergence, and the checkpoint to go on from."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the folder is none of a run."""

    def work(options: Options, world: World) -> int:
        for line in examine(options.run):
            print(line)
        return 0

    if status := launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.doctor"), work):
        raise SystemExit(status)


def examine(path: Path) -> Iterator[str]:
    """Yield the lines to print. Raises UserError where `path` is no folder of a run."""
    folder = path.expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run")
    cfg, problem = _configuration(folder)
    phases = [Phase.read(place) for place in (folder / "pretrain", folder) if place.is_dir()]
    if cfg is None and not any(_ours(phase) for phase in phases):
        raise UserError(f"{path}: not the folder of a run: it has no {CONFIG} of one, no {STATS} and no checkpoint")
    yield _line("run", f"{folder}" + (f", preset {plain(cfg.preset, 60)}" if cfg is not None else ""))
    if problem:
        yield _line("damage", problem)
    best: tuple[Path | None, int, str] = (None, 0, "none")
    for phase in phases:
        if phase.folder != folder and not _ours(phase):
            continue
        if len(phases) > 1:
            yield f"{'pretraining' if phase.folder != folder else 'the run itself'}:"
        for subject, said in of_phase(phase):
            yield _line(subject, said)
        found = checkpoint(phase.folder)
        yield _line("checkpoint", found[2])
        if found[0] is not None or any(phase.folder.glob("checkpoint-*.json")):  # a resume takes that phase, or none
            best = found
    if cfg is not None:
        yield _line("averages", _averages(folder, cfg))
    yield _line("state", _state(folder, phases[-1], phases, best[1], cfg))
    yield _line("next", _advice(folder, phases, best, cfg))


def _line(subject: str, said: str) -> str:
    return f"{subject + ':':<18}{said}"


def _configuration(folder: Path) -> tuple[Config | None, str]:
    """Return the options of the run and, where they cannot be read, why."""
    if not (folder / CONFIG).is_file():
        return None, f"there is no {CONFIG}"
    try:
        return load(folder), ""
    except UserError as error:
        return None, plain(error)


def _averages(folder: Path, cfg: Config) -> str:
    named = plain(", ".join(cfg.optim.emas), 200)
    try:
        found = kept.averages(folder)
    except UserError:
        return named
    return f"{named}; {len(found)} kept by power profiles, up to {kimg(found[-1].nimg)}"


def _ours(phase: Phase) -> bool:
    return bool(phase.stats.found or phase.history.found) or any(phase.folder.glob("checkpoint-*.json"))


def _finished(phase: Phase, nimg: int, cfg: Config | None) -> bool:
    """Say whether a phase came to its end: by its history, else by its last checkpoint."""
    if phase.ending is not None:
        return phase.ending["event"] == "end"
    return not phase.history.there and cfg is not None and nimg + 0.5 >= cfg.total_kimg * 1000


def _state(folder: Path, main: Phase, phases: Sequence[Phase], nimg: int, cfg: Config | None) -> str:
    if (who := holder(folder)) is not None:
        return f"a process trains in it now: {plain(who, 200)}"
    last = next((phase for phase in reversed(phases) if phase.history.found), main)
    where = f"at {kimg(last.history.found[-1]['nimg'])}" if last.history.found else ""
    of_pretraining = " of the pretraining" * (last is not main)
    ending = last.ending
    if _finished(main, nimg, cfg):
        report = (folder / "results.json").is_file()
        return "finished" if report else "trained to its end; its report is missing, and a resume makes it"
    if ending is None and last.history.found:
        return f"it ended without a word: killed, or its machine stopped, after {kimg(last.reached)}{of_pretraining} or later"
    if ending is None:
        return f"not finished; the log has no {HISTORY}, which would say how it ended"
    how = {"stop": "stopped by a signal", "diverged": "diverged", "failed": "ended by an error", "end": "ended"}
    how["lost"] = "ended because a rank was lost"
    text = f": {plain(ending.get('text'))}" if ending["event"] in ("failed", "lost") else ""
    return f"{how[ending['event']]} {where}{of_pretraining}{text}"


def _advice(folder: Path, phases: Sequence[Phase], best: tuple[Path | None, int, str], cfg: Config | None) -> str:
    run, model = shlex.quote(str(folder)), best[0]
    if holder(folder) is not None:
        return "wait for it, or stop it: Ctrl-C or SIGTERM saves"
    if model is None:
        return "no checkpoint can be used; start a new run"
    if any(phase.ending is not None and phase.ending["event"] == "diverged" for phase in phases):
        kept = shlex.quote(str(model))
        return f"python -m ect.train --init-from {kept}, with the options of the run and a lower --optim.lr or --optim.clip 1"
    if _finished(phases[-1], best[1], cfg) and (folder / "results.json").is_file():
        return f"python -m ect.sample {run}"
    if cfg is None:
        return f"python -m ect.sample {run}; without its {CONFIG} it cannot be resumed"
    again = max(phases[-1].reached - best[1], 0) if model.parent == phases[-1].folder else 0
    return f"python -m ect.train --resume {run}" + f" (it repeats {again:,} images)" * (again > 0)


if __name__ == "__main__":
    main()
