"""A ledger of recipes: what quality each reaches, and after how many core-seconds, or GPU-seconds, since the teacher.

    python benchmarks/ledger.py --data digits --recipes published q64       # trains what is not recorded, then reports
    python benchmarks/ledger.py --data digits --report                      # trains nothing
    python benchmarks/ledger.py --data digits --report --until 25 --nfe 2   # the time to a target
    python benchmarks/ledger.py --check                                     # asserts the claims by the recorded lines

A recipe is a list of ect.train's options (benchmarks/lib/recipes.py). Each line of the results file is a recipe on a data set
with a seed and a length. All recipes of a seed start from one diffusion model, the teacher, and see the same images and noise.
A recorded line is not trained again, unless --again asks for it or its recipe has other options now. A command that was
stopped goes on where it was. Several may run at a time, on different seeds.

What is charged: the steps of the tuning, in seconds of the processor (of all threads) or of the GPU, and what the recipe rests
on, such as features of the data. What is not: the teacher, evaluation, checkpoints, the start. Other work slows a core down, so
each run also times one forward pass of its network again and again. Costs are compared in these passes, and shown in seconds of
the quickest pace that the lines of a data set have.

The rules, stated before any line was recorded:

1. Seeds: 5 on digits, 3 on fashion16, 2 on fashion28. Fewer decide nothing.
2. A figure is the FDc at the end of a run, where its rate has fallen. A run is compared with the shortest run of the base
   recipe, `published`, on that seed that costs as much, within a tenth. A run that is dearer than all of those is compared
   with none: train the recipe shorter, by --lengths.
3. A recipe wins on a data set, at 1 or at 2 evaluations, where the 95 % interval of its ratio to `published` (Student's t of
   the logarithms, paired by seed) lies below 1. Beside it stands the sign test, which 5 seeds bring to .06 at best.
4. It becomes a default only where it wins at 1 and at 2 evaluations on every data set that it was tried on. Else it is a preset
   with the figures for it and against.
5. A target is reached at the first evaluation at or below it. A later rise does not undo that, and nothing is interpolated.
6. Nothing is left out: every line that was trained is recorded, and every recipe of the file is in the table.
7. Many recipes are compared, so some win by luck: the best on one data set is a candidate for the next, not a finding.

Columns of the table: cost; FDc as mean +- standard deviation over seeds; its ratio to `published` at equal cost as geometric
mean, interval, seeds in favour, p of the sign test, or "dearer"; and the share of the cost of `published` at which its own
final FDc was reached, at 1 / 2 evaluations (median over seeds).

The long runs, on two cores, a process a core; docs/recipes.md has what they will take, by --pilot:

    python benchmarks/ledger.py --data digits --seeds 0 1 2                                  # 2.4 core-hours
    python benchmarks/ledger.py --data digits --seeds 3 4                                    # 1.6
    python benchmarks/ledger.py --data digits --lengths 0.5 --recipes published q64          # 0.2
    python benchmarks/ledger.py --data fashion16 --seeds 0 --recipes diffusion published q64 # 0.4, and 0.1 a further recipe
    python benchmarks/ledger.py --data fashion28 --seeds 0 --recipes diffusion published q64 # 5.1, and 1.6 a further recipe
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lib import claims, ledger_lines, ledger_pilot, ledger_report
from lib.ledger_lines import RESULTS, Key
from lib.ledger_run import Bench
from lib.measure import reason
from lib.options import command, tyro_options
from lib.recipes import RECIPES
from rich.console import Console

from ect.config import ABOVE_0, FROM_1, NUMBER, SEED, THREADS, Limit, at_most
from ect.errors import UserError
from ect.show.table import Table

SMOKE = ("published", "q64")
SMOKE_SEED = 0
STOPPED = 130
"""Exit status after Ctrl-C, as a shell has it."""
ELSEWHERE = 1.5
"""On another machine, or with another torch, a short run's FDc may be so many times the recorded one."""
ALIKE = 1e-3
"""On the same it may differ by this share."""


SEEDS = Limit("one or more seeds from 0 to 2^31 - 1", lambda seeds: len(seeds) > 0 and all(map(SEED.holds, seeds)))
LENGTHS = Limit("lengths above 0 and up to 1,000", lambda lengths: lengths and all(0 < x <= 1000 for x in lengths))


@dataclass(frozen=True)
class Options:
    data: Literal["digits", "fashion16", "fashion28", "smoke"] = "digits"
    """The data set, with its network and the length of its runs."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Names of recipes; `diffusion` rates the teacher by 35 evaluations."""
    seeds: Annotated[tuple[int, ...], SEEDS] = (0, 1, 2, 3, 4)
    lengths: Annotated[tuple[float, ...], LENGTHS] = (1.0,)
    """Lengths of the tuning, as factors of the data set's. Stages and decay stretch with it."""
    again: bool = False
    """Train also what is recorded."""
    report: bool = False
    """Train nothing: report what is recorded of all recipes, seeds and lengths."""
    until: Annotated[float | None, ABOVE_0, NUMBER] = None
    """Also say when each recipe first had an FDc of at most this, at --nfe evaluations."""
    nfe: Literal[1, 2] = 2
    plot: Path | None = None
    """Draw quality over time into this file (.png)."""
    markdown: bool = False
    """Print tables in Markdown."""
    check: bool = False
    """Assert the recorded claims, and exit 1 unless they hold. Trains nothing."""
    smoke: bool = False
    """Train two recorded lines of the data set `smoke` again, in a temporary folder, and exit 1 unless they come out alike."""
    pilot: Annotated[int | None, FROM_1, at_most(10**6)] = None
    """Time so many steps of each phase, say what the runs of the data set will take, and train nothing."""
    threads: Annotated[int, FROM_1, THREADS] = 1
    results: Path = RESULTS
    folder: Path = Path("runs/ledger")
    """The folder in which teachers and runs are kept."""


def refuse(options: Options) -> None:
    """Raise UserError for options that name nothing."""
    for recipe in options.recipes:
        if recipe not in RECIPES:
            raise UserError(f"--recipes {recipe}: no such recipe; known: {', '.join(RECIPES)}")
    if not options.recipes:
        raise UserError("--recipes: expected one or more")
    if (options.report or options.check or options.smoke) and not options.results.is_file():
        raise UserError(
            f"--results {options.results}: no such file; train first, without --report, --check and --smoke"
        )


def train(options: Options) -> bool:
    """Train and record what is not recorded; return whether all of it came to its end."""
    recorded = ledger_lines.read(options.results)
    keys: list[Key] = [(options.data, r, x, s) for s in options.seeds for r in options.recipes for x in options.lengths]
    missing = [key for key in keys if options.again or key not in recorded]
    if not missing:
        return True
    bench, good = Bench(options.data, options.folder, options.threads), True
    for _, recipe, length, seed in missing:
        try:
            line = bench.line(recipe, length, seed, again=options.again)
        except Exception as error:  # the others may do better
            print(f"seed {seed}, {recipe}, length {length:g} failed: {reason(error)}", flush=True)
            good = False
            continue
        ledger_lines.append(options.results, line)
        figures = {name: round(value, 2) for name, value in line["curve"][-1][2].items() if name.endswith("FDc")}
        print(f"seed {seed}, {recipe}, length {length:g}: {line['seconds']:.0f} {line['unit']}, {figures}", flush=True)
    return good


def put(table: Table, as_markdown: bool) -> None:
    """Print a table."""
    if as_markdown:
        print(table.markdown())
    else:
        Console(width=150).print(table)


def show(options: Options) -> None:
    """Print the table of a data set, and what else is asked for."""
    lines = [line for line in ledger_lines.read(options.results).values() if line["data"] == options.data]
    tuned = [line for line in lines if line["recipe"] in options.recipes]
    if not any("nfe1/FDc" in line["curve"][-1][2] for line in tuned):
        if not options.report:
            print(f"no tuning of {options.data} by these recipes is recorded yet: there is no table")
            return
        raise UserError(
            f"--results {options.results}: has no tuning of {options.data} by --recipes; leave --report out"
        )
    if len(units := {line["unit"] for line in lines}) > 1:
        raise UserError(
            f"--results {options.results}: has lines in {' and in '.join(sorted(units))}, which do not compare; take a "
            "file for each"
        )
    tables = [ledger_report.table(lines, options.data)]
    if options.until is not None:
        tables.append(ledger_report.time_table(lines, options.until, options.nfe))
    for table in tables:
        put(table, options.markdown)
    if options.plot is not None:
        ledger_report.plot(lines, options.data, options.plot)
        print(options.plot)


def check(options: Options) -> bool:
    """Print each claim with what the lines say; return whether all hold."""
    lines = list(ledger_lines.read(options.results).values())
    verdicts = [(str(claim), *claim.verdict(lines)) for claim in claims.CLAIMS]
    for claim, holds, found in verdicts:
        print(f"- {claim}: {'holds' if holds else 'fails'} ({found})")
    if not verdicts:
        print("no claim is recorded yet")
    return all(holds for _, holds, _ in verdicts)


def smoke(options: Options) -> bool:
    """Train the recorded short lines again; return whether their figures are those of the record."""
    recorded, good = ledger_lines.read(options.results), True
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("smoke", Path(folder), options.threads)
        for recipe in SMOKE:
            old = recorded.get(("smoke", recipe, 1.0, SMOKE_SEED))
            if old is None:
                raise UserError(
                    f"--results {options.results}: has no line of {recipe} on smoke; record it with --data smoke"
                )
            new = bench.line(recipe, 1.0, SMOKE_SEED)
            same = all(old[name] == new[name] for name in ("machine", "threads", "torch"))
            for nfe in ledger_report.NFES:
                before, now = ledger_lines.figure(old, nfe), ledger_lines.figure(new, nfe)
                allowed = 1 + ALIKE if same else ELSEWHERE
                alike = 1 / allowed <= now / before <= allowed
                good = good and alike
                where = "the same machine" if same else f"another machine ({old['machine']}, torch {old['torch']})"
                verdict = "as" if alike else "NOT as"
                print(f"{recipe}, {nfe} NFE: FDc {now:.5g}, {verdict} recorded ({before:.5g}) on {where}", flush=True)
    return good


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, argv)
    refuse(options)
    if options.check:
        return 0 if check(options) else 1
    if options.smoke:
        return 0 if smoke(options) else 1
    if options.pilot is not None:
        put(ledger_pilot.pilot(options.data, options.pilot, options.threads), options.markdown)
        return 0
    try:
        good = options.report or train(options)
    except KeyboardInterrupt:  # a signal, after which the run has saved itself
        print("stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    show(options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
