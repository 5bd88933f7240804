"""The cases that the launchers of ect_kernels give Triton's compiler, for compilation without a GPU: one function an op.

Each gives cases (name, kernel, signature, constexprs, attributes, num_warps, num_stages, note). A name or note with
"generic" says that no network's shape needs it. GroupNorm's are those of DDPM++ and NCSN++ in float16, all with 32
groups.
"""

from __future__ import annotations

import itertools
from typing import Any

from ect_kernels import consistency_loss_triton as consistency
from ect_kernels import gn_triton as gn
from ect_kernels import group_norm_silu_triton as norm
from ect_kernels import levels_triton
from ect_kernels import perturb_triton as pt
from ect_kernels import radam_ema_triton as radam
from ect_kernels import skip_product_triton as sp

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[tuple[int], Any], int, int, str]
NORMS = [(128, 32), (256, 32), (384, 32), (512, 32), (256, 16), (512, 16), (256, 8), (512, 8)]  # C, H = W


def _aligned(signature: dict[str, str], *whole: str) -> dict[tuple[int], Any]:
    """Return attributes: pointers, and the numbers named in `whole`, are multiples of 16."""
    found = [k for k, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in whole]
    return {(k,): [["tt.divisibility", 16]] for k in found}


def _norm(name: str, backward: bool, absent: set[str], note: str, *shape: Any) -> Case:
    """Return a GroupNorm kernel without the arguments named in `absent`; shape: arguments of `options` but `backward`."""
    kernel = gn.backward_kernel if backward else gn.forward_kernel
    c, c2, groups, hw, act, light = shape
    options = norm.options(c, c2, groups, hw, act, backward, light)
    warps = options.pop("num_warps")
    constexprs = {**options, **{arg: None for arg in kernel.arg_names if arg in absent}}
    types = dict.fromkeys(("a", "skip", "x", "other", "y", "dy", "dx", "djoined", "da", "dother"), "*fp16")
    types |= dict.fromkeys(("skip_scale", "eps", "inv_keep"), "fp32")
    types |= dict.fromkeys((*gn.NOT_SPECIALISED, "v_rows", "rows_apart"), "i32")
    types |= {"seed": "*i64", "n0": "*i64"}
    signature = {arg: "constexpr" if arg in constexprs else types.get(arg, "*fp32") for arg in kernel.arg_names}
    passes = 1 if options["ROWS"] >= hw else 2
    note = f"{passes} pass, {note}" + (" (second read from L2)" if passes == 2 else "")
    name, attributes = f"{'bwd' if backward else 'fwd'} {name}", _aligned(signature, "v_rows", "rows_apart")
    return name, kernel, signature, constexprs, attributes, warps, 3, note


def group_norm_silu() -> list[Case]:
    """Return each shape of the first norm of a block, forward and backward.

    Where a block has them, also those of the second norm (v, dropout) and of the attention's (no activation).
    """
    uses = [(c, size, "plain") for c, size in NORMS]
    uses += [(256, size, "dropout") for size in (32, 16, 8)] + [(256, size, "linear") for size in (16, 8)]
    seam = {"a", "bias", "skip", "skip_bias", "skip_scale", "other", "dx", "djoined", "dother", "scale", "shift"}
    cases = []
    for (c, size, use), backward in itertools.product(uses, (False, True)):
        absent = seam | (set() if use == "dropout" else {"v", "seed", "n0"})
        shape = (c, 0, 32, size * size, use != "linear", use != "dropout")
        cases.append(_norm(f"{c}x{size}x{size} {use}", backward, absent, "3s" if backward else "2s", *shape))
    return cases


def residual_group_norm_silu() -> list[Case]:
    """Return forward and backward of each (C, C2) at each size, with and without dropout."""
    channels = [(128, 0), (256, 0), (256, 128), (128, 256), (256, 256)]
    cases = []
    for hw, (c, c2), drop, backward in itertools.product((1024, 256, 64), channels, (False, True), (False, True)):
        # A decoder's x has one use beside the norm, in a product with `other`; an encoder's two, the skip and the decoder.
        absent = {"v", "scale", "shift", "dscale", "dshift", *(() if drop else ("seed", "n0")), "dx" if c2 else "other"}
        note = "4s and 3s of other: dy, other, dother" if backward else "4s and 2s of other"
        shape = (c, c2, 32, hw, True, False)
        cases.append(_norm(f"c={c}+{c2} hw={hw} drop={int(drop)}", backward, absent, note, *shape))
        if c2 and not drop and not backward:  # a decoder's: x comes from skip_product
            absent |= {"a", "bias", "skip", "skip_bias"}
            cases.append(_norm(f"c={c}+{c2} hw={hw} summed", backward, absent, "2s and 2s of other", *shape))
    return cases


def levels() -> list[Case]:
    kernel = levels_triton.levels_fwd_kernel
    types = [*["*i64"] * 3, *["*fp32"] * 4, "*u8", "i32", *["fp32"] * 5, "constexpr"]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    constexprs, note = {"B": levels_triton.BLOCK}, "17 B an image"
    return [("levels", kernel, signature, constexprs, _aligned(signature), levels_triton.WARPS, 3, note)]


def skip_product() -> list[Case]:
    """Return the cases of DDPM++'s and NCSN++'s widths (256, a source of 128 or 256), and of others."""
    cases: list[Case] = []
    for name, o, c, c2 in (("256+256", 256, 256, 256), ("256+128", 256, 256, 128), ("generic 24+40", 32, 24, 40)):
        columns = sp.columns(o)
        for dtype in ("*fp16", "*bf16"):
            types = [*[dtype] * 4, "*fp32", "*fp32", dtype, "i32", "fp32", *["constexpr"] * 6]
            signature = dict(zip(sp.skip_product_fwd_kernel.arg_names, types, strict=True))
            constexprs = {"CO": o, "C": c, "C2": c2, "BM": sp.rows(columns), "BN": columns, "BK": sp.DEPTH}
            attrs = _aligned(signature, "M")
            cases.append(
                (
                    f"{name} {dtype[1:]}",
                    sp.skip_product_fwd_kernel,
                    signature,
                    constexprs,
                    attrs,
                    sp.WARPS,
                    sp.STAGES,
                    "4s",
                )
            )
    return cases


def perturb() -> list[Case]:
    cases: list[Case] = []
    for name, kernel, constant in (
        ("C3", pt.perturb_fwd_kernel, {"C": 3, "B": pt.GROUPS}),
        ("C1 (a generic size)", pt.perturb_fwd_kernel, {"C": 1, "B": pt.GROUPS}),
        ("generic", pt.perturb_generic_fwd_kernel, {"B": pt.BLOCK}),
    ):
        for dtype, absent in itertools.product(
            ("*fp16", "*bf16", "*fp32"), (("eps", "flip"), ("eps",), ("seed", "n0"))
        ):
            constexprs = {**constant, **dict.fromkeys(absent)}
            types = {"images": "*u8", "flip": "*u8", "seed": "*i64", "in_t": dtype, "in_r": dtype, "sd2": "fp32"}
            types |= {"n0": "*i64"} | dict.fromkeys(("W", "HW", "chunks", "C"), "i32")
            signature = {a: "constexpr" if a in constexprs else types.get(a, "*fp32") for a in kernel.arg_names}
            attrs = _aligned(signature, *(("W", "HW") if kernel is pt.perturb_fwd_kernel else ()))
            label = f"{name} {dtype[1:]}, no {' or '.join(absent)}"
            note = "9 B + 2s a value, 4 B more with eps"
            cases.append((label, kernel, signature, constexprs, attrs, pt.WARPS, 3, note))
    return cases


def consistency_loss() -> list[Case]:
    kernel = consistency.consistency_loss_fwd_kernel
    cases: list[Case] = []
    for size in (3072, 64, 12288):  # 3x32x32, 1x8x8, 3x64x64
        block, whole, warps = consistency.options(size)
        note = "3s + 8 B a value" if whole else "generic: 5s + 16 B a value, the second read from L2"
        note = "generic: less than 16 B a lane" if size == 64 else note
        for dtype in ("*fp16", "*bf16", "*fp32"):
            types = [dtype, dtype, *["*fp32"] * 6, dtype, *["fp32"] * 3, "i32", "constexpr", "constexpr"]
            signature = dict(zip(kernel.arg_names, types, strict=True))
            constexprs = {"BLOCK": block, "WHOLE": whole}
            name = f"{size} values {dtype[1:]}"
            cases.append((name, kernel, signature, constexprs, _aligned(signature, "M"), warps, 3, note))
    return cases


def radam_ema() -> list[Case]:
    """Return the three launches, the last with each number of averages and each kind of shadow."""
    cases: list[Case] = []

    def add(name: str, kernel: Any, types: list[str], note: str, **constants: int) -> None:
        names = kernel.arg_names
        signature = dict(zip(names, [*types, *["constexpr"] * (len(names) - len(types))], strict=True))
        constexprs: dict[str, Any] = {k: constants.get(k) for k, kind in signature.items() if kind == "constexpr"}
        cases.append((name, kernel, signature, constexprs, _aligned(signature), radam.WARPS, 3, note))

    f32, f64, i64, most = "*fp32", "*fp64", "*i64", radam.MAX_EMAS
    sizes = {"BLOCK": radam.CHECK_BLOCK, "CHUNK": radam.CHUNK}
    add("check", radam.radam_ema_check_kernel, [f32, f64, "i32", "i64"], "4 B a parameter", **sizes)
    sizes = {"BLOCK": radam.PARTIALS_BLOCK, "MAX_EMAS": most}
    note = "one program: scalars, no tensor"
    add("scalars", radam.radam_ema_scalars_kernel, [f64, "i32", f64, i64, f32], note, **sizes)
    for emas, shadow in itertools.product(range(most + 1), ("constexpr", "*fp16", "*bf16")):
        types = [f32] * (4 + emas) + ["constexpr"] * (most - emas) + [shadow, f32, "i64"]
        moved = 28 + 8 * emas + (0 if shadow == "constexpr" else 2)
        name = f"update, {emas} EMAs, shadow {'none' if shadow == 'constexpr' else shadow[1:]}"
        note = f"{moved} B a parameter (4 more where the clip bites)"
        add(name, radam.radam_ema_update_kernel, types, note, BLOCK=radam.BLOCK)
    return cases
