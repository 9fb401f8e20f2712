"""What the GPU tests share: `--shard i/n` runs every n-th test, `--budget-s N` starts none later, and the run ends in
a plain count."""

from __future__ import annotations

from time import perf_counter

import pytest

BEGAN_S = perf_counter()
_left_out: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """The shard and the budget."""
    parser.addoption("--shard", default="1/1", help="i/n: run part i of n")
    parser.addoption("--budget-s", type=float, default=float("inf"), help="no test starts after so many seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this shard's tests."""
    part, _, parts = config.getoption("--shard").partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise pytest.UsageError(f"--shard {part}/{parts} is not i/n with 1 <= i <= n")
    kept = items[int(part) - 1 :: int(parts)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A run that takes too long still says what it found."""
    if perf_counter() - BEGAN_S > item.config.getoption("--budget-s"):
        _left_out.append(item.nodeid)
        pytest.skip("the time was spent before; --shard i/n runs a part")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The plain count."""
    counts = {name: len(terminalreporter.getreports(name)) for name in ("passed", "failed", "error", "skipped")}
    counts["of them for want of time"] = len(_left_out)
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    terminalreporter.write_line(f"gpu tests, shard {config.getoption('--shard')}: {said}")
