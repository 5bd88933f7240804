"""The configuration of a run: frozen dataclasses, with the range of each field beside it. Recipes are in ect/presets.

Every field is an option of `python -m ect.train`: `--objective.q 4`, `--optim.lr 3e-4`. This module imports no torch, so
that `--help` and `--dry-run` answer at once. Images are counted in kimg (thousands of training images seen).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ect_kernels import choice

from ect.config import emas
from ect.config import target as targets
from ect.errors import UserError

try:
    import tyro

    _TAKES_NO_VALUE: object = tyro.conf.DisallowNone
except ImportError:  # where the kernels and their benchmarks run, and nobody parses a command line
    _TAKES_NO_VALUE = None

SIGMA_MAX = 80.0
"""The noise level that sampling starts from (EDM, ECT)."""
MID_T = (0.821,)
"""The noise levels after it, one a network evaluation: those of ECT's CIFAR-10 models."""
MAX_BLOCKS, MAX_LEVELS = 24, 8
"""A network has at most so many residual blocks a level, and levels; the public ones have 4 and 4."""
HEUN_STEPS = (18, 5, 2)
"""Steps of the Heun sampler by which a diffusion model is rated. The first are EDM's at 32x32: 35 network evaluations."""

Architecture = Literal[
    "ddpmpp", "ncsnpp", "adm", "edm2", "edm2-narrow", "edm2-xs", "edm2-s", "edm2-m", "edm2-l", "edm2-xl", "edm2-xxl"
]
Kind = Literal["consistency", "diffusion"]
STAGED = {"consistency"}
"""The kinds that have pairs, which close up in stages; `ect.objective.register` adds to them."""


def admit(option: str, name: str) -> None:
    """Let the fields of a type above, "Architecture" or "Kind", take one more name.

    `ect.models.register` and `ect.objective.register` call it. The fields' types are read anew whenever a command line or a
    config.json is.
    """
    known = get_args(globals()[option])
    if name not in known:
        globals()[option] = Literal.__getitem__((*known, name))


def refuse_taken(what: str, name: str, old: type | None, new: type) -> None:
    """Raise ValueError where `name` stands for another class already: `old`, if for any.

    The same class anew, of a module that is loaded again, may take its own place.
    """
    if old is not None and (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
        raise ValueError(f"{what} {name!r}: {old.__module__}.{old.__qualname__} has this name; choose another")


Switch = Annotated[bool | None, _TAKES_NO_VALUE]
"""`--name` or `--no-name`; None where neither is given: as the device and the run suggest."""


@dataclass(frozen=True)
class Limit:
    """A condition on a field's value, unless that is None: `ect.options.check` holds each value against the limits beside it.

    Args: expected: names it in an error, after "expected". holds: whether a value meets it.
    """

    expected: str
    holds: Callable[[Any], bool]


def at_most(most: int) -> Limit:
    """Limit a number from above, so that a slip of the finger is refused, and not tried."""
    return Limit(f"at most {most:,}", lambda value: value <= most)


def refuse_beyond(options: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise UserError naming the first option whose value is not None and beyond one of the limits behind it."""
    for name, (value, *limits) in options.items():
        for limit in limits:
            if value is not None and not limit.holds(value):
                raise UserError(f"--{name} {value}: expected {limit.expected}")


COOLDOWN_SHARE = 0.2
"""The part of a run that cools down: the longer of those that Hagele et al. recommend (arXiv 2405.18392)."""
WEIGHT_FLOOR = 0.05
"""The floor of the adaptive weight as it was tried on the digits, images of 64 values in [-1, 1]."""
DRAWN = 10**8
"""The most images that a teacher draws for a run."""
MAX_STEPS = 1000
"""The Heun sampler takes at most so many steps."""
COUNT = at_most(10**6)
"""One command makes at most so many images: their seeds are in memory."""
KIMG = at_most(10**9)
BATCH = at_most(2**20)
THREADS = at_most(1024)
IMAGES = at_most(10**7)
SIGMA_DATA = Limit("a number from 0.0001 to 10,000", lambda sigma: 1e-4 <= sigma <= 1e4)
ABOVE_0 = Limit("greater than 0", lambda value: value > 0)
SEED = Limit("from 0 to 2^31 - 1", lambda seed: 0 <= seed < 2**31)
FROM_0 = Limit("0 or greater", lambda value: value >= 0)
FROM_1 = Limit("at least 1", lambda value: value >= 1)
BELOW_1 = Limit("from 0 to below 1", lambda value: 0 <= value < 1)
SOME = Limit("at least 2", lambda count: count >= 2)
FOURS = Limit("a multiple of 4", lambda value: value >= 4 and value % 4 == 0)
NUMBER = at_most(10**6)
SIZES = Limit("up to 15 sizes from 1 to 4,096", lambda sizes: len(sizes) <= 15 and all(1 <= n <= 4096 for n in sizes))
FEW_LEVELS = Limit(
    f"at most {MAX_LEVELS} factors, each up to 64", lambda m: len(m) <= MAX_LEVELS and max([0, *m]) <= 64
)
FACTORS = Limit("one factor of at least 1 for each resolution", lambda mult: min(mult, default=0) >= 1)
FALLING = Limit(
    f"noise levels that fall from {SIGMA_MAX:g} towards 0",
    lambda mid_t: all(a > b > 0 for a, b in itertools.pairwise((SIGMA_MAX, *mid_t))),
)
EACH_BELOW_1 = Limit("from 0 to below 1", lambda values: all(0 <= value < 1 for value in values))
FEW_EMAS = Limit(f"1 to {emas.MAX_EMAS} weight averages, each once", emas.are_few)
SIGMA_REL = Limit(f"a relative width from {emas.NARROWEST} to {emas.WIDEST}", emas.is_width)
POWER_EMAS = Limit(f"power profiles such as rel:.05, of {SIGMA_REL.expected}", emas.have_widths)
KERNELS = Limit(choice.expected(), choice.can_be_read)
TARGET = Limit(targets.EXPECTED, lambda text: targets.wanted(text) is not None)
GUIDANCE = Limit("a weight from 0 to 100", lambda weight: 0 <= weight <= 100)
EMA_DECAYS = Limit(
    "decays per step from 0 to below 1, such as .9999, or power profiles such as rel:.05", emas.are_decays
)


@dataclass(frozen=True)
class DataConfig:
    source: str = "digits"
    """'digits' (ships with the package), or a path: CIFAR-10 tarball or folder, folder of IDX files (Fashion-MNIST), EDM
    zip, folder of images. 'teacher': images that the diffusion model of --init-from draws, so no data is needed."""
    resolution: Annotated[int | None, FOURS, at_most(4096)] = None
    """Resize and centre-crop a folder of images to this size (pixels). None: all images must already agree."""
    convert: Literal["rgb", "grey"] | None = None
    """Make a folder or zip of images RGB or grey: transparency on white, palettes, CMYK and 16 bits included. None: all must
    already be of one kind, 8-bit grey or RGB."""
    labels: bool = False
    """Train class-conditionally on the data set's labels."""
    xflip: bool = False
    """Flip each image horizontally with probability 1/2."""
    augment: Annotated[float, Limit("a probability", lambda p: 0 <= p <= 1)] = 0.0
    """Probability of each of EDM's geometric augmentations (EDM pretraining: 0.12). 0 switches the pipe off."""
    teacher_samples: Annotated[int, FROM_1, at_most(DRAWN)] = 50_000
    """Images that --data.source teacher draws, of 35 network evaluations each."""


@dataclass(frozen=True)
class NetConfig:
    arch: Architecture = "ddpmpp"
    """DDPM++ and NCSN++ are SongUNets (Song et al., 2021), ADM is the DhariwalUNet (Dhariwal & Nichol, 2021), EDM2 is Karras et
    al., 2024: with heads of 64 channels, -narrow of 16. edm2-xs to edm2-xxl are its published sizes, in place of the widths,
    blocks and attention below."""
    model_channels: Annotated[int, FOURS, at_most(4096)] = 128
    """Channels at the first resolution, times channel_mult at the others."""
    channel_mult: Annotated[tuple[int, ...], FACTORS, FEW_LEVELS] = (2, 2, 2)
    num_blocks: Annotated[int, FROM_1, at_most(MAX_BLOCKS)] = 4
    """Residual blocks a resolution."""
    attn_resolutions: Annotated[tuple[int, ...], SIZES] = (16,)
    dropout: Annotated[float, BELOW_1] = 0.2
    label_dropout: Annotated[float, BELOW_1] = 0.0
    """Probability of dropping a class label (for classifier-free guidance)."""
    sigma_data: Annotated[float, ABOVE_0, SIGMA_DATA] = 0.5
    """Standard deviation of the data in [-1, 1], as the preconditioning assumes it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    kind: Kind = "consistency"
    """'consistency' tunes with ECT; 'diffusion' trains a denoiser with EDM's loss."""
    P_mean: Annotated[float, Limit("from -20 to 20", lambda mean: -20 <= mean <= 20)] = -1.1
    """Mean of ln(t)."""
    P_std: Annotated[float, ABOVE_0, at_most(20)] = 2.0
    """Standard deviation of ln(t)."""
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    """The formula by which r follows from t and the stage (consistency only)."""
    q: Annotated[float, Limit("greater than 1", lambda q: q > 1), at_most(2**16)] = 2.0
    """Each stage divides the gap 1 - r/t by q."""
    k: Annotated[float, FROM_0, NUMBER] = 8.0
    """Extra gap at small t: n(t) = 1 + k sigmoid(-b t)."""
    b: Annotated[float, FROM_0, NUMBER] = 1.0
    c: Annotated[float, FROM_0, NUMBER] = 0.0
    """Pseudo-Huber constant, >= 0; 0 is the plain L2 norm."""
    weighting: Literal["inverse_gap", "inverse_c_out_sq", "inverse_t", "inverse_t_sq", "uniform", "adaptive"] = (
        "inverse_gap"
    )
    """w(t, r): 1/(t-r), 1/c_out(t)^2, 1/t, 1/t^2 or 1; 'adaptive': 1/max(H, weight_floor), H the pseudo-Huber distance of
    the target D_r from the clean image (ADCM, arXiv 2510.17266)."""
    n_stages: Annotated[int, FROM_1, at_most(10**4)] = 8
    """Number of stages of the mapping."""
    stage_kimg: Annotated[float, ABOVE_0, KIMG] = 3200.0
    """Length of one stage; the last stage lasts to the end of the run."""
    target: Literal["self", "teacher", "posterior"] = "self"
    """The place of x_r, the pair of x_t: at the same noise ('self', ECT), or one step from x_t along the ODE of the frozen
    pretrained network ('teacher', consistency distillation) or of the training images themselves ('posterior')."""
    min_gap: Annotated[float, BELOW_1] = 0.0
    """The gap 1 - r/t stops closing at this value, such as .001. 0: it closes to that of the last stage."""
    weight_floor: Annotated[float, ABOVE_0, NUMBER] = WEIGHT_FLOOR
    """The least distance that 'adaptive' divides by. Where r = 0 the distance is 0, and the weight 1/weight_floor."""
    direction: Literal["difference", "features"] = "difference"
    """The way of D_t to its target: along their difference (ECT), or along the gradient of their distance in features of the
    data set, which python -m ect.tangent trains before ('features'; Align Your Tangent, arXiv 2510.00658)."""
    guidance: Annotated[float | None, GUIDANCE] = None
    """Distil a guided teacher: its answer with a class, D, moved away from that without, D_u + guidance (D - D_u). None: D."""


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["radam", "adam"] = "radam"
    lr: Annotated[float, ABOVE_0, NUMBER] = 1e-4
    betas: Annotated[tuple[float, float], EACH_BELOW_1] = (0.9, 0.999)
    eps: Annotated[float, FROM_0, NUMBER] = 1e-8
    clip: Annotated[float | None, ABOVE_0, at_most(10**9)] = None
    """Clip the gradient's global L2 norm to this value. None: no clipping."""
    warmup_kimg: Annotated[float, FROM_0, KIMG] = 0.0
    """Linear warm-up of the learning rate from 0."""
    decay: Literal["constant", "linear", "rsqrt", "cooldown"] = "constant"
    """After decay_kimg: keep lr, fall linearly to 0 at total_kimg, or fall as sqrt(decay_kimg / kimg). 'cooldown': keep lr, but
    over the last cooldown_share of the run fall as 1 - sqrt(u), with u from 0 to 1."""
    decay_kimg: Annotated[float, FROM_0, KIMG] = 0.0
    emas: Annotated[tuple[str, ...], FEW_EMAS, POWER_EMAS, EMA_DECAYS] = (".9999",)
    """Weight averages, 1 to 4: the decay of each per step, or the relative width of its power profile (EDM2), as in
    --optim.emas .9999 rel:.05. The first is the model that a run makes; ect.sample and ect.evaluate take the second with
    --ema 1."""
    ema_rampup: Annotated[float | None, ABOVE_0, NUMBER] = None
    """Early in a run, let the half-life of each average of constant decay be at most this fraction of the images seen (EDM:
    0.05). A power profile needs none."""
    cooldown_share: Annotated[float, ABOVE_0, BELOW_1] = COOLDOWN_SHARE
    """Part of the run that its cooldown takes, .1 to .2 as published."""


@dataclass(frozen=True)
class LogConfig:
    stats_kimg: Annotated[float, FROM_0, KIMG] = 6.4
    """Interval of the rows in stats.jsonl and TensorBoard."""
    sample_kimg: Annotated[float, FROM_0, KIMG] = 256.0
    """Interval of sample grids (0: only at the start and the end)."""
    eval_kimg: Annotated[float, FROM_0, KIMG] = 0.0
    """Interval of evaluation (0: only at the end)."""
    checkpoint_kimg: Annotated[float, FROM_0, KIMG] = 256.0
    """Interval of checkpoints (0: only at the end)."""
    keep: Annotated[int, FROM_1, NUMBER] = 3
    """Keep this many latest checkpoints."""
    levels: bool = False
    """Say in each row, by noise level, how large the gap t - r is and how large the pairs themselves suggest that it be, and
    draw it into levels.png at the end. It costs some launches a step."""
    weights_kimg: Annotated[float, FROM_0, KIMG] = 0.0
    """Interval at which the weights themselves, no average, are kept in the folder `weights`, in fp16 (0: never); python -m
    ect.merge makes averages of them."""
    averages_kimg: Annotated[float, FROM_0, KIMG] = 0.0
    """Interval at which the averages by power profiles (--optim.emas rel:.05 rel:.10) are kept in the folder `averages`, and at
    the end (0: never); python -m ect.merge --posthoc makes averages of other widths of them."""
    kept_precision: Literal["fp16", "fp32"] = "fp16"
    """Precision of the parameters that weights_kimg and averages_kimg keep."""


@dataclass(frozen=True)
class EvalConfig:
    samples: Annotated[int, Limit("0 (off) or at least 2", lambda count: count == 0 or count >= 2), IMAGES] = 50_000
    """Generated images a row of the table. 0 switches evaluation off."""
    batch: Annotated[int, FROM_1, BATCH] = 256
    mid_t: Annotated[tuple[float, ...], FALLING] = MID_T
    """Intermediate noise levels: one a network evaluation after the first."""
    weights: Path | None = None
    """Inception weights for image data sets (see python -m ect.evaluate --help)."""


@dataclass(frozen=True)
class Config:
    preset: str = "digits"
    """Name of the recipe the other fields default to."""
    total_kimg: Annotated[float, ABOVE_0, KIMG] = 1024.0
    """Length of the run in thousands of images."""
    batch: Annotated[int, FROM_1, BATCH] = 128
    """Images an optimizer step."""
    batch_per_device: int | Literal["auto"] | None = None
    """Images a forward pass: a divisor of each device's share of batch; gradients accumulate. None: the whole share at
    once; 'auto': as many as the predicted memory allows."""
    seed: Annotated[int, SEED] = 0
    init_from: Path | None = None
    """Pretrained network: a public EDM/ECT .pkl or one of our .safetensors."""
    pretrain: str | None = None
    """A diffusion phase before the tuning, where no --init-from gives its network: total_kimg, objective and optim of this
    preset, and all else as in the run. None: no such phase."""
    pretrain_kimg: Annotated[float | None, ABOVE_0, KIMG] = None
    """Length of that phase. None: as in its preset."""
    resume: Path | None = None
    """A run folder or a checkpoint of it: continue there."""
    cooldown: bool = False
    """Branch off the run of --resume, which stays as it is: a new run goes on from its checkpoint, and its learning rate falls
    as --optim.decay cooldown has it. --optim.cooldown-share or --total-kimg says where it ends."""
    run_dir: Path | None = None
    """Folder of the run. None: runs/<number>-<preset>."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1'."""
    threads: Annotated[int | None, FROM_1, THREADS] = None
    """CPU threads. None: as many as CPUs that this process may use."""
    heartbeat: Annotated[float, Limit("from 1 to 86,400 seconds", lambda seconds: 1 <= seconds <= 86_400)] = 60.0
    """Seconds of silence after which one of several processes is lost: the others say so, and end."""
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
    kernels: Annotated[str, KERNELS] = ""
    """Backends of the fused ops, e.g. 'group_norm_silu=cuda,*=triton' (python -m ect_kernels lists them). Empty: automatic."""
    self_check: Switch = None
    """Compare kernels, compiled network and captured update with plain ones before the first step, and go on without what
    fails. None: on a GPU."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    plan: bool = False
    """Print what the run would cost on six GPUs, counted and predicted, and stop: FLOPs, hours, memory."""
    data: DataConfig = DataConfig()
    net: NetConfig = NetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    target: Annotated[str | None, TARGET] = None
    """A figure of quality at which the run ends, as in fid=2.73: once an evaluation at an interval (--log.eval-kimg) has it at
    or below that, and images of other seeds confirm it. fid@1=4.5 is by 1 network evaluation, else by the most that the run
    is rated at. IS, precision and recall have to be at or above it."""
