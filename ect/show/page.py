"""The report of a run: report.html and report.md in its folder, one page each, and curves.csv.

It is made of what lies in the folder: config.json, results.json, stats.jsonl and the pictures.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ect.config import Config
from ect.files.atomic import atomic
from ect.files.run_folder import load, resolved
from ect.presets import PRESETS
from ect.presets.cifar10 import PUBLISHED
from ect.show import chart, document
from ect.show.chart import Chart
from ect.show.clock import PARTS
from ect.show.curves import CURVES, Curves
from ect.show.document import Block, Code, Heading, Picture
from ect.show.dry_run import command
from ect.show.log import STATS
from ect.show.table import Table

NAMES = ("report.html", "report.md", CURVES)
PRETRAIN = "pretraining"
Json = dict[str, Any]


def write(run_dir: Path, quality: Table | None = None, results: Json | None = None, ending: str = "") -> str:
    """Write the report of a run, and return the names of its files, as a list begins.

    quality: the table of results.md. results: None for those of results.json, which is there already. ending: how the run ended
    before its end. Whatever fails here is said in a warning and ends no run, whose results are saved; the names are none then.
    """
    try:
        if results is None:
            results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
        blocks = list(_Report(run_dir, load(run_dir), results, quality, ending).blocks())
        for name, text in (
            ("report.md", document.markdown(blocks)),
            ("report.html", document.html(f"{run_dir.resolve().name}: report", blocks)),
        ):
            with atomic(run_dir / name) as temp:
                temp.write_text(text, encoding="utf-8")
    except Exception as error:  # a fault of the report's own, too: hours of training do not hang on it
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"{run_dir}: the report cannot be written, the run goes on without ({why})", stacklevel=2)
        return ""
    return "".join(f"{name}, " for name in NAMES if (run_dir / name).is_file())


class _Report:
    """The parts of the page, and what they are made of."""

    def __init__(self, run_dir: Path, cfg: Config, results: Json, quality: Table | None, ending: str) -> None:
        self.run_dir, self.cfg, self.results, self.quality, self.ending = run_dir, cfg, results, quality, ending
        self.splits: dict[str, dict[str, float]] = results["splits"]
        self.main = [*self.splits][-1]
        """The last phase, of which the run's model is."""
        self.target: Json | None = results["target"]
        folders = {phase: run_dir / "pretrain" if phase == PRETRAIN else run_dir for phase in self.splits}
        self.curves = {phase: Curves.read(folder) for phase, folder in folders.items() if (folder / STATS).is_file()}
        self.average = f"ema{cfg.optim.emas[0]}/" if len(cfg.optim.emas) > 1 else ""
        rated = [row for row, phase in zip(results["rows"], results["phases"], strict=True) if phase == self.main]
        self.rated: list[Json] = [row for row in rated if row.get("ema") in (None, cfg.optim.emas[0])]
        """The rows of the model at the end."""
        columns = [*self.rated[0]["mean"]] if self.rated else []
        self.column = self.target["column"] if self.target else columns[0] if columns else None
        self._add_the_end()

    def _add_the_end(self) -> None:
        """Let the curves of the last phase end with the figures of results.json, and write each phase's curves.csv."""
        curves = self.curves.get(self.main)
        if curves is not None and (seen := curves.values["loss"]):
            seconds = sum(self.splits[self.main].values())
            for row in self.rated:
                for name, value in row["mean"].items():
                    curves.add(max(seen), f"{self.average}nfe{row['sampler']['nfe']}/{name}", value, seconds)
        for phase, of in self.curves.items():
            of.write(self.run_dir / "pretrain" if phase == PRETRAIN else self.run_dir)

    def blocks(self) -> Iterator[Block]:
        yield Heading(f"{self.run_dir.resolve().name}, a run of the recipe {self.cfg.preset}", 1)
        if self.ending:
            yield f"{self.ending[0].upper()}{self.ending[1:]}"
        yield self._summary()
        if self.target is not None:
            yield from self._reached(self.target)
        yield Heading("Samples")
        yield from self._samples()
        yield Heading("Quality")
        yield from self._quality()
        yield Heading("Curves")
        yield from self._curves()
        yield Heading("Wall clock")
        yield from self._wall_clock()
        yield Heading("Recipe")
        if self.cfg.preset in PRESETS:
            yield Code(command(self.cfg))
        yield "All options are in config.json."
        yield Heading("Machine")
        yield from self._machine()

    def _summary(self) -> str:
        seconds = sum(sum(split.values()) for split in self.splits.values()) + self.results["seconds"].get(
            "evaluation", 0.0
        )
        curves = self.curves.get(self.main)
        kimg = (
            f"{max(curves.values['loss']) / 1000:g} kimg of {self.main}; " if curves and curves.values["loss"] else ""
        )
        told = f"{kimg}{_took(seconds)} in all."
        figures = [
            f"{self.column} {row['mean'][self.column]:.4g} by {_evaluations(row['sampler']['nfe'])}"
            for row in self.rated
            if self.column in row["mean"]
        ]
        return f"{', '.join(figures)}; {told}" if figures else f"{told[0].upper()}{told[1:]}"

    def _reached(self, target: Json) -> Iterator[Block]:
        """Yield what became of --target."""
        yield Heading("Target")
        confirmed = next((crossing for crossing in target["crossings"] if crossing["confirmed"]), None)
        began = f" of {self.main}, beside what came before it" if len(self.splits) > 1 else ""
        if confirmed is None:
            yield f"{target['text']}, {target['means']}: not reached."
        else:
            first = target["crossings"][0]
            yield (
                f"{target['text']}, {target['means']}: reached. First seen after {first['nimg'] / 1000:g} kimg and "
                f"{_took(first['seconds'])}{began}; confirmed by images of other seeds after "
                f"{confirmed['nimg'] / 1000:g} kimg and {_took(confirmed['second_seconds'])}."
            )
        rows = [
            [f"{c['nimg'] / 1000:g}", f"{c['seconds'] / 60:.2f}", f"{c['figure']:.4g}", f"{c['second_figure']:.4g}",
             "yes" if c["confirmed"] else "no"]
            for c in target["crossings"]
        ]  # fmt: skip
        if rows:
            yield Table(["kimg", "minutes", target["column"], "by other seeds", "confirmed"], rows)

    def _samples(self) -> Iterator[Block]:
        """Yield the last grid by each number of evaluations, and the picture of all samplers."""
        last: dict[int, Path] = {}
        for path in sorted(self.run_dir.glob("nfe*-*.png")):
            number = path.name.partition("-")[0].removeprefix("nfe")
            if number.isdigit():
                last[int(number)] = path
        found = [Picture(path, f"By {_evaluations(nfe)}: {path.name}") for nfe, path in sorted(last.items())]
        if found:
            yield found
        strips = self.run_dir / "samples.png"
        if strips.is_file():
            yield [Picture(strips, "The same noise through each sampler, below images of the data")]

    def _quality(self) -> Iterator[Block]:
        yield f"The table is of {self.rated[0]['samples']:,} images a row." if self.rated else "Nothing was rated."
        if self.quality is not None:
            yield self.quality
        yield from self.results["missing"]
        published = PUBLISHED.get(self.cfg.preset)
        if published is None or not self.results["about"]["data"].startswith("cifar10:"):
            yield "The paper's figures: not measured on this data, or not by this recipe."
            return
        here = {row["sampler"]["nfe"]: row["mean"].get("FID") for row in self.rated}
        rows = [
            [str(nfe), f"{fid:.2f}", "not rated" if here.get(nfe) is None else f"{here[nfe]:.2f}"]
            for nfe, fid in published.fids.items()
        ]
        yield Table(["FID by evaluations", "published", "this run"], rows)
        yield (
            f"Published by {published.source}, of 50,000 images. What this run changed of the recipe is in its command, below."
        )

    def _curves(self) -> Iterator[Block]:
        charts: list[Chart] = []
        for phase, curves in self.curves.items():
            for x, points in (("kimg", curves.over_kimg("loss")), ("minutes", curves.over_minutes("loss"))):
                charts += [Chart(f"Loss of {phase}", x, {"loss": points})] * bool(points)
        charts += self._quality_charts()
        if charts:
            picture = self.run_dir / "curves.svg"
            with atomic(picture) as temp:
                temp.write_text(chart.draw(charts), encoding="utf-8")
            yield [Picture(picture, f"The figures are in {CURVES}; kimg are thousands of training images")]
        else:
            yield f"There are no rows in {STATS} to draw."
        if charts and not any(self.column and self.column in one.title for one in charts):
            yield "Quality has no curve: it takes two ratings, and --log.eval-kimg says how often there is one."

    def _quality_charts(self) -> Iterator[Chart]:
        curves = self.curves.get(self.main)
        if curves is None or self.column is None:
            return
        names = {
            name: _evaluations(int(number))
            for name in curves.values
            if name.startswith(f"{self.average}nfe") and name.endswith(f"/{self.column}")
            and (number := name.removeprefix(f"{self.average}nfe").partition("/")[0]).isdigit()
        }  # fmt: skip
        levels = {self.target["text"]: self.target["figure"]} if self.target else {}
        for x, points in (("kimg", curves.over_kimg), ("minutes", curves.over_minutes)):
            drawn = {shown: points(name) for name, shown in names.items() if len(points(name)) > 1}
            if drawn:
                yield Chart(f"{self.column} of {self.main}", x, drawn, levels)

    def _wall_clock(self) -> Iterator[Block]:
        rated = self.results["seconds"].get("evaluation", 0.0)
        rows = [[phase, *_shown(split)] for phase, split in self.splits.items()]
        rows.append(["this report", *_shown({"evaluation": rated})])
        total = {part: sum(split.get(part, 0.0) for split in self.splits.values()) for part in PARTS}
        total["evaluation"] += rated
        if (every := sum(total.values())) > 0:
            rows += [["together", *_shown(total)], ["share", *(f"{total[part] / every:.0%}" for part in PARTS), "100%"]]
        yield Table(["seconds of", *PARTS, "together"], rows)
        yield (
            "All resumptions together, but not what a kill cost. The start is all before the first step but reading the data."
        )

    def _machine(self) -> Iterator[Block]:
        found = resolved(self.run_dir)
        backends = Counter(found.get("kernels", {}).values())
        ops = [f"{count} op{'s' * (count > 1)} on {backend}" for backend, count in backends.most_common()]
        ways = [name for name in ("compile", "graph") if found.get(name)]
        rows = [
            *([name, fact] for name, fact in self.results["about"].items()),
            ["step", " and ".join(ways) or "plain"],
            ["kernels", ", ".join(ops) or "not recorded"],
        ]
        yield Table(["", ""], rows, left=("",))
        checked: Sequence[str] = self.results["checked"]
        told = "; ".join(line.removeprefix("self-check: ") for line in checked)
        yield f"Self-check: {told or 'not run; by itself it is run on a GPU.'}"


def _shown(split: Mapping[str, float]) -> list[str]:
    return [*(f"{split[part]:.1f}" if part in split else "" for part in PARTS), f"{sum(split.values()):.1f}"]


def _evaluations(nfe: int) -> str:
    return f"{nfe} evaluation{'s' * (nfe > 1)}"


def _took(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 6000 else f"{seconds / 3600:.2f} hours"
