"""The data sheets of six GPUs, at whose rates costs are predicted."""

from __future__ import annotations

from dataclasses import dataclass

SLOTS = 4  # warp instructions that an SM starts in a clock: one a scheduler


@dataclass(frozen=True)
class Gpu:
    """Peak rates by the vendor's data sheet, dense (no sparsity), fp16 with fp32 sums: TFLOP/s and GB/s.

    fp32: outside of the tensor cores. pattern: of the name that torch gives the device. sms, clock: SMs and boost clock
    in GHz. memory: in GB of 10^9 bytes.
    """

    name: str
    fp16: float
    tf32: float
    fp32: float
    bandwidth: float
    sheet: str
    pattern: str
    arch: int
    sms: int
    clock: float
    memory: float = 0.0

    @property
    def issue(self) -> float:
        """Warp instructions a second."""
        return self.sms * SLOTS * self.clock * 1e9


# Where a sheet gives a tensor-core rate with sparsity, half of it stands here. White papers round less than data sheets. SMs
# and clocks: A100 and RTX 4090, the white papers' tables; H100, SMs from its white paper and the clock that its fp32 rate
# implies (66.9 TFLOP/s over 132 SMs of 128 lanes), which H200 shares; B200, in no data sheet: assumed.
_H100 = "NVIDIA H100 white paper, SXM5; GB/s: data sheet"
_B200 = "NVIDIA HGX B200 data sheet, an eighth; GB/s: DGX B200"
GPUS = (
    Gpu("A100-40", 312, 156, 19.5, 1555, "NVIDIA A100 data sheet, 40GB", r"A100-(SXM4|PCIE)-40GB$", 80, 108, 1.41, 40),
    Gpu("A100-80", 312, 156, 19.5, 2039, "NVIDIA A100 data sheet, 80GB SXM", r"A100-SXM4-80GB$", 80, 108, 1.41, 80),
    Gpu("H100", 989.4, 494.7, 66.9, 3350, _H100, r"H100 80GB HBM3$", 90, 132, 1.98, 80),
    Gpu("H200", 989.4, 494.7, 66.9, 4800, "as H100; GB/s: NVIDIA H200 data sheet, SXM", r"H200$", 90, 132, 1.98, 141),
    Gpu("RTX 4090", 165.2, 82.6, 82.6, 1008, "NVIDIA Ada white paper, appendix A", r"RTX 4090$", 89, 128, 2.52, 24),
    Gpu("B200", 2250, 1125, 75, 8000, _B200, r"NVIDIA B200$", 100, 148, 1.965, 180),
)  # of the A100-80 the PCIe card has 1,935 GB/s; the H200 NVL is slower
