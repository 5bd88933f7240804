"""benchmarks/lib/instructions.py: from loops to instructions of an op for eight elements."""

from __future__ import annotations

from pathlib import Path

import pytest
from lib import instructions, sass
from lib.row_loops import RowLoop


def test_a_norm_adds_up_the_loops_that_it_runs() -> None:
    forward, backward = "residual_group_norm_silu_fwd_kernel<__half>", "residual_group_norm_silu_bwd_kernel<__half>"
    loops = [  # body, longest, undrawn, unstored
        RowLoop(forward, 80, "copy", 1, 10, 10, 10, 10),
        RowLoop(forward, 80, "Welford", 1, 200, 150, 150, 80),
        RowLoop(forward, 80, "Welford", 1, 210, 149, 149, 149),  # one that has no other way than to store
        RowLoop(forward, 80, "apply", 1, 230, 220, 130, 220),
        RowLoop(backward, 80, "copy", 1, 19, 19, 19, 19),
        RowLoop(backward, 80, "backward 1", 1, 320, 300, 210, 300),
        RowLoop(backward, 80, "backward 2", 1, 90, 90, 90, 80),
        RowLoop(backward, 80, "backward 2", 2, 85, 85, 85, 75),  # of two forms of a loop the longer one counts
    ]
    assert instructions.of_norm("residual_group_norm_silu", loops) == {
        "residual_group_norm_silu_fwd": 10 + 80 + 130,
        "residual_group_norm_silu_fwd dropout": 10 + 80 + 220,
        "residual_group_norm_silu_fwd computed": 150 + 130,
        "residual_group_norm_silu_fwd dropout computed": 150 + 220,
        "residual_group_norm_silu_bwd": 19 + 210 + 90,
        "residual_group_norm_silu_bwd dropout": 19 + 300 + 90,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("op", "most"), [("consistency_loss", 300), ("radam_ema", 1200)])
def test_counts_the_kernels_of_csrc(op: str, most: int) -> None:
    """Each value of the loss takes at least three multiply-adds in either loop; the optimizer many more."""
    try:
        sass.tool("nvcc")
        sass.tool("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    counts = [instructions._of_op(80, op, bits)[op] for bits in (16, 32)]
    assert all(8 * 2 * 3 < count < most for count in counts)
    if op == "radam_ema":
        assert counts[0] == counts[1] > 8 * 40  # fp32, whatever the network's dtype


def test_kept_counts_go_with_their_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counts are made once for a version of csrc/, and anew after any change there."""
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("int a;")
    made = []
    monkeypatch.setattr(instructions, "ROOT", tmp_path)
    monkeypatch.setattr(sass, "available", lambda name: True)
    monkeypatch.setattr(instructions.subprocess, "run", lambda *a, **k: type("Done", (), {"stdout": b"nvcc 13"}))
    monkeypatch.setattr(sass, "tool", str)
    monkeypatch.setattr(instructions, "_of_op", lambda arch, op, bits: made.append(op) or {"k": float(bits)})
    for _ in range(2):
        instructions.counts.cache_clear()
        assert instructions.counts(80) == {16: {"k": 16.0}, 32: {"k": 32.0}}
    assert sorted(made) == sorted(2 * instructions.OPS)
    source.write_text("int b;")
    instructions.counts.cache_clear()
    assert instructions.counts(80) is not None
    assert len(made) == 4 * len(instructions.OPS)
    instructions.counts.cache_clear()
    monkeypatch.setattr(sass, "available", lambda name: False)
    assert instructions.counts(80) is None
    instructions.counts.cache_clear()


def test_a_compiler_that_fails_costs_the_counts_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A floor is written into results that took paid hours: none of it may be lost to an nvcc that knows no sm_100."""

    def fails(arch: int) -> None:
        raise RuntimeError("nvcc fatal: Unsupported gpu architecture 'sm_100'")

    monkeypatch.setattr(sass, "available", lambda name: True)
    monkeypatch.setattr(instructions, "_counts", fails)
    instructions.counts.cache_clear()
    assert instructions.counts(100) is None
    assert "Unsupported gpu architecture" in capsys.readouterr().err
    instructions.counts.cache_clear()
