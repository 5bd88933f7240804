"""The heartbeat, its ranks in threads of this process: who comes, who is lost, and whose end came first."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ect.ranks import heartbeat
from ect.ranks.heartbeat import LATE, STATUS, End, Heartbeat

SILENCE = 1.0
CONNECTION = "ended without a word: it was killed, it crashed, or its machine failed"


class World:
    """Some ranks, and the ends that each was called with."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ends: dict[int, list[End]] = {rank: [] for rank in range(size)}
        self.ranks: dict[int, Heartbeat] = {}
        self.key = ""

    def make(self, rank: int, seconds: float = SILENCE, patience: float = 20.0, **hello: Any) -> Heartbeat:
        self.ranks[rank] = Heartbeat(rank, self.size, hello, seconds, patience, self.ends[rank].append)
        return self.ranks[rank]

    def start(self, *ranks: int, **options: Any) -> None:
        for rank in ranks or range(self.size):
            beat = self.make(rank, **options)
            if rank == 0:
                self.key = beat.listen()
            else:
                beat.join_rank_0("127.0.0.1", self.key)

    def heard(self, rank: int) -> list[End]:
        """The ends that this rank was called with, once there is one."""
        deadline = time.monotonic() + 5
        while not self.ends[rank] and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.ends[rank]

    def pose(self, rank: int, size: int | None = None) -> socket.socket:
        """Say hello as this rank, and no more."""
        port, token = json.loads(self.key)
        connection = socket.create_connection(("127.0.0.1", port))
        said = {"token": token, "hello": {"rank": rank, "size": size or self.size}}
        connection.sendall(json.dumps(said).encode() + b"\n")
        return connection


@pytest.fixture
def world() -> Iterator[Callable[[int], World]]:
    made: list[World] = []

    def make(size: int) -> World:
        made.append(World(size))
        return made[-1]

    yield make
    for one in made:
        for beat in one.ranks.values():
            if beat.is_alive():
                beat.leave()


def test_all_learn_what_each_was_started_with(world: Callable[[int], World]) -> None:
    three = world(3)
    three.start(0, status=None)
    three.make(2, word="two").join_rank_0("127.0.0.1", three.key)
    assert not three.ranks[0]._complete.wait(0.1)
    three.make(1, word="one").join_rank_0("127.0.0.1", three.key)
    for beat in three.ranks.values():
        assert [(hello["rank"], hello.get("word")) for hello in beat.meet()] == [(0, None), (1, "one"), (2, "two")]
    time.sleep(1.5 * SILENCE)  # they beat
    assert not any(beat.end for beat in three.ranks.values())
    for beat in three.ranks.values():
        beat.leave()
    assert three.ends == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_closed_connection_is_a_lost_rank(victim: int, world: Callable[[int], World]) -> None:
    three = world(3)
    three.start()
    for beat in three.ranks.values():
        beat.meet()
    three.ranks[victim]._decide = lambda end: None  # type: ignore[method-assign]  # it is dead
    for peer in list(three.ranks[victim]._peers):  # as the system does for a process that is killed
        peer.socket.shutdown(socket.SHUT_RDWR)
    lost = End(victim, "lost", STATUS, CONNECTION)
    for rank in {0, 1, 2} - {victim}:
        assert three.heard(rank) == [lost] and three.ranks[rank].end == lost


@pytest.mark.parametrize("silent", [0, 1])
def test_silence_is_a_loss_and_the_lost_rank_hears_of_it(silent: int, world: Callable[[int], World]) -> None:
    two, go = world(2), threading.Event()
    two.start()
    beat, turn = two.ranks[silent], two.ranks[silent]._turn
    beat.meet()
    beat._turn = lambda now: (go.wait(10), turn(time.monotonic()))[1]  # type: ignore[method-assign,func-returns-value]
    began = time.monotonic()
    lost = End(silent, "lost", STATUS, f"was not heard for {SILENCE:g} s (--heartbeat): it is stopped, or cut off")
    assert two.heard(1 - silent) == [lost]
    assert time.monotonic() - began > 0.9 * SILENCE
    go.set()  # it goes on, and finds what the other has said
    assert two.heard(silent) == [lost]


def test_who_was_stopped_itself_accuses_nobody(world: Callable[[int], World]) -> None:
    two = world(2)
    two.start(0, seconds=60)
    posing = two.pose(1)
    two.ranks[0].meet()
    beat, now = two.ranks[0], time.monotonic()
    peer = beat._peers[0]
    beat._turn(now + 50)  # 50 s without a turn: Ctrl-Z, and fg
    beat._turn(now + 70)
    assert beat.end is None and peer.seen >= now + 50
    for later in (90, 111):
        beat._turn(now + later)
    assert beat.end is not None and beat.end.rank == 1 and "not heard for 60 s" in beat.end.text
    posing.close()


def test_the_end_that_comes_first_is_that_of_all(world: Callable[[int], World]) -> None:
    three = world(3)
    three.start()
    for beat in three.ranks.values():
        beat.meet()
    told = [End(rank, "told", 2) for rank in range(3)]
    assert three.ranks[2].report(told[2]) == told[2]
    assert three.ranks[0].report(told[0]) == told[2] == three.ranks[1].report(told[1])
    assert three.heard(0) == three.heard(1) == [told[2]] and not three.ends[2]  # rank 2 reports it itself


def test_ranks_that_end_at_once_agree(world: Callable[[int], World]) -> None:
    four = world(4)
    four.start()
    found: list[End] = []
    threads = [
        threading.Thread(target=lambda rank=rank: found.append(four.ranks[rank].report(End(rank, "told", 2))))
        for rank in range(4)
    ]
    for beat in four.ranks.values():
        beat.meet()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1


def test_a_report_before_there_are_others_is_ones_own(world: Callable[[int], World]) -> None:
    end = End(1, "told", 2)
    assert world(2).make(1).report(end) == end


def test_ranks_that_do_not_come_are_named(world: Callable[[int], World]) -> None:
    four = world(4)
    four.start(0, 2, patience=0.3)
    assert four.ranks[0].meet() == [] == four.ranks[2].meet()
    assert four.heard(0) == four.heard(2) == [End(1, "lost", STATUS, "did not come within 0.3 s")]


@pytest.mark.parametrize(("rank", "size"), [(1, 4), (0, 3)])
def test_numbers_that_do_not_fit_end_the_wait(
    rank: int, size: int, world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LINGER", 0.2)
    three = world(3)
    three.start(0, 2)
    with three.pose(rank, size):
        hellos = three.ranks[0].meet()
        assert three.ranks[2].meet() == hellos
    assert sorted((hello["rank"], hello["size"]) for hello in hellos) == sorted([(0, 3), (2, 3), (rank, size)])


def test_strangers_at_the_port_change_nothing(world: Callable[[int], World]) -> None:
    two = world(2)
    two.start(0, seconds=60)
    port, _ = json.loads(two.key)
    said = [b"GET / HTTP/1.0\n", b"[]\n", b"{}\n", b"[" * 10_000 + b"\n", b"\xff\n", b"x" * (2**20 + 2**17)]
    said += [json.dumps({"token": "wrong", "hello": {"rank": 1, "size": 2}}).encode() + b"\n"]
    for text in said:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            try:
                connection.sendall(text)
                assert connection.recv(100) == b"", text[:20]
            except ConnectionError:
                pass
    two.start(1)
    assert len(two.ranks[0].meet()) == 2 and two.ends == {0: [], 1: []}


def test_a_stranger_who_is_silent_is_not_lost(world: Callable[[int], World]) -> None:
    two = world(2)
    two.start()
    with socket.create_connection(("127.0.0.1", json.loads(two.key)[0]), timeout=5) as connection:
        assert connection.recv(100) == b""
    assert two.ends == {0: [], 1: []}


def test_a_machine_without_ipv6(world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def only_four(address: Any, family: int = socket.AF_INET, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError("Address family not supported by protocol")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", only_four)
    two = world(2)
    two.start()
    assert len(two.ranks[0].meet()) == len(two.ranks[1].meet()) == 2


def test_who_leaves_is_not_lost(world: Callable[[int], World]) -> None:
    two = world(2)
    two.start()
    for beat in two.ranks.values():
        beat.meet()
    waiting = threading.Thread(target=two.ranks[1].leave, kwargs={"after_rank_0": True})
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()  # until rank 0 has said what it has to say
    two.ranks[0].leave()
    waiting.join(2)
    assert not waiting.is_alive() and two.ends == {0: [], 1: []}


def test_who_comes_when_all_are_there_is_told_so_and_ends_nobody(world: Callable[[int], World]) -> None:
    two, late = world(2), world(2)
    two.start()
    for beat in two.ranks.values():
        beat.meet()
    late.key = two.key
    late.start(1)  # a second process with RANK=1
    assert late.heard(1) == [End(1, "lost", STATUS, LATE)] and late.ranks[1].meet() == []
    with two.pose(1) as third:  # one that is killed
        third.settimeout(5)
        assert json.loads(third.makefile().readline())["end"]["text"] == LATE
    late.ranks[1].leave()
    time.sleep(SILENCE / 2)
    assert two.ends == {0: [], 1: []} and all(beat.end is None for beat in two.ranks.values())
    two.ranks[1].report(End(1, "told", 2))
    with two.pose(1) as fourth:
        fourth.settimeout(5)
        assert json.loads(fourth.makefile().readline())["end"]["how"] == "told"


def test_who_hangs_up_before_it_is_let_in_changes_nothing(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails, peer = [OSError(errno.EINVAL, "gone")], heartbeat.Peer

    def make(connection: socket.socket, rank: int = -1) -> heartbeat.Peer:
        if fails:
            raise fails.pop()
        return peer(connection, rank)

    two = world(2)
    two.start(0)
    monkeypatch.setattr(heartbeat, "Peer", make)
    with socket.create_connection(("127.0.0.1", json.loads(two.key)[0]), timeout=5) as connection:
        assert connection.recv(100) == b"" and not fails
    assert two.ranks[0].is_alive()
    two.start(1)
    assert len(two.ranks[0].meet()) == 2


def test_what_hundreds_of_ranks_were_started_with_is_a_long_line(world: Callable[[int], World]) -> None:
    two = world(2)
    two.start(0, word="x" * (3 * heartbeat.LONGEST))
    two.start(1)
    assert [len(hello.get("word", "")) for hello in two.ranks[1].meet()] == [3 * heartbeat.LONGEST, 0]
