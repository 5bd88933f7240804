"""`--quick`: all tests but those marked slow, and an error where one that is not marked should be: so the loop stays quick.

A test's time is the processor time of its set-up, call and tear-down, and of the processes that it started and waited for:
a busy machine does not change it much. Who is the first to need a shared fixture, or a module, pays for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

SLOW = 2.0  # seconds: what takes longer is to be marked slow, and is named
REFUSED = 4.0  # seconds: with --quick an error
SHARE = 0.85  # of all tests: so many are in the quick loop, or it fails
SECONDS, COUNTS = "processor seconds", "tests in all, of them slow"


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Quick:
    """A plugin of pytest: in the process that reports, and with xdist in each that runs tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.wanted = config, bool(config.getoption("--quick"))
        self.whole = config.args == config.getini("testpaths")
        self.started, self.counts = 0.0, (0, 0)
        self.seconds: dict[str, float] = {}

    @property
    def too_few(self) -> bool:
        """Whether too many tests are marked slow."""
        tests, slow = self.counts
        return self.wanted and self.whole and tests - slow < SHARE * tests

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        slow = {item for item in items if item.get_closest_marker("slow") is not None}
        self.counts = len(items), len(slow)
        if self.wanted:
            self.config.hook.pytest_deselected(items=list(slow))
            items[:] = [item for item in items if item not in slow]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self.started = processor_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            seconds = processor_seconds() - self.started
            report.user_properties.append((SECONDS, seconds))
            if self.wanted and report.passed and seconds > REFUSED:
                report.outcome = "failed"
                report.longrepr = f"{seconds:.1f} s of processor time: what takes more than {SLOW:g} s is marked slow"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "slow" not in report.keywords and (seconds := dict(report.user_properties).get(SECONDS)) is not None:
            self.seconds[report.nodeid] = seconds

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:  # xdist: only its workers have collected
        self.counts = getattr(node, "workeroutput", {}).get(COUNTS, self.counts)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput[COUNTS] = self.counts
        elif self.too_few:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        tests, slow = self.counts
        kept = f"{tests - slow} of {tests} tests are not marked slow"
        lines = [f"{kept}; {SHARE:.0%} must be" if self.too_few else kept] if self.wanted else []
        longest = sorted(((seconds, test) for test, seconds in self.seconds.items() if seconds > SLOW), reverse=True)
        lines += [f"{seconds:5.1f} s, not marked slow: {test}" for seconds, test in longest]
        if lines:
            terminalreporter.section("quick or slow")
            terminalreporter.write("\n".join(lines) + "\n")
