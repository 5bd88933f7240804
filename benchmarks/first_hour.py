r"""The first hour on a GPU: python benchmarks/first_hour.py, or make gpu. For a machine with torch and nvcc and no network.

Two parts of at most --budget seconds each, what tells most first; each stage is a process of its own with a limit of its own,
and goes on where others failed. --out gets a log a stage, all figures, and report.md, written anew after each stage; its folder
`work` is large and need not be kept.

    part 1   the machine, the build, the self-check of kernels and trainer, a profile of the step, the GPU tests
    part 2   step_time, ops, a run of 400 steps on images made here, its resumption, the digits

Python packages that the machine lacks are taken from --wheels, a folder filled where there is a network:

    python -m pip download --only-binary=:all: --no-deps -d wheels \
        tyro typeguard docstring-parser typing-extensions safetensors pybind11 ninja \
        rich pygments markdown-it-py mdurl pytest-xdist execnet pytest-timeout

with --python-version 3.12 --platform manylinux2014_x86_64 or the like where that machine differs. A stage whose packages are
missing says so. --device cpu runs everything at small sizes: the test of this script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lib import first_hour_report
from lib.options import Parser, at_least, folder, possible_path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 8.0  # seconds below which a stage is not begun
ON_A_CPU = 600.0  # seconds of a stage there, where other work may want the cores
DISTRIBUTIONS = {"PIL": "pillow"}  # where a package is imported by another name
GRACE = 8.0  # seconds between asking a process to stop and killing it


@dataclass(frozen=True)
class Stage:
    """One process of the first hour.

    seconds: at most. needs: packages, by the names they are imported by. fresh: a folder of an earlier call, removed
    before.
    """

    name: str
    part: int
    seconds: float
    command: list[str]
    needs: str = ""
    fresh: Path | None = None


@dataclass
class Outcome:
    """status: ok, failed, out of time, not run. why: of the latter; of a failure its last line. log: its file in the folder."""

    name: str
    part: int
    status: str
    why: str = ""
    seconds: float = 0.0
    log: str = ""


def stages(device: str, out: Path) -> list[Stage]:
    """Return all stages, in order; on a CPU at small sizes."""
    gpu, work, py = device != "cpu", out / "work", sys.executable
    where = ["--device", device.partition(":")[0]]  # the environment shows the stages one GPU alone
    cifar, run, check, demo = work / "cifar-10-python.tar", work / "run", work / "check", work / "digits"
    train = [py, "-m", "ect.train", *where]
    tune = [*train, "--preset", "cifar10-1h", "--data.source", str(cifar), "--eval.samples", "0"]
    build = [py, "setup.py", "build_ext", "--build-temp", str(work / "build"), "--build-lib", str(work / "lib")]
    tests = [py, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    if gpu:
        size, short, kimg, often = [], [], 0.128, (50, 200, 400, 450)  # kimg: of a step
        build += ["--inplace"]
        profile, times, ops = ["--net", "ddpmpp"], ["--rounds", "5", "--limit", "150"], []
        kernels, training = gpu_tests("tests/kernels"), gpu_tests("tests")
    else:
        size = ["--threads", "1", "--batch", "8", "--net.model-channels", "8", "--net.channel-mult", "1", "1", "1"]
        size += ["--net.num-blocks", "1", "--net.attn-resolutions"]
        short = ["--total-kimg", "0.128", "--pretrain-kimg", "0.128", "--eval.samples", "0"]
        kimg, often = 0.008, (1, 4, 8, 10)
        profile = ["--net", "digits", "--batch", "4", "--rounds", "1"]
        times, ops = [*profile, "--rows", "+flat optimizer"], ["--op", "skip_product"]
        kernels, training = ["tests/kernels/test_levels.py"], ["tests/test_gpu.py"]
    stats, save, end, more = (f"{steps * kimg:g}" for steps in often)
    every = ["--log.stats-kimg", stats, "--log.sample-kimg", save, "--log.checkpoint-kimg", save]
    two = ["--self-check", "--total-kimg", f"{2 * kimg:g}", "--run-dir", str(check)]
    trainer, benchmark = "torch numpy PIL safetensors rich tyro", "torch numpy PIL safetensors rich"
    found = [
        Stage("machine", 1, 40, [py, "benchmarks/machine_facts.py", str(out / "machine.json")]),
        Stage("build", 1, 240, build, "setuptools"),
        Stage("self-check of the kernels", 1, 60, [py, "-m", "ect_kernels", "--check"], "torch rich"),
        Stage("images", 1, 40, [py, "benchmarks/synthetic_cifar.py", str(cifar)], "numpy"),
        Stage("self-check of the trainer", 1, 90, [*tune, *size, *two], trainer, check),
        Stage(
            "profile",
            1,
            170,
            [py, "benchmarks/profile_step.py", *where, *profile, "--out", str(out / "profile.json")],
            benchmark,
        ),
        Stage("GPU tests of the kernels", 1, 150, [*tests, *kernels], "torch numpy pytest"),
        Stage("GPU tests of training", 1, 150, [*tests, *training], f"{trainer} pytest"),
        Stage(
            "step_time",
            2,
            270,
            [py, "benchmarks/step_time.py", *where, *times, "--results", str(out / "results")],
            benchmark,
        ),
        Stage("ops", 2, 60, [py, "benchmarks/ops.py", *where, "--quick", *ops], "torch rich"),
        Stage("images again", 2, 40, [py, "benchmarks/synthetic_cifar.py", str(cifar)], "numpy"),
        Stage("run", 2, 120, [*tune, *size, *every, "--total-kimg", end, "--run-dir", str(run)], trainer, run),
        Stage("resume", 2, 60, [*tune, *size, *every, "--total-kimg", more, "--resume", str(run)], trainer),
        Stage("digits", 2, 90, [*train, *short, "--run-dir", str(demo)], trainer, demo),
    ]
    return found if gpu else [replace(stage, seconds=ON_A_CPU) for stage in found]


def gpu_tests(folder: str) -> list[str]:
    """Return the files under a folder that have a test which needs a GPU.

    Those under tests/kernels are returned for that folder only: other ones may import what this machine has not.
    """
    files = sorted((ROOT / folder).rglob("test_*.py"))
    kernels = ROOT / "tests" / "kernels"
    wanted = [path for path in files if (kernels in path.parents) == (ROOT / folder == kernels)]
    return [str(path.relative_to(ROOT)) for path in wanted if "mark.gpu" in path.read_text(encoding="utf-8")]


def plugins(device: str, environment: dict[str, str]) -> list[str]:
    """Return the options of pytest for the plugins that are there: on a GPU several tests at a time, and a limit for each."""
    absent, workers = missing("xdist pytest_timeout", environment), "0" if device == "cpu" else "8"
    limit = [] if "pytest_timeout" in absent else ["--timeout", "120"]
    return [*([] if "xdist" in absent else ["-n", workers]), *limit]


def missing(packages: str, environment: dict[str, str]) -> list[str]:
    """Return those packages that a stage's Python cannot import."""
    code = "import sys, importlib.util as u; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
    command = [sys.executable, "-c", code, *packages.split()]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


def environment(device: str, out: Path) -> dict[str, str]:
    """Return the environment of every stage: this checkout, and the packages of --wheels before the machine's own.

    Nothing is fetched.
    """
    paths = [out / "work" / "site", ROOT, ROOT / "kernels", ROOT / "benchmarks"]
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    found["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    found["PATH"] = os.pathsep.join([str(paths[0] / "bin"), os.environ.get("PATH", "")])  # ninja's wheel has a program
    if device.startswith("cuda:"):  # the one GPU that any stage sees, whatever it does with devices
        index, visible = int(device.removeprefix("cuda:")), os.environ.get("CUDA_VISIBLE_DEVICES")
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    extension = "ECT_SKIP_CUDA" if device == "cpu" else "ECT_CUDA_REQUIRED"  # no extension: the build has failed
    return found | {extension: "1"}


def install(wheels: Path, out: Path, environment: dict[str, str]) -> str:
    """Put the wheels of a folder where the stages find them; says what came of it."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return f"no wheels in {wheels}"
    quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(out / "work" / "site"), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    names = ", ".join(Path(file).name for file in files)
    return (
        f"installed {names}" if done.returncode == 0 else f"pip could not install {names}: {done.stderr.strip()[-300:]}"
    )


def run(stage: Stage, number: int, left: float, out: Path, environment: dict[str, str]) -> Outcome:
    """Run a stage within its limit and what is left of the part's."""
    outcome = Outcome(stage.name, stage.part, "not run", log=f"logs/{stage.part}{number:02d}-{slug(stage.name)}.log")
    absent = missing(stage.needs, environment)
    if absent:
        names = ", ".join(DISTRIBUTIONS.get(name, name) for name in absent)
        outcome.why = f"needs {names}: pip download it beforehand, and pass the folder by --wheels"
        return outcome
    limit = min(stage.seconds, left)
    if limit < LEAST:
        outcome.why = "no time left"
        return outcome
    if stage.fresh is not None:
        shutil.rmtree(stage.fresh, ignore_errors=True)
    log, start = out / outcome.log, time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(stage.command)}\n")
        file.flush()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    outcome.seconds = time.monotonic() - start
    outcome.status = "ok" if code == 0 else "out of time" if code is None else "failed"
    outcome.why = first_hour_report.telling(log.read_text(encoding="utf-8", errors="replace")) if code != 0 else ""
    if code is None:
        outcome.why = f"stopped after {limit:.0f} s; {outcome.why}"
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a stage and what it started: first in a way that lets it save."""
    for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 0.0)):
        if process.poll() is not None and number == signal.SIGTERM:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        if grace:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    process.wait()


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def earlier(out: Path) -> list[Outcome]:
    """Return the outcomes of other calls with the same folder."""
    path = out / "stages.json"
    return [Outcome(**found) for found in json.loads(path.read_text())] if path.is_file() else []


def keep(out: Path, known: list[Outcome], notes: list[str]) -> None:
    """Write what is known, and the report."""
    (out / "stages.json").write_text(
        json.dumps([asdict(outcome) for outcome in known], indent=1) + "\n", encoding="utf-8"
    )
    first_hour_report.write(out, [asdict(outcome) for outcome in known], notes)


def work(options: argparse.Namespace) -> Iterator[Outcome]:
    """Run the stages that were asked for."""
    out: Path = options.out.resolve()
    (out / "work").mkdir(parents=True, exist_ok=True)
    env = environment(options.device, out)
    notes = [install(options.wheels, out, env)] if options.wheels is not None else []
    if options.device == "cpu":
        notes.append("on a CPU, at small sizes: a test of the script, no measurement")
    for note in notes:
        print(note, flush=True)
    known, extra = earlier(out), plugins(options.device, env)
    for part in options.part or (1, 2):
        start = time.monotonic()
        for number, stage in enumerate(stages(options.device, out)):
            if stage.part != part or (options.only and stage.name not in options.only):
                continue
            if stage.name == "images again" and (out / "work" / "cifar-10-python.tar").is_file():
                continue
            if "pytest" in stage.command:
                stage.command.extend(extra)
            print(f"== {stage.name}", flush=True)
            outcome = run(stage, number, options.budget - (time.monotonic() - start), out, env)
            known = [old for old in known if old.name != outcome.name] + [outcome]
            keep(out, known, notes)
            print(f"   {outcome.status}, {outcome.seconds:.1f} s. {outcome.why}".rstrip(), flush=True)
            yield outcome


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2), action="append", help="default: both")
    parser.add_argument(
        "--budget", type=at_least(0, float), default=575, help="seconds that a part may take (default: 575)"
    )
    parser.add_argument("--out", type=folder, default=ROOT / "runs" / "first-hour", help="folder of report and figures")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu: everything at small sizes")
    wheels = ROOT / "wheels"
    parser.add_argument(
        "--wheels", type=possible_path, default=wheels if wheels.is_dir() else None, help="default: wheels, if there"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        parser.error(f"--device {options.device}: expected cuda, cuda:1 or cpu")
    gpus = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if ":" in options.device and gpus and int(options.device.partition(":")[2]) >= len(gpus):
        parser.error(f"--device {options.device}: CUDA_VISIBLE_DEVICES shows {len(gpus)} GPUs, counted from 0")
    known = [stage.name for stage in stages(options.device, options.out)]
    for name in options.only or []:
        if name not in known:
            parser.error(f"--only: no stage {name!r}; known: {', '.join(map(repr, known))}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels}: no such folder; leave it out, or fill one by pip download")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as by an impatient timeout: the stage must not live on
    results = list(work(options))
    print(f"report: {options.out / 'report.md'}")
    return 0 if all(outcome.status == "ok" for outcome in results) else 1


if __name__ == "__main__":
    sys.exit(main())
