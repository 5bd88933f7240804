"""Which code of ect/ and kernels/ no test has reached although it is a GPU's: read from the coverage of the last test run.

    make test        (or: pytest --cov, then python tests/gpu_paths/report.py)

Looked at are lines that speak of a GPU (cuda, gpu, triton, a captured graph) and lines that a condition of this kind guards, in
both of its branches. Each of them that no test runs needs a reason: a comment `# gpu only: why` on the line or on that of a
condition or function round it, or a line `file::function: why` in reasons.txt. Ends with status 1 where one has none, and where
reasons.txt names a function that does not exist. The bodies of Triton kernels count as reached through Triton's interpreter.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
REASONS = Path(__file__).with_name("reasons.txt")
SPEAKS_OF_A_GPU = re.compile(r"cuda|gpu|triton|\.graph\b|capture", re.IGNORECASE)
COMMENT = re.compile(r"#\s*gpu only: (\S.*)")


@dataclass(frozen=True)
class Line:
    """One that no test has reached."""

    file: str
    number: int
    text: str
    function: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.number} ({self.function}): {self.text}" + (
            f"    {self.reason}" if self.reason else ""
        )


def source_files(root: Path = ROOT) -> Iterator[Path]:
    for folder in ("ect", "kernels/ect_kernels"):
        yield from sorted((root / folder).rglob("*.py"))


def device_lines(text: str) -> set[int]:
    """Numbers of the lines that belong to a GPU."""
    return set().union(*(_span(node) for node in ast.walk(ast.parse(text)) if SPEAKS_OF_A_GPU.search(_decides(node))))


def _decides(node: ast.AST) -> str:
    """What says whether a statement belongs to a GPU, with all that is in it."""
    match node:
        case ast.If() | ast.IfExp() | ast.While():
            return ast.unparse(node.test)
        case ast.With():
            return " ".join(map(ast.unparse, node.items))
        case ast.Match():
            return ast.unparse(node.subject)
        case ast.FunctionDef():
            return node.name
        case ast.Expr(value=ast.Constant()):  # a text
            return ""
        case ast.stmt() if not hasattr(node, "body"):
            return ast.unparse(node)
    return ""


def _span(node: ast.AST) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]


def functions(text: str) -> dict[str, tuple[int, int]]:
    """First and last line of each function and class, by qualified name; the outer ones first."""
    found: dict[str, tuple[int, int]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child.lineno, child.end_lineno or child.lineno
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(text), "")
    return found


def comments(text: str) -> dict[int, str]:
    """The reason in the source of each line that has one: its own, or of a statement that it is in the body of."""
    found: dict[int, str] = {}
    own = {k: match[1] for k, line in enumerate(text.splitlines(), 1) if (match := COMMENT.search(line)) is not None}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and hasattr(node, "body") and node.lineno in own:
            found |= dict.fromkeys(_span(node), own[node.lineno])
    return found | own


def read_reasons(text: str) -> dict[tuple[str, str], str]:
    """{(file, function): reason} of lines 'file::function: reason'; '*' stands for all functions of a file."""
    rows = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = {}
    for row in rows:
        place, _, reason = row.partition(": ")
        file, _, function = place.partition("::")
        if not function or not reason.strip():
            raise SystemExit(f"{REASONS.name}: cannot read {row!r}; expected 'file::function: reason'")
        found[file, function] = reason.strip()
    return found


def unreached(file: str, text: str, missing: Iterable[int], reasons: dict[tuple[str, str], str]) -> list[Line]:
    """The lines of a GPU among `missing`, with their reasons."""
    places, in_source, lines = functions(text), comments(text), text.splitlines()
    found = []
    for number in sorted(device_lines(text) & set(missing)):
        within = [name for name, (first, last) in places.items() if first <= number <= last]
        function = within[-1] if within else "module"
        listed = [reasons.get((file, name)) for name in (*reversed(within), "*")]
        reason = in_source.get(number) or next(filter(None, listed), None)
        found.append(Line(file, number, lines[number - 1].strip(), function, reason))
    return found


def unknown(reasons: dict[tuple[str, str], str], root: Path = ROOT) -> list[str]:
    """Entries of reasons.txt for what does not exist."""
    texts = {file.relative_to(root).as_posix(): file.read_text() for file in source_files(root)}
    return [
        f"{REASONS.name}: {file}::{function} does not exist"
        for file, function in reasons
        if file not in texts or (function != "*" and function not in functions(texts[file]))
    ]


def main() -> int:
    import coverage

    data = coverage.Coverage(data_file=str(ROOT / ".coverage"), config_file=str(ROOT / "pyproject.toml"))
    data.load()
    measured = set(data.get_data().measured_files())
    reasons = read_reasons(REASONS.read_text())
    found: list[Line] = []
    for file in source_files():
        if str(file) not in measured:
            print(f"{file.relative_to(ROOT)}: no test imports it")
            continue
        missing = data.analysis2(str(file))[3]
        found += unreached(file.relative_to(ROOT).as_posix(), file.read_text(), missing, reasons)
    explained, open_ = ([line for line in found if bool(line.reason) == known] for known in (True, False))
    print(f"code of a GPU that no test reaches without one: {len(found)} lines, {len(explained)} with a reason")
    for line in explained:
        print(f"  {line}")
    faults = [*(f"{line}    NO REASON" for line in open_), *unknown(reasons)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
