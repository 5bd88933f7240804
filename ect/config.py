"""The configuration of a run: frozen dataclasses, and PRESETS, one recipe a name.

Every field is an option of `python -m ect.train`: `--objective.q 4`, `--optim.lr 3e-4`. This module imports no torch, so
that `--help` and `--dry-run` answer at once. Images are counted in kimg (thousands of training images seen).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

try:
    import tyro

    _TAKES_NO_VALUE: object = tyro.conf.DisallowNone
except ImportError:  # where the kernels and their benchmarks run, and nobody parses a command line
    _TAKES_NO_VALUE = None

Switch = Annotated[bool | None, _TAKES_NO_VALUE]
"""`--name` or `--no-name`; None where neither is given: as the device and the run suggest."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "digits"
    """'digits' (ships with the package), or a path: CIFAR-10 tarball or folder, EDM zip, folder of images."""
    resolution: int | None = None
    """Resize and centre-crop a folder of images to this size (pixels). None: all images must already agree."""
    convert: Literal["rgb", "grey"] | None = None
    """Make a folder or zip of images RGB or grey: transparency on white, palettes, CMYK and 16 bits included. None: all must
    already be of one kind, 8-bit grey or RGB."""
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
    batch_per_device: int | Literal["auto"] | None = None
    """Images a forward pass: a divisor of each device's share of batch; gradients accumulate. None: the whole share at
    once; 'auto': as many as the predicted memory allows."""
    seed: int = 0
    init_from: Path | None = None
    """Pretrained network: a public EDM/ECT .pkl or one of our .safetensors."""
    resume: Path | None = None
    """A run folder or a checkpoint of it: continue there."""
    run_dir: Path | None = None
    """Folder of the run. None: runs/<number>-<preset>."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1'."""
    threads: int | None = None
    """CPU threads. None: as many as CPUs that this process may use."""
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16"] = "auto"
    """Arithmetic of training. fp16 and bf16: half precision inside the residual blocks, fp32 at both ends, fp32 weights. fp16
    scales the loss; bf16 needs no scale, but puts up to 8 times fp16's noise on the signal. auto: fp16 on a GPU, else fp32."""
    graph: Switch = None
    """Capture the whole update into one CUDA graph. None: on a GPU."""
    compile: Switch = None
    """Run the network through torch.compile. None: on a GPU, in runs of at least 25,000 steps: an estimate, not measured, of
    where the minutes of compiling pay (python benchmarks/step_time.py says where they do on a device)."""
    channels_last: Switch = None
    """Keep the weights of convolutions in the memory order [out, k, k, in]. None: on a GPU."""
    kernels: str = ""
    """Backends of the fused ops, e.g. 'group_norm_silu=cuda,*=triton' (python -m ect_kernels lists them). Empty: automatic."""
    self_check: Switch = None
    """Compare kernels, compiled network and captured update with plain ones before the first step, and go on without what
    fails. None: on a GPU."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    data: DataConfig = DataConfig()
    net: NetConfig = NetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    pretrain: PretrainConfig = PretrainConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()


_DIGITS_OPTIM = OptimConfig(
    betas=(0.9, 0.99), warmup_kimg=6.4, decay="linear", decay_kimg=38.4, ema_beta=0.995, ema_rampup=0.05
)
_CIFAR10_DATA = DataConfig(source="datasets/cifar-10-python.tar.gz")
# DDPM++ of EDM's edm-cifar10-32x32-uncond-vp.pkl; --init-from that file is what these recipes expect.
_CIFAR10 = Config(
    data=_CIFAR10_DATA,
    batch=128,
    objective=ObjectiveConfig(q=2.0, n_stages=8, stage_kimg=3200.0),
    optim=OptimConfig(optimizer="radam", lr=1e-4, ema_beta=0.9999),
    log=LogConfig(stats_kimg=12.8, sample_kimg=640.0, checkpoint_kimg=1280.0),
)


def _stages_of_8(total_kimg: float) -> Config:
    return replace(_CIFAR10, total_kimg=total_kimg, objective=replace(_CIFAR10.objective, stage_kimg=total_kimg / 8))


_RECIPES = {
    # 8x8 digits: 1200 steps of diffusion, then 1200 of ECT; minutes on two CPU cores.
    "digits": Config(
        total_kimg=76.8,
        batch=64,
        threads=1,  # a second thread gains a tenth, and loses tenfold where other work wants the core
        net=NetConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0),
        objective=ObjectiveConfig(q=2.0, n_stages=6, stage_kimg=12.8),
        optim=replace(_DIGITS_OPTIM, optimizer="radam", lr=1e-3),
        pretrain=PretrainConfig(total_kimg=76.8, optim=replace(_DIGITS_OPTIM, optimizer="adam", lr=4e-3)),
        log=LogConfig(stats_kimg=1.6, sample_kimg=19.2, checkpoint_kimg=19.2),
        eval=EvalConfig(samples=3000, batch=250),
    ),
    # ECT's "1 hour" recipe: 8,000 steps of 128 at a fixed r/t = 1 - n(t)/256, and it stops.
    "cifar10-1h": replace(
        _CIFAR10,
        total_kimg=1024.0,
        objective=replace(_CIFAR10.objective, q=256.0, n_stages=1, stage_kimg=1024.0),
        optim=replace(_CIFAR10.optim, ema_beta=0.9993),
        log=replace(_CIFAR10.log, sample_kimg=128.0, checkpoint_kimg=256.0),
    ),
    "cifar10-100k": _stages_of_8(12_800.0),
    "cifar10-200k": _stages_of_8(25_600.0),
    "cifar10-400k": _stages_of_8(51_200.0),
    # EDM's own pretraining of the teacher (Karras et al., 2022, table 7).
    "edm-cifar10": replace(
        _CIFAR10,
        total_kimg=200_000.0,
        batch=512,
        data=replace(_CIFAR10_DATA, augment=0.12),
        net=NetConfig(dropout=0.13),
        objective=ObjectiveConfig(kind="diffusion", P_mean=-1.2, P_std=1.2),
        optim=OptimConfig(
            optimizer="adam", lr=1e-3, warmup_kimg=10_000.0, ema_beta=0.5 ** (512 / 500e3), ema_rampup=0.05
        ),
        log=LogConfig(stats_kimg=51.2, sample_kimg=2560.0, checkpoint_kimg=2560.0),
    ),
}

PRESETS: dict[str, Config] = {name: replace(recipe, preset=name) for name, recipe in _RECIPES.items()}
