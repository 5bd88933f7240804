"""The places that know an op, and what each must have: the list that docs/extending.md and CONTRIBUTING lead to."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ect_kernels.dispatch import Op

Check = Callable[[Path, str], bool]
NO_FORM = {
    (
        "skip_product",
        "cuda",
    ): "a matrix product with an epilogue: Triton reaches the tensor cores, CUDA C++ would need CUTLASS",
    ("skip_product", "native"): "a matrix product, which in single precision is the library's",
}
"""(op, form): why an op is not written in this form."""
NUMBERS = "a few numbers an image, no tensor of the data's size"


def says(pattern: str) -> Check:
    """Return a check of a file's text for a pattern, in which <op> is the op's name."""

    def check(path: Path, op: str) -> bool:
        text = path.read_text(encoding="utf-8")
        return re.search(pattern.replace("<op>", re.escape(op)), text, re.MULTILINE) is not None

    return check


def names_kernels(path: Path, op: str) -> bool:
    """Say whether the profiler's table knows both the op and its kernels."""
    category = runpy.run_path(str(path))["category"]
    return None not in (category(f"ect::{op}"), category(f"{op}_fwd_kernel"))


@dataclass(frozen=True)
class Place:
    """A file, and what it must have of an op.

    form: the place is for ops in this form, "native", "triton" or "cuda". without: op -> why it needs no such place.
    """

    path: str
    holds: Check
    form: str | None = None
    without: dict[str, str] = field(default_factory=dict)

    def file(self, op: str) -> str:
        return self.path.replace("<op>", op)

    def found(self, root: Path, op: str) -> bool:
        path = root / self.file(op)
        return path.is_file() and self.holds(path, op)


PLACES = [
    Place("kernels/ect_kernels/<op>.py", says(r"^DRAM = (.|\n)*^OP = Op\((.|\n)*^def <op>\(")),
    Place("kernels/ect_kernels/<op>_triton.py", says(r"^@triton.jit|^def fwd\("), "triton"),
    Place("csrc/<op>.cu", says(r"\bint <op>_fwd\("), "cuda"),
    Place("csrc/cpu/<op>.cpp", says(r"^int <op>_fwd\("), "native"),
    Place("csrc/launchers.h", says(r"^int <op>_fwd\((.|\n)*\bX\(<op>_fwd\)"), "cuda"),
    Place("kernels/ect_kernels/choice.py", says(r'^    "<op>",$')),
    Place("kernels/ect_kernels/calls.py", says(r"^    from ect_kernels.<op> import .*\b<op>\b")),
    Place("ect/cost/categories.py", says(r'"ect::<op>":')),
    Place("benchmarks/lib/cases.py", says(r'^        "<op>": _<op>,(.|\n)*^def _<op>\(')),
    Place("benchmarks/lib/categories.py", names_kernels),
    Place(
        "benchmarks/lib/work.py", says(r'[."]<op>\b'),
        without={
            "levels": NUMBERS,
            "residual_group_norm_silu": "counted with group_norm_silu, of which it has the name",
            "skip_product": "a product, whose formula is in ect/cost/flops.py",
        },
    ),
    Place("benchmarks/lib/triton_cases.py", says(r"^def <op>\(\) -> "), "triton"),
    Place("benchmarks/lib/launches.py", says(r'if op == "<op>":$'), "cuda"),
    Place(
        "benchmarks/lib/instructions.py", says(r'^OPS = .*"<op>"'), "cuda",
        without={"levels": "a thread an image, and no loop"}
        | dict.fromkeys(["group_norm_silu", "residual_group_norm_silu"], "in row_loops.OPS, which that list begins with"),
    ),
    Place("tests/kernels/test_<op>.py", says(r"^def test_")),
    Place("tests/kernels/test_native.py", says(r'^        case "<op>":(.|\n)*"<op>": \(')),
    Place(
        "tests/kernels/test_dram.py", says(r'^OPS = .*"<op>"'),
        without={"levels": NUMBERS, "skip_product": "its tiles read the same rows again, from L2: accesses are not traffic"},
    ),
    Place("tests/kernels/test_random.py", says(r'"<op>'), "cuda", without={"levels": "its one size is the batch"}),
    Place("tests/emulator/san_<op>.cpp", says(r"\b<op>_fwd\("), "cuda"),
    Place("tests/gpu_paths/test_run.py", says(r'ops = \{.*"<op>"'), "cuda"),
    Place("docs/kernels.md", says(r"^\| `<op>` \|")),
]  # fmt: skip


def missing(op: Op, root: Path) -> list[str]:
    """Return the places in the tree at `root` that do not know an op, by path, and the forms that it lacks without a reason."""
    found = []
    for form in ("native", "triton", "cuda"):
        if form not in op.backends and (op.name, form) not in NO_FORM:
            found.append(f"a form in {form}, or a reason in NO_FORM of tests/kernels/places.py")
    for place in PLACES:
        needed = (place.form is None or place.form in op.backends) and op.name not in place.without
        if needed and not place.found(root, op.name):
            found.append(place.file(op.name))
    return found
