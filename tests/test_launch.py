"""How one of several processes begins and ends: its environment, its command line beside the others', its last words."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ect.errors import UserError
from ect.ranks import interrupts, launch
from ect.ranks.distributed import Lost, Severed, World, bounded, find
from ect.ranks.ending import GRACE, Ending
from ect.ranks.heartbeat import STATUS, End, Heartbeat
from ect.ranks.place import Place
from ect.ranks.roster import hello, refusal
from tests.tiny import config

ENVIRONMENT = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Put back what answers signals, which `report` ignores."""

    def heard(number: int, frame: object) -> None:
        raise AssertionError(f"signal {number} was heard")

    with interrupts.answered_by(heard):
        yield


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(**changes: str | None) -> None:
        for name, value in {**ENVIRONMENT, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return put


def test_the_place_is_that_of_the_environment(environment: Callable[..., None]) -> None:
    environment()
    assert Place.read() == Place(1, 2, 1, 2, "127.0.0.1", 29500, True)
    environment(LOCAL_RANK=None, LOCAL_WORLD_SIZE=None, TORCHELASTIC_USE_AGENT_STORE=None)
    assert Place.read() == Place(1, 2, 0, 1, "127.0.0.1", 29500, False)
    environment(**dict.fromkeys(ENVIRONMENT))
    assert Place.read() == Place()
    environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR=None)
    assert Place.read() == Place()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: expected a number from 1 to "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a number from 1 to "),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: expected a number from 1 to "),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0: expected a number"),
        ({"RANK": "5"}, "RANK=5: expected a number from 0 to 1, below WORLD_SIZE=2; start the processes with torchrun"),
        ({"RANK": "-1"}, "RANK=-1: expected a number from 0 to 1"),
        ({"RANK": "two"}, "RANK=two: expected a number from 0 to 1"),
        ({"RANK": None}, "WORLD_SIZE=2: RANK is not set"),
        ({"WORLD_SIZE": None}, "RANK=1: expected a number from 0 to 0, below WORLD_SIZE=1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected a number from 0 to 1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: expected a number from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: expected a number from 1 to 2"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, and WORLD_SIZE=2: rank 0 cannot be found"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: expected a number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a number from 1 to 65535"),
    ],
)
def test_an_environment_that_cannot_be_is_bad_input(
    changes: dict[str, str | None], said: str, environment: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    environment(**changes)
    assert launch.launch(pytest.fail, pytest.fail) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and len(error.splitlines()) == 1 and len(error) < 300
    assert "unset RANK and WORLD_SIZE" in error


def hellos(*options: Any, **changes: Any) -> list[dict[str, Any]]:
    return [{"rank": i, "size": len(options), **hello(cfg, None, "")} for i, cfg in enumerate(options)]


def test_ranks_of_one_command_line_fit() -> None:
    assert refusal(hellos(config(), config(), config())) is None
    assert refusal(hellos(Path("a"), Path("a"))) is None
    ended = [{"rank": rank, "size": 2, **hello(None, 0, "")} for rank in range(2)]
    assert refusal(ended) == (0, "")  # --help


def test_what_does_not_fit_is_named() -> None:
    base = config()
    status, said = refusal(hellos(base, base, replace(base, seed=7))) or (0, "")
    assert status == 2
    assert said == "rank 2 of 3 has other options than rank 0: --seed 7 for 0; give all the same"
    many = replace(base, seed=7, batch=16, optim=replace(base.optim, lr=1.0, eps=1.0), threads=None)
    assert "--batch 16 for 8, " in refusal(hellos(base, many))[1] and " and 2 more; " in refusal(hellos(base, many))[1]  # type: ignore[index]
    assert "--command b for a" in refusal(hellos(Path("a"), Path("b")))[1]  # type: ignore[index]
    for name, value in (("rank", 0), ("size", 3)):
        told = hellos(base, base)
        told[1][name] = value
        said = {"rank": "RANK=0: two processes have this number", "size": "rank 1 was started as one of 3 (WORLD_SIZE)"}
        assert refusal(told)[1].startswith(said[name])  # type: ignore[index]


@pytest.mark.parametrize(
    ("first", "second", "status", "said"),
    [
        (None, (2, "--batch 0: no"), 2, "rank 1 of 2 refuses its command line: --batch 0: no"),
        ((2, ""), None, 2, ""),  # rank 0 has said it
        ((2, ""), (2, "--batch 0: no"), 2, ""),
        ((0, ""), (2, "--batch 0: no"), 2, "rank 1 of 2 refuses its command line: --batch 0: no"),
        (None, (0, ""), 2, "rank 1 of 2 has nothing to run (--help or --dry-run), and others have; give all the same"),
        ((0, ""), None, 2, "rank 0 of 2 has nothing to run (--help or --dry-run), and others have; give all the same"),
    ],
)  # fmt: skip
def test_a_refusal_of_one_is_that_of_all(first: Any, second: Any, status: int, said: str) -> None:
    ranks = [
        {"rank": i, "size": 2, **(hello(config(), None, "") if told is None else hello(None, *told))}
        for i, told in enumerate((first, second))
    ]
    found = refusal(ranks)
    assert found is not None and found[0] == status and found[1].startswith(said) and bool(found[1]) == bool(said)


def test_only_rank_0_answers_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        print("warning", file=sys.stderr)
        raise UserError("--x 1")

    for first, said in ((True, "warning\nerror: --x 1\n"), (False, "")):
        options, told = launch._read(refuse, first)
        assert options is None and told["status"] == 2 and told["said"] == ("" if first else "warning\n--x 1")
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "status"),
    [(SystemExit(2), 2), (SystemExit(0), 0), (SystemExit(), 0), (SystemExit("no"), 1), (KeyError("x"), 1)],
)
def test_a_command_line_that_ends_the_process_is_told_too(error: BaseException, status: int) -> None:
    def end() -> None:
        raise error

    options, told = launch._read(end, first=False)
    assert (
        options is None
        and told["status"] == status
        and ("KeyError: 'x'" in told["said"]) == isinstance(error, KeyError)
    )
    assert launch._read(lambda: None, first=True)[1]["status"] == 0
    assert launch._read(config, first=True)[1]["status"] is None


class Told(Heartbeat):
    """A heartbeat that knows the first end already, or hears of it when asked."""

    def __init__(self, rank: int, first: End | None) -> None:
        super().__init__(rank, 3, {}, 60, 600, lambda end: None)
        self.first = first
        self.way_back = lambda: "WAY BACK"
        self.recorded: list[tuple[str, str]] = []
        self.record = lambda event, text: self.recorded.append((event, text))

    def first_end(self, seconds: float) -> End | None:
        return self.first

    def report(self, end: End) -> End:
        return self.first or end


def last_words(rank: int, first: End | None = None, served: bool = True, quiet: bool = False) -> Ending:
    words = Ending(Place(rank, 3, rank, 3, "host", 1, served), quiet)
    words.heartbeat, words.interrupted = Told(rank, first), "interrupted; saved"
    return words


LOST = End(1, "lost", STATUS, "was killed")
SENTENCE = "error: rank 1 of 3 was killed; WAY BACK\n"


@pytest.mark.parametrize(
    ("rank", "error", "first", "said", "status"),
    [
        (1, RuntimeError("mine"), None, "rank 1 of 3 failed:\nRuntimeError: mine\n", 1),
        (1, UserError("--x 1"), None, "error: --x 1\n", 2),
        (1, KeyboardInterrupt(15), None, "interrupted; saved\n", 143),
        (0, RuntimeError("mine"), LOST, SENTENCE, STATUS),
        (0, Severed("Connection closed by peer"), LOST, SENTENCE, STATUS),
        (0, KeyboardInterrupt(15), LOST, SENTENCE, STATUS),  # of torchrun, which saw it too
        (2, Severed("Connection closed by peer"), LOST, "", STATUS),  # rank 0 speaks
        (1, Severed("Connection closed by peer"), LOST, SENTENCE, STATUS),  # it was stopped, and goes on
        (0, Severed("closed"), End(1, "told", 2), "", 2),
        (1, UserError("--x 1"), End(0, "told", 2), "", 2),
        (0, Severed("closed"), End(1, "failed", 1), "error: rank 1 of 3 failed, as its traceback says; WAY BACK\n", 1),
        (2, Severed("closed"), End(1, "failed", 1), "", 1),
        (2, Severed("closed"), End(0, "failed", 1), "", 1),
        (1, Severed("no route"), None,
         "error: rank 1 of 3: an exchange failed, though all ranks beat (no route); WAY BACK\n", STATUS),
        (1, Lost("rank 0 was not found"), None, "error: rank 0 was not found\n", STATUS),
    ],
)  # fmt: skip
def test_how_a_rank_ends(
    rank: int, error: BaseException, first: End | None, said: str, status: int, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = last_words(rank, first)
    assert words.report(error) == status
    signal.raise_signal(signal.SIGTERM)  # torchrun's, when another one ended first: it is too late for it
    found = capsys.readouterr().err
    assert found.startswith(said) if "mine" in str(error) and first is None else found == said


WORDS = [
    (0, RuntimeError("mine"), None, []),  # its own log has it
    (0, UserError("--x 1"), None, []),
    (0, Severed("closed"), LOST, [("lost", "rank 1 of 3 was killed")]),
    (0, KeyboardInterrupt(15), LOST, [("lost", "rank 1 of 3 was killed")]),
    (2, Severed("closed"), LOST, []),  # rank 0 writes it
    (2, Severed("closed"), End(0, "lost", STATUS, "was killed"), [("lost", "rank 0 of 3 was killed")]),
    (0, Severed("closed"), End(1, "failed", 1), [("failed", "rank 1 of 3 failed, as its traceback says")]),
    (0, Severed("closed"), End(1, "told", 2), [("failed", "rank 1 of 3 ended with status 2")]),
    (0, Severed("closed"), End(1, "told", 130), [("stop", "rank 1 of 3 ended with status 130")]),
    (1, Severed("closed"), End(0, "told", 2), []),
    (0, Severed("no route"), None,
     [("failed", "rank 0 of 3: an exchange failed, though all ranks beat (no route)")]),
]  # fmt: skip


@pytest.mark.parametrize(("rank", "error", "first", "recorded"), WORDS)
def test_the_history_of_a_run_says_how_its_ranks_ended(
    rank: int, error: BaseException, first: End | None, recorded: list[tuple[str, str]]
) -> None:
    words = last_words(rank, first, served=False)
    words.report(error)
    assert isinstance(words.heartbeat, Told) and words.heartbeat.recorded == recorded


def test_the_sentence_comes_once_and_the_process_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[Any] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(time, "sleep", left.append)
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    words = last_words(0, LOST)
    words.of_another(LOST)
    words.of_another(LOST)
    assert words.report(Severed("closed")) == STATUS
    assert left == [GRACE, STATUS] * 2 and capsys.readouterr().err == SENTENCE


class Gone:
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    flush = write


def test_a_process_ends_though_nobody_can_read_why(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "stderr", Gone())
    last_words(0, LOST).of_another(LOST)
    assert left == [STATUS]
    for error, status in ((RuntimeError("mine"), 1), (UserError("--x 1"), 2), (Severed("no route"), STATUS)):
        assert last_words(1).report(error) == status
    words = last_words(0, LOST)
    assert words.heartbeat is not None
    words.heartbeat.way_back = lambda: {}["a fault of its own"]
    with pytest.raises(KeyError):
        words.of_another(LOST)
    assert left == [STATUS] * 2


def test_without_rank_0_one_speaks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, str] = {}

    class Store:
        def compare_set(self, key: str, expected: str, value: str) -> bytes:
            return kept.setdefault(key, value).encode()

    class Gone:
        def compare_set(self, key: str, expected: str, value: str) -> bytes:
            raise RuntimeError("Connection reset by peer")

    lost = End(0, "lost", STATUS, "was killed")
    for store, served, speakers in ((Store(), True, 1), (Gone(), True, 2), (None, False, 2)):
        for rank in (1, 2):
            words = last_words(rank, lost, served)
            words.store = store
            words.tell(lost)
        assert capsys.readouterr().err == "error: rank 0 of 3 was killed; WAY BACK\n" * speakers


def test_who_has_nothing_to_run_says_nothing_of_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    words = last_words(0, LOST, quiet=True)
    words.tell(LOST)
    assert last_words(0, None, quiet=True).report(Lost("not found")) == STATUS
    assert capsys.readouterr().err == ""


def test_the_way_back_names_checkpoint_and_command() -> None:
    paths: list[Path | None] = [None]
    for local, command in (
        (2, "torchrun --nproc-per-node 2 -m ect.train --resume 'my run'"),
        (1, "python -m ect.train --resume 'my run' (by the launcher that started these 2 processes)"),
    ):
        beat = Told(0, None)
        World(0, 2, 0, local, None, Place(0, 2, 0, local), beat).can_go_on(Path("my run"), lambda: paths[-1], print)
        paths.append(None)
        assert beat.record is print
        assert beat.way_back() == f"there is no checkpoint yet; continue with: {command}"
        paths.append(Path("my run/checkpoint-7.safetensors"))
        assert beat.way_back() == f"the last checkpoint is my run/checkpoint-7.safetensors; continue with: {command}"
    assert "start the command again" in Heartbeat(0, 2, {}, 60, 600, lambda end: None).way_back()


def test_a_wait_ends_after_its_time() -> None:
    assert bounded(lambda: 7, 5) == 7
    with pytest.raises(LookupError, match="mine"):
        bounded(lambda: {}["mine"], 5)
    with pytest.raises(TimeoutError, match=r"nothing came within 0\.05 s"):
        bounded(lambda: time.sleep(1), 0.05)


def test_who_cannot_listen_or_find_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("EADDRINUSE\nand a stack")

    monkeypatch.setattr(dist, "TCPStore", refuse)
    for rank, kind, said in (
        (
            0,
            UserError,
            r"MASTER_ADDR=host MASTER_PORT=7: rank 0 cannot listen there \(EADDRINUSE\); choose a free port",
        ),
        (1, Lost, r"rank 0 of 2 was not found at MASTER_ADDR=host MASTER_PORT=7 within 3 s \(EADDRINUSE\)$"),
    ):
        with pytest.raises(kind, match=said) as error:
            find(Place(rank, 2, rank, 2, "host", 7), Told(rank, None), 3)
        assert type(error.value) is kind
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"this build of torch has no torch\.distributed"):
        find(Place(0, 2, 0, 2, "host", 7), Told(0, None), 3)


def test_a_failed_exchange_is_not_a_fault_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    def closed(*args: Any, **options: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:7\nand a stack")

    for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
        monkeypatch.setattr(dist, name, closed)
    world = World(0, 2)
    x = torch.ones(2)
    for fault in (torch.AcceleratorError("device-side assert"), torch.OutOfMemoryError("full")):  # this rank's GPU

        def broken(*args: Any, fault: Exception = fault, **options: Any) -> None:
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_reduce", broken)
            with pytest.raises(type(fault)):
                world.sum_(x)
    for exchange in (
        lambda: world.sum_(x), lambda: world.mean(1.0), lambda: world.any(True), lambda: world.gather(x),
        lambda: world.first(lambda: 1), lambda: world.agree({"a": "b"}), world.stop,
    ):  # fmt: skip
        with pytest.raises(Severed, match=r"^Connection closed by peer \[127\.0\.0\.1\]:7$"):
            exchange()
    with pytest.raises(LookupError):  # rank 0's own work
        world.first(lambda: {}["x"])
