"""The configuration of a run: frozen dataclasses, and PRESETS, one recipe a name.

Every field is an option of `python -m ect.train`: `--objective.q 4`, `--optim.lr 3e-4`. This module imports no torch, so
that `--help` and `--dry-run` answer at once. Images are counted in kimg (thousands of training images seen).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CIFAR10_SOURCE = Path("datasets/cifar-10-python.tar.gz")


@dataclass(frozen=True)
class DataConfig:
    source: str = "digits"
    """'digits' (ships with the package), or a path: CIFAR-10 tarball or folder, EDM zip, folder of images."""
    resolution: int | None = None
    """Resize and centre-crop a folder of images to this size (pixels). None: all images must already agree."""
    labels: bool = False
    """Train class-conditionally on the data set's labels."""
    xflip: bool = False
    """Flip each image horizontally with probability 1/2."""
    augment: float = 0.0
    """Probability of each of EDM's geometric augmentations (EDM pretraining: 0.12). 0 switches the pipe off."""


@dataclass(frozen=True)
class NetConfig:
    arch: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    """DDPM++ and NCSN++ are SongUNets (Song et al., 2021), ADM is the DhariwalUNet (Dhariwal & Nichol, 2021)."""
    model_channels: int = 128
    """Channels at the first resolution, times channel_mult at the others."""
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    """Residual blocks a resolution."""
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.2
    label_dropout: float = 0.0
    """Probability of dropping a class label (for classifier-free guidance)."""
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1], as the preconditioning assumes it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    kind: Literal["consistency", "diffusion"] = "consistency"
    """'consistency' tunes with ECT; 'diffusion' trains a denoiser with EDM's loss."""
    P_mean: float = -1.1
    """Mean of ln(t)."""
    P_std: float = 2.0
    """Standard deviation of ln(t)."""
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    """How r follows from t and the stage (consistency only)."""
    q: float = 2.0
    """Each stage divides the gap 1 - r/t by q."""
    k: float = 8.0
    """Extra gap at small t: n(t) = 1 + k sigmoid(-b t)."""
    b: float = 1.0
    c: float = 0.0
    """Pseudo-Huber constant, >= 0; 0 is the plain L2 norm."""
    weighting: Literal["inverse_gap", "inverse_c_out_sq", "inverse_t", "inverse_t_sq", "uniform"] = "inverse_gap"
    """w(t, r): 1/(t-r), 1/c_out(t)^2, 1/t, 1/t^2 or 1."""
    n_stages: int = 8
    """Number of stages of the mapping."""
    stage_kimg: float = 3200.0
    """Length of one stage; the last stage lasts to the end of the run."""


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["radam", "adam"] = "radam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None
    """Clip the gradient's global L2 norm to this value. None: no clipping."""
    warmup_kimg: float = 0.0
    """Linear warm-up of the learning rate from 0."""
    decay: Literal["constant", "linear", "rsqrt"] = "constant"
    """After decay_kimg: keep lr, fall linearly to 0 at total_kimg, or fall as sqrt(decay_kimg / kimg)."""
    decay_kimg: float = 0.0
    ema_beta: float = 0.9999
    """Decay of the weight average per step."""
    ema_rampup: float | None = None
    """Early in a run, let the average's half-life be at most this fraction of the images seen (EDM: 0.05)."""


@dataclass(frozen=True)
class PretrainConfig:
    """A diffusion phase before the tuning. It runs when total_kimg > 0 and no --init-from is given."""

    total_kimg: float = 0.0
    objective: ObjectiveConfig = ObjectiveConfig(kind="diffusion", P_mean=-1.2, P_std=1.2)
    optim: OptimConfig = OptimConfig(optimizer="adam", lr=1e-3)


@dataclass(frozen=True)
class LogConfig:
    stats_kimg: float = 6.4
    """Interval of the rows in stats.jsonl and TensorBoard."""
    sample_kimg: float = 256.0
    """Interval of sample grids (0: only at the start and the end)."""
    eval_kimg: float = 0.0
    """Interval of evaluation (0: only at the end)."""
    checkpoint_kimg: float = 256.0
    """Interval of checkpoints (0: only at the end)."""
    keep: int = 3
    """Keep this many latest checkpoints."""


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 50_000
    """Generated images a row of the table. 0 switches evaluation off."""
    batch: int = 256
    mid_t: tuple[float, ...] = (0.821,)
    """Intermediate noise levels: one a network evaluation after the first."""
    weights: Path | None = None
    """Inception weights for image data sets (see python -m ect.evaluate --help)."""


@dataclass(frozen=True)
class Config:
    preset: str = "digits"
    """Name of the recipe the other fields default to."""
    total_kimg: float = 1024.0
    """Length of the run in thousands of images."""
    batch: int = 128
    """Images an optimizer step."""
    micro_batch: int | None = None
    """Images a forward pass: a divisor of batch; gradients accumulate. None: the whole batch at once."""
    seed: int = 0
    init_from: Path | None = None
    """Pretrained network: a public EDM/ECT .pkl or one of our .safetensors."""
    resume: Path | None = None
    """A run folder or a checkpoint of it: continue there."""
    run_dir: Path | None = None
    """Folder of the run. None: runs/<number>-<preset>."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1', 'mps'."""
    threads: int | None = None
    """CPU threads. None: as many as physical cores that this process may use."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    data: DataConfig = DataConfig()
    net: NetConfig = NetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    pretrain: PretrainConfig = PretrainConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
