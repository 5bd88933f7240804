"""The command line: presets, overrides, and what it says to bad input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ect.errors import UserError
from ect.files.run_folder import from_dict, load, run_folder, to_dict
from ect.options import check, parse, preset
from ect.presets import NOTES, PRESETS, by_name
from ect.show.dry_run import describe
from ect.train import main


def test_default_is_the_digits() -> None:
    assert parse([]) == PRESETS["digits"]


def test_any_field_is_overridden() -> None:
    args = "--preset cifar10-200k --objective.q 4 --optim.clip 1.5 --data.labels --net.channel-mult 1 2 --seed 3"
    cfg = parse(args.split())
    want = PRESETS["cifar10-200k"]
    want = replace(want, objective=replace(want.objective, q=4.0), optim=replace(want.optim, clip=1.5), seed=3)
    want = replace(want, data=replace(want.data, labels=True), net=replace(want.net, channel_mult=(1, 2)))
    assert cfg == want
    assert parse(["--pretrain", "None"]).pretrain is None


def test_the_one_hour_recipe() -> None:
    cfg = PRESETS["cifar10-1h"]
    assert cfg.total_kimg * 1000 == 8_000 * 128 and cfg.batch == 128
    assert (cfg.objective.q, cfg.objective.n_stages, cfg.optim.emas, cfg.net.dropout) == (256, 1, (".9993",), 0.2)
    assert (cfg.optim.optimizer, cfg.optim.lr, cfg.optim.betas, cfg.data.xflip) == ("radam", 1e-4, (0.9, 0.999), False)


@pytest.mark.parametrize(
    ("name", "kimg"), [("cifar10-100k", 12_800), ("cifar10-200k", 25_600), ("cifar10-400k", 51_200)]
)
def test_the_staged_recipes(name: str, kimg: int) -> None:
    cfg = PRESETS[name]
    assert cfg.total_kimg == kimg == cfg.objective.stage_kimg * cfg.objective.n_stages
    assert (cfg.objective.q, cfg.objective.n_stages, cfg.optim.emas) == (2, 8, (".9999",))


@pytest.mark.parametrize(
    ("name", "staged", "q"),
    [
        ("digits-one-stage", "digits", 64),
        ("cifar10-100k-one-stage", "cifar10-100k", 256),
        ("cifar10-400k-one-stage", "cifar10-400k", 256),
    ],
)
def test_the_recipes_of_one_stage_begin_where_the_staged_ones_end(name: str, staged: str, q: int) -> None:
    cfg, other = PRESETS[name], PRESETS[staged]
    last = other.objective
    assert cfg.objective == replace(last, q=q, n_stages=1, stage_kimg=cfg.total_kimg)
    assert q == last.q**last.n_stages  # one gap at the end
    assert replace(cfg, preset=staged, objective=last) == other


def test_help_says_which_recipes_are_not_measured(capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split()).replace(" │ │ ", " ")
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    for name, note in NOTES.items():
        assert f"{name} ({note})" in said
        assert any(f"`{name}`" in line and note in line for line in page.splitlines())
    unrun = {name for name in PRESETS if name.startswith(("imagenet64-", "ffhq64"))}
    assert set(NOTES) == unrun | {name for name in PRESETS if name.startswith("cifar10") and "one-stage" in name}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_survive_json(name: str) -> None:
    cfg = PRESETS[name]
    check(cfg)
    assert cfg.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    options = [word for line in describe(cfg).splitlines() if line[0] != "#" for word in shlex.split(line)]
    assert parse(options) == cfg


def test_unknown_preset_says_what_was_meant() -> None:
    with pytest.raises(UserError, match=r"cifar10-1hr.*did you mean cifar10-1h\?.*Known: digits"):
        preset("cifar10-1hr")
    with pytest.raises(UserError, match=r"--preset xyz: no such preset\. Known: "):
        preset("xyz")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--objectiv.q", "4"], "objective.q"),
        (["--objective.q", "four"], "objective.q"),
        (["--net.arch", "unet"], "ddpmpp"),
    ],
)
def test_unknown_or_ill_typed_options_say_what_was_meant(args: list[str], said: str, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        parse(args)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", "0"), ("--batch-per-device", "7"), ("--total-kimg", "0"), ("--seed", "-1"), ("--threads", "0"),
        ("--data.augment", "1.5"), ("--net.dropout", "1.0"), ("--net.label-dropout", "-0.1"), ("--net.sigma-data", "0"),
        ("--net.model-channels", "6"), ("--net.num-blocks", "0"), ("--log.keep", "0"), ("--eval.samples", "1"),
        ("--eval.batch", "0"), ("--eval.mid-t", "90"), ("--objective.q", "1"), ("--objective.c", "-0.1"),
        ("--objective.k", "-1"), ("--objective.P-std", "0"), ("--objective.n-stages", "0"), ("--objective.stage-kimg", "0"),
        ("--optim.lr", "0"), ("--optim.eps", "-1"), ("--optim.clip", "0"), ("--optim.emas", "1"),
        ("--pretrain", "cifar10-1h"), ("--optim.betas", "0.9 1"), ("--log.stats-kimg", "nan"),
        ("--total-kimg", "inf"), ("--pretrain-kimg", "-3"), ("--log.eval-kimg", "-1"), ("--optim.warmup-kimg", "-4"),
        ("--optim.ema-rampup", "-1"), ("--optim.decay-kimg", "-1"), ("--objective.b", "-3"), ("--net.channel-mult", "0"),
        ("--objective.n-stages", "24"), ("--threads", "100000"), ("--total-kimg", "1e300"), ("--batch", "100000000000"),
        ("--net.model-channels", "1000000"), ("--net.num-blocks", "10000000"), ("--net.channel-mult", "1 1 1 1 1 1 1 1 1 1 1"),
        ("--net.channel-mult", "1000000"), ("--net.sigma-data", "1e-300"), ("--net.sigma-data", "1e300"),
        ("--eval.samples", "1000000000000"), ("--eval.batch", "100000000000"), ("--log.stats-kimg", "1e300"),
        ("--data.resolution", "1000000"), ("--pretrain-kimg", "1e300"), ("--objective.stage-kimg", "1e300"),
    ],
)  # fmt: skip
def test_impossible_values_name_the_option(option: str, value: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main([option, *value.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and option in error and "expected" in error


def test_rsqrt_decay_needs_its_start() -> None:
    assert main(["--optim.decay", "rsqrt", "--optim.decay-kimg", "0"]) == 2


def test_dry_run_prints_and_needs_no_torch() -> None:
    code = "import sys; from ect.train import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--preset", "cifar10-1h", "--dry-run"], capture_output=True, text=True, check=True
    )
    assert "--objective.q 256.0" in done.stdout and "--total-kimg 1024.0" in done.stdout


@pytest.mark.parametrize(
    "text", ["garbage", "levels=fast", "level=cuda", "*=", "=x", "levels", "levels=cuda,no=cuda", "é\0"]
)
def test_a_dry_run_refuses_kernels_that_no_machine_has(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--kernels={text}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --kernels ") and len(said.splitlines()) == 1
    assert "expected op=backend with ops group_norm_silu, " in said and "backends reference, native" in said


@pytest.mark.parametrize("text", ["", "cuda", "*=triton", "levels=cuda, perturb=native,*=reference"])
def test_a_dry_run_takes_kernels_that_another_machine_may_have(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--kernels={text}", "--dry-run"]) == 0
    assert f"--kernels {shlex.quote(text)}" in capsys.readouterr().out


def test_resume_needs_a_run_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"--resume .*expected a run folder"):
            run_folder(path)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(PRESETS["cifar10-1h"])))
    assert run_folder(tmp_path) == tmp_path
    assert parse(["--resume", str(tmp_path)]).objective.q == 256
    typed = (
        '{"batch": "8"}',
        '{"optim": {"betas": [0.9]}}',
        '{"data": {"labels": 1}}',
        '{"net": {"arch": "unet"}}',
        '{"net": 3}',
    )
    for damage in ("{", '{"preset": "digits", "speed": 3}', "[]", *typed):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(UserError, match=r"config\.json: not a configuration"):
            load(tmp_path)


def test_two_presets_of_one_name_are_refused() -> None:
    one = {"mine": PRESETS["digits"]}
    assert by_name(one)["mine"].preset == "mine"
    with pytest.raises(ValueError, match="preset 'mine': two families have this name"):
        by_name(one, {"other": PRESETS["digits"]}, one)
