"""The heartbeat of several processes: who is there, what each was started with, and which one is lost.

Rank 0 listens on a port of its own. Each other rank keeps one connection to it, and both ends send a line every beat. A
connection that closes is a process that was killed or crashed; silence for `seconds` is one that was stopped, or a machine
that is cut off. Rank 0 tells the others, so that all know the same end. A thread does it: while the process evaluates,
compiles, writes or waits for a sum, by gloo or by NCCL, its beats go on, and a rank that is merely slow is not lost. No
torch is needed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

BEATS = 20
"""Lines that each end sends in the time after which silence is a loss."""
LINGER = 3.0
"""Seconds that rank 0 waits for late ranks, to tell them too that their numbers do not fit."""
ANSWER = 3.0
"""Seconds within which rank 0 says whose end came first, and within which the others wait for what it prints."""
LONGEST = 2**20
"""Bytes of a stranger's line; who sends more is none of ours. Rank 0 sends longer ones to some hundred ranks."""
STATUS = 4
"""Exit status of the ranks that are left where one is lost."""
LATE = "came when the others had begun without it (is another process of this number among them?)"


@dataclass(frozen=True)
class End:
    """The end of one rank, which ends all: "lost", "failed" (with a traceback) or "told" (bad input, a signal: it says so).

    text: what is known of a loss. status: with which the others exit.
    """

    rank: int
    how: str
    status: int
    text: str = ""


class Peer:
    """The other end of a connection. rank: -1 until it has said it. seen: when it was last heard, by the monotonic clock."""

    def __init__(self, connection: socket.socket, rank: int = -1) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.rank, self.seen = connection, rank, time.monotonic()
        self._received, self._pending = b"", b""

    def send(self, message: dict[str, Any]) -> None:
        self._pending += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # it is full, or it is closed, which the next read tells
            while self._pending:
                self._pending = self._pending[self.socket.send(self._pending) :]

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the messages that have come, and whether more may come."""
        try:
            data = self.socket.recv(2**16)
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        self.seen = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return [], False
        ours = (self.rank >= 0 or len(self._received) <= LONGEST) and all(
            isinstance(message, dict) for message in messages
        )
        return (messages, bool(data)) if ours else ([], False)


class Heartbeat(threading.Thread):
    """The thread that beats, listens and judges.

    Args: rank, size: of this process. hello: what it tells the others at the start. seconds: a rank that is silent for so
    long is lost. patience: seconds within which all must have come. ended: called in this thread with the end that came first
    of all, unless this rank reported it.
    """

    def __init__(
        self, rank: int, size: int, hello: dict[str, Any], seconds: float, patience: float, ended: Callable[[End], None]
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.size, self.seconds, self.patience, self.ended = rank, size, seconds, patience, ended
        self.end: End | None = None
        self.hellos = [{"rank": rank, "size": size, **hello}]
        self.way_back: Callable[[], str] = lambda: "nothing was saved; start the command again"
        """Says after a loss what is saved, and how to continue."""
        self.record: Callable[[str, str], object] = lambda event, text: None
        """Writes into the history of a run how its processes ended, where this one did not end by itself."""
        self._deadline = time.monotonic() + patience
        self._fits = True  # whether the numbers that the ranks have told fit together
        self._complete, self._ended = threading.Event(), threading.Event()
        self._reported: deque[End] = deque()
        self._leaving = self._over = False
        self._peers: list[Peer] = []
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: self._woken.recv(4096))
        self._token = secrets.token_hex(16)
        self._turned = self._beaten = time.monotonic()

    # --- for the process ---

    def listen(self) -> str:
        """Listen as rank 0, and return the key with which the others join."""
        try:
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=self.size)
        except (OSError, ValueError):  # a machine without IPv6
            server = socket.create_server(("", 0), backlog=self.size)
        self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))
        self.start()
        return json.dumps([server.getsockname()[1], self._token])

    def join_rank_0(self, address: str, key: str) -> None:
        """Join as another rank. Raises OSError where rank 0 does not answer at this address."""
        port, token = json.loads(key)
        peer = Peer(socket.create_connection((address, port), timeout=self.patience), rank=0)
        peer.send({"token": token, "hello": self.hellos[0]})
        self._add(peer)
        self.start()

    def meet(self) -> list[dict[str, Any]]:
        """Wait for all ranks and return what each told; of those that came, where their numbers do not fit together.

        Returns [] where an end came first, of which `ended` hears.
        """
        self._complete.wait()
        return self.hellos if self.end is None else []

    def report(self, end: End) -> End:
        """Report to the others how this rank ends, and return the end that came first of all: this one, or another."""
        if not self.is_alive():  # it has not joined the others
            return end
        self._reported.append(end)
        self._waker.send(b".")
        return self.first_end(ANSWER) or end

    def first_end(self, seconds: float) -> End | None:
        """Return the end that came first of all, if there is one within this time."""
        self._ended.wait(seconds)
        return self.end

    def leave(self, after_rank_0: bool = False) -> None:
        """Stop, where all ranks have come to their end; after_rank_0: not before rank 0 has, so that its words are read."""
        self._leaving = True
        self._over = not (after_rank_0 and self.rank)
        self._waker.send(b".")
        self.join(ANSWER)

    # --- in the thread ---

    def run(self) -> None:
        while not self._over and (self._peers or not self._leaving):
            for key, _ in self._selector.select(self.seconds / BEATS):
                key.data()
            self._turn(time.monotonic())
        for peer in self._peers:
            peer.send({"leaving": True})
            peer.socket.close()

    def _turn(self, now: float) -> None:
        """Do what is due: pass reports on, beat, judge."""
        while self._reported:
            end = self._reported.popleft()
            if self.rank == 0:
                self._decide(end)
            elif self._peers:  # else there is an end already
                self._peers[0].send({"end": asdict(end)})
        if now - self._turned > self.seconds / 2:  # this process itself was stopped: it cannot say who was silent
            for peer in self._peers:
                peer.seen = now
        self._turned = now
        beats = now - self._beaten >= self.seconds / BEATS
        self._beaten = now if beats else self._beaten
        for peer in list(self._peers):
            if beats and peer.rank >= 0:
                peer.send({})
            peer.flush()
            if now - peer.seen > self.seconds and not self._leaving:
                self._lose(peer, f"was not heard for {self.seconds:g} s (--heartbeat): it is stopped, or cut off")
        if self.rank == 0 and not self._complete.is_set() and now > self._deadline:
            self._late()

    def _accept(self, server: socket.socket) -> None:
        """Let in who knocks. One who is gone already, or for whom no descriptor is left, must not end this thread."""
        with contextlib.suppress(OSError):
            self._add(Peer(server.accept()[0]))

    def _add(self, peer: Peer) -> None:
        self._peers.append(peer)
        self._selector.register(peer.socket, selectors.EVENT_READ, lambda: self._read(peer))

    def _read(self, peer: Peer) -> None:
        messages, more = peer.read()
        for message in messages:
            if peer.rank < 0:
                more &= self._welcome(peer, message)
            elif "hellos" in message:
                self.hellos = message["hellos"]
                self._complete.set()
            elif "end" in message:
                self._decide(End(**message["end"]))
            elif "leaving" in message:
                more = False
                self._forget(peer)
        if not more and peer in self._peers:
            self._lose(peer, "ended without a word: it was killed, it crashed, or its machine failed")

    def _forget(self, peer: Peer) -> None:
        self._selector.unregister(peer.socket)
        self._peers.remove(peer)
        peer.socket.close()

    def _lose(self, peer: Peer, why: str) -> None:
        if peer.rank >= 0 and not self._leaving:
            self._decide(End(peer.rank, "lost", STATUS, why))  # which it reads too, if it goes on
        self._forget(peer)

    def _welcome(self, peer: Peer, message: dict[str, Any]) -> bool:
        """Read a rank's hello, and return whether it is one."""
        hello = message.get("hello")
        if message.get("token") != self._token or not isinstance(hello, dict):
            return False
        if (
            self._complete.is_set()
        ):  # a second process of some number, or one that is too late: its own end concerns nobody
            peer.send({"end": asdict(self.end or End(hello["rank"], "lost", STATUS, LATE))})
            return True
        peer.rank = hello["rank"]
        fits = hello["size"] == self.size and all(peer.rank != other["rank"] for other in self.hellos)
        self.hellos.append(hello)
        if self._fits and not fits:
            self._fits, self._deadline = False, time.monotonic() + LINGER
        if self._fits and len(self.hellos) == self.size:
            self._introduce()
        return True

    def _introduce(self) -> None:
        self.hellos.sort(key=lambda hello: hello["rank"])
        for peer in self._peers:
            if peer.rank >= 0:
                peer.send({"hellos": self.hellos})
        self._complete.set()

    def _late(self) -> None:
        """End the wait for the ranks that have not come."""
        if not self._fits:
            return self._introduce()
        missing = sorted(set(range(self.size)) - {hello["rank"] for hello in self.hellos})
        self._decide(End(missing[0], "lost", STATUS, f"did not come within {self.patience:g} s"))

    def _decide(self, end: End) -> None:
        """Keep the end that came first, and let all know it. Rank 0 decides; without it each rank for itself."""
        if self.end is not None:
            return
        self.end = end
        for peer in self._peers:  # of a rank to rank 0 too: if that was stopped, it learns why the others are gone
            peer.send({"end": asdict(end)})
        self._ended.set()
        self._complete.set()
        if end.rank != self.rank or end.how == "lost":
            self.ended(end)
