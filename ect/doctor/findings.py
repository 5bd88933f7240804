"""Findings: from the records of a phase, a sentence or two a subject."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ect.doctor.records import Phase, Records
from ect.errors import UserError
from ect.files.checkpoint import Checkpoints
from ect.files.resume import refuse_bad_numbers
from ect.show.log import HISTORY, STATS

SPIKE = 10.0  # times the median
_SHOWN = 5  # of a list
_OLD = "not recorded; the log is of an earlier version"


def kimg(nimg: float) -> str:
    return f"{nimg / 1000:g} kimg"


def plain(text: object, most: int = 600) -> str:
    """Return a text from a file on one line, without what a terminal would obey."""
    short = " ".join(str(text)[: 2 * most].split())
    return "".join(letter if letter.isprintable() else "?" for letter in short)[:most]


def some(items: list[str]) -> str:
    """Return the first few of a list."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def of_phase(phase: Phase) -> Iterator[tuple[str, str]]:
    """Yield (subject, what the log says of it) of a phase."""
    yield "rows", rows(phase)
    for name, records in ((STATS, phase.stats), (HISTORY, phase.history)):
        if records.unreadable:
            yield "damage", f"{name} cannot be read ({records.unreadable})"
        if records.damaged:
            count = len(records.damaged)
            yield (
                "damage",
                f"{name}: {count} line(s) hold no record, passed over: {some(list(map(str, records.damaged)))}",
            )
    if phase.rows:
        yield "non-finite steps", nonfinite(phase)
        yield "skipped steps", skipped(phase.stats)
        yield "loss scale", loss_scale(phase.stats)
        yield "gradient norm", gradient_norm(phase.stats)
    yield "restarts", restarts(phase)
    if said := losses(phase):
        yield "lost ranks", said
    if said := targets(phase):
        yield "target", said
    yield "divergence", divergence(phase)


def rows(phase: Phase) -> str:
    found = [row["nimg"] for row in phase.rows]
    if not found:
        return f"none in {STATS}" if phase.stats.there else f"none; there is no {STATS}"
    rated = len(phase.stats.found) - len(found)
    losses = phase.stats.numbers("loss")
    shown = f", the last loss {losses[-1][1]:.4g}" if losses else ""
    return f"{len(found)}, from {kimg(min(found))} to {kimg(max(found))}{shown}" + f"; {rated} of evaluations" * (
        rated > 0
    )


def nonfinite(phase: Phase) -> str:
    stats = phase.stats
    values = int(stats.last("nonfinite") or 0)
    replaced = f"{values:,} gradient values were not finite"
    if not stats.has("bad_steps"):
        lost = [kimg(row["nimg"]) for row in phase.rows if row["loss"] is None]
        return f"{replaced}; bad updates {_OLD}" + f"; no finite loss in the rows at {some(lost)}" * bool(lost)
    bad = [(nimg, count) for nimg, count in stats.numbers("bad_steps") if count > 0]
    where = f", in {len(bad)} row(s): {some([kimg(nimg) for nimg, _ in bad])}" if bad else ""
    return f"{sum(int(count) for _, count in bad)} bad updates{where}; {replaced}"


def skipped(stats: Records) -> str:
    return f"{int(stats.last('skipped') or 0)}" if stats.has("skipped") else "none: no loss scale"


def loss_scale(stats: Records) -> str:
    values = stats.numbers("loss_scale")
    if not values:
        return "none" if not stats.has("loss_scale") else "never a finite number"
    scales = [value for _, value in values]
    return f"{scales[-1]:g} at the end, {min(scales):g} to {max(scales):g} over the rows"


def gradient_norm(stats: Records) -> str:
    norms = stats.numbers("grad_norm")
    if not norms:
        return "never a finite number"
    typical = statistics.median(norm for _, norm in norms)
    largest = dict(norms) | {nimg: norm for nimg, norm in stats.numbers("grad_norm_max") if norm > 0}
    spikes = [f"{norm:.3g} in the row at {kimg(nimg)}" for nimg, norm in largest.items() if norm > SPIKE * typical > 0]
    told = f"{min(norm for _, norm in norms):.3g} to {max(largest.values()):.3g}, median {typical:.3g}"
    return f"{told}; {len(spikes)} spike(s) above {SPIKE:g} medians" + f": {some(spikes)}" * bool(spikes)


def restarts(phase: Phase) -> str:
    if not phase.history.there:
        return _OLD
    resumed = [event for event in phase.history.found if event.get("event") == "resume"]
    told = []
    for event in resumed:
        reached = event.get("reached")
        reached = reached if type(reached) is int and reached < 2**63 else 0
        lost = max(reached - event["nimg"], 0)
        told.append(
            f"at {kimg(event['nimg'])}" + f" after a log up to {kimg(reached)} ({lost:,} images lost)" * (lost > 0)
        )
    return f"{len(resumed)}" + f": {some(told)}" * bool(told)


def losses(phase: Phase) -> str:
    """Return which processes of several were lost, and when."""
    lost = [event for event in phase.history.found if event.get("event") == "lost"]
    told = [f"{plain(event.get('text'), 200)}, at {kimg(event['nimg'])}" for event in lost]
    return some(list(dict.fromkeys(told)))  # without rank 0, each of the others may have written it


def targets(phase: Phase) -> str:
    """Return the evaluations that came to a target of quality, and whether images of other seeds confirmed it."""
    told = []
    for event in phase.history.found:
        if event.get("event") == "target":
            confirmed = "confirmed" if event.get("confirmed") is True else "not confirmed"
            told.append(f"{plain(event.get('target'), 60)} at {kimg(event['nimg'])}, {confirmed}")
    return some(told)


def divergence(phase: Phase) -> str:
    texts = [plain(event.get("text")) for event in phase.history.found if event.get("event") == "diverged"]
    if texts:
        return texts[-1] + f" (and {len(texts) - 1} time(s) before)" * (len(texts) > 1)
    tail = 0
    for row in reversed(phase.rows):
        if row["loss"] is not None:
            break
        tail += 1
    return f"not recorded, but the last {tail} row(s) have no finite loss" if tail else "none"


def checkpoint(folder: Path) -> tuple[Path | None, int, str]:
    """Return (model file of the checkpoint that a resume takes, images seen, what to say of it), read and compared in full."""
    with warnings.catch_warnings(record=True) as passed:
        warnings.simplefilter("always")
        try:
            tensors, meta, model = Checkpoints.load(folder)
            refuse_bad_numbers(tensors, model)
            nimg, healthy = _nimg(meta), Checkpoints.healthy(model)
        except UserError as error:
            return None, 0, f"none: {plain(error)}"
    told = f"{model}, whole, after {kimg(nimg)}, {'healthy' if healthy else 'written after bad updates'}"
    return model, nimg, "; ".join([told, *(plain(warning.message) for warning in passed)])


def _nimg(meta: Any) -> int:
    nimg = meta.get("nimg") if isinstance(meta, dict) else None
    if type(nimg) is not int:
        raise UserError("the checkpoint does not say how many images it has seen")
    return nimg
