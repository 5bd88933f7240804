"""Seeded mistakes in the code that decides what is learnt and what is kept, and whether its tests find them.

    make mutants        (or: python tests/mutants.py --seed 1 --jobs 2; --list shows them and runs nothing)

A mutant is a copy of the tree with one operator, number or condition changed, or one statement left out. The tests of the
changed file run until one fails, which kills the mutant. The seed, and the text of a change and of its function's name, decide
which are made: an edit elsewhere in a file leaves the others in place. Ends with status 1 where more than ALLOWED survive.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNT, ALLOWED = 40, 2  # mutants, and how many of them may survive
PATIENCE = 4  # times what the tests take on the code as it is
# Where mistakes are made, and the tests that are to find them, the fastest first. Patterns of files.
AREAS: dict[str, list[str]] = {
    "ect/objective*": [
        "test_objective*",
        "test_gaps",
        "test_posterior",
        "test_fast_form",
        "test_direction",
        "test_distillation",
        "test_step",
    ],
    "ect/step": ["test_step", "test_capture"],
    "ect/optim*": ["test_rules", "test_optim", "test_emas", "test_resume"],
    "ect/precision": ["test_precision_of_a_gpu", "test_evaluate"],
    "ect/schedule": ["test_schedule", "test_emas"],
    "ect/files/checkpoint": ["test_checkpoint", "test_model_file", "test_resume"],
    "ect/files/model_file": ["test_model_file", "test_checkpoint"],
}
# Changes after which the code does the same: {(file, function, "old -> new"): why}. Another change takes the place of each.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("ect/files/checkpoint.py", "_fingerprint", "20 -> 21"): "a digest does not depend on how much is read at a time",
}

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Fields that say nothing about what the code does; names of calls that only speak to a reader.
SILENT, SPEAKS = ("annotation", "returns", "decorator_list"), ("warn", "print")


@dataclass(frozen=True)
class Mutant:
    """`old` at [start, end) of a file's bytes becomes `new`."""

    file: str
    function: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def change(self) -> str:
        return " ".join(f"{self.old} -> {self.new}".split())

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function}) {self.change}"


def files(pattern: str) -> list[Path]:
    """The modules of an area: `pattern`.py, or those of packages of that name."""
    found = [path for path in ROOT.glob(pattern) if path.is_dir() and path.name != "__pycache__"]
    return sorted({*ROOT.glob(f"{pattern}.py"), *chain.from_iterable(folder.rglob("*.py") for folder in found)})


def changes(node: ast.AST) -> Iterator[str]:
    """What a node may be replaced with."""
    match node:
        case ast.Compare(left, [op], [right]) if type(op) in SWAPS:
            yield f"({ast.unparse(ast.Compare(left, [SWAPS[type(op)]()], [right]))})"
        case ast.BinOp(_, ast.Div(), ast.JoinedStr() | ast.Constant(str())):  # of a path
            return
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield f"({ast.unparse(ast.BinOp(left, SWAPS[type(op)](), right))})"
        case ast.BoolOp(op, values):
            yield f"({ast.unparse(ast.BoolOp(SWAPS[type(op)](), values))})"
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(bool() as value):
            yield str(not value)
        case ast.Constant(int() | float() as value):
            yield str(value + 1)
        case ast.Name(name) if name in NAMES:
            yield NAMES[name]
        case ast.AugAssign() | ast.Expr(ast.Call()):
            yield "pass"


def mutants(file: str, text: str) -> list[Mutant]:
    """All of a file's."""
    lines = text.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:k])) for k in range(len(lines) + 1)]
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or speaks(node):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".removeprefix("module.")
        for new in changes(node):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore
            found.append(Mutant(file, function, node.lineno, start, end, text.encode()[start:end].decode(), new))  # type: ignore
        for name, field in ast.iter_fields(node):
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST) and name not in SILENT:
                    visit(child, function)

    visit(ast.parse(text), "module")
    return found


def speaks(node: ast.AST) -> bool:
    """Whether a call or a statement that is one only tells somebody something."""
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in SPEAKS


def ranked(found: list[Mutant], seed: int) -> list[Mutant]:
    """In an order of the seed, in which a mutant's place does not depend on where in the file it is."""
    times: Counter[tuple[str, str, str]] = Counter()

    def key(mutant: Mutant) -> bytes:
        what = mutant.file, mutant.function, mutant.change
        times[what] += 1
        return hashlib.sha256(repr((seed, *what, times[what])).encode()).digest()

    keys = {mutant: key(mutant) for mutant in found}
    return sorted(found, key=keys.__getitem__)


def chosen(seed: int, count: int) -> list[tuple[str, Mutant]]:
    """(area, mutant): as many of each area, taking turns. Those known to be equivalent are left out."""
    rows = []
    for area in AREAS:
        every = [m for path in files(area) for m in mutants(path.relative_to(ROOT).as_posix(), path.read_text())]
        row = ranked([m for m in every if (m.file, m.function, m.change) not in EQUIVALENT], seed)
        rows.append([(area, mutant) for mutant in row])
    return [pair for turn in zip_longest(*rows) for pair in turn if pair is not None][:count]


def files_of_tests(area: str) -> list[str]:
    """The test files of an area that there are."""
    found = [path.relative_to(ROOT) for name in AREAS[area] for path in sorted((ROOT / "tests").glob(f"{name}.py"))]
    return [str(path) for path in found]


def copy(to: Path) -> Path:
    """The tree without what is built or downloaded; the emulator's libraries are shared."""
    skip = (".git", ".venv", "build", "runs", "datasets", "__pycache__", ".*_cache", ".coverage*", "*.egg-info")
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*skip))
    (ROOT / "build").mkdir(exist_ok=True)
    (to / "build").symlink_to(ROOT / "build")
    return to


def run(folder: Path, files: list[str], limit: float | None = None) -> tuple[bool, str]:
    """Run tests of a copy until one fails: whether all pass, and the last line of the report."""
    # Bytecode is told from its source by time and size alone, and a mutant may have both of another.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(str(folder / part) for part in (".", "kernels", "benchmarks"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        *files,
    ]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False, "out of time"
    if process.returncode not in (0, 1, 2):  # passed, failed, could not be imported
        raise SystemExit(f"pytest ended with {process.returncode}:\n{out}")
    named = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.returncode == 0, (named or out.splitlines() or [""])[0 if named else -1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--only", default="", help="areas whose name holds this text")
    options = parser.parse_args(argv)
    picked = [(area, m) for area, m in chosen(options.seed, options.count) if options.only in area]
    if options.list:
        print(*(mutant for _, mutant in picked), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as temp, ThreadPoolExecutor(options.jobs) as pool:
        folders: queue.Queue[Path] = queue.Queue()
        for number in range(options.jobs):
            folders.put(copy(Path(temp) / str(number)))

        def unchanged(area: str) -> float:
            folder, start = folders.get(), time.monotonic()
            try:
                passed, line = run(folder, files_of_tests(area))
            finally:
                folders.put(folder)
            if not passed:
                raise SystemExit(f"the tests of {area} fail on the code as it is: {line}")
            return PATIENCE * (time.monotonic() - start) + 60

        areas = sorted({area for area, _ in picked})
        limits = dict(zip(areas, pool.map(unchanged, areas), strict=True))

        def survives(pair: tuple[str, Mutant]) -> bool:
            (area, mutant), folder = pair, folders.get()
            path = folder / mutant.file
            before = path.read_bytes()
            try:
                path.write_bytes(before[: mutant.start] + mutant.new.encode() + before[mutant.end :])
                passed, line = run(folder, files_of_tests(area), limits[area])
            finally:
                path.write_bytes(before)
                folders.put(folder)
            print(f"{'SURVIVED' if passed else 'killed  '} {mutant}    {'' if passed else line}", flush=True)
            return passed

        survivors = sum(pool.map(survives, picked))
    for (file, function, change), why in EQUIVALENT.items():
        print(f"equivalent, not run: {file} ({function}) {change}: {why}")
    print(f"{len(picked) - survivors} of {len(picked)} mutants killed")
    return 1 if survivors > ALLOWED else 0


if __name__ == "__main__":
    raise SystemExit(main())
