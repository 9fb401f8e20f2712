"""One count of several pytest processes: nothing is counted twice, and a process that was lost is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import gpu_tests

# in pytest's place: what it was told goes into a file, and what it says is chosen by the test file's name
SAYS = """
import os, sys
which, names = sys.argv[sys.argv.index("-m") + 1], " ".join(sys.argv[sys.argv.index("-m") + 2:])
with open(os.environ["SAID"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
count = "gpu tests, shard 1/1: {} passed, {} failed, 0 error, {} skipped, 0 of them for want of time"
if which == "alone":
    print(count.format(1, 0, 0))
elif "lost" in names:
    print("Fatal error"), sys.exit(134)
elif "none" in names:
    sys.exit(5)
else:
    bad = "bad" in names
    print(count.format(3, int(bad), 2))
    sys.exit(int(bad))
"""


@pytest.fixture(autouse=True)
def instead_of_pytest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Processes that only say what they would count. Returns the file of what they were told."""
    monkeypatch.setattr(gpu_tests, "PYTEST", ("-c", SAYS))
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    return tmp_path / "said"


@pytest.mark.parametrize(
    ("files", "status", "line"),
    [
        (["a.py", "b.py", "none.py"], 0, "7 passed, 0 failed, 0 error, 4 skipped, 0 of them for want of time"),
        (["a.py", "bad.py"], 1, "7 passed, 1 failed, 0 error, 4 skipped, 0 of them for want of time"),
        (["a.py", "lost.py"], 1, "4 passed, 0 failed, 1 error, 2 skipped, 0 of them for want of time"),
    ],
)
def test_counts_are_added(files: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of files side by side and of the tests that run alone, on the last line."""
    assert gpu_tests.main([*files, "--jobs", "3"]) == status
    assert capsys.readouterr().out.splitlines()[-1].endswith(line)


def test_the_counts_by_file_are_kept(tmp_path: Path) -> None:
    """With what ran, of which commit and where."""
    gpu_tests.main(["a.py", "bad.py", "--json", str(tmp_path / "counts.json")])
    found = json.loads((tmp_path / "counts.json").read_text())
    assert (found["passed"], found["failed"], found["files"]["bad.py"]["failed"]) == (7, 1, 1)
    assert found["files"]["alone"]["passed"] == 1 and found["environment"]["versions"]["torch"]


def test_each_file_once_and_all_alone_last(instead_of_pytest: Path) -> None:
    """The listed files, the shard and pytest's own arguments reach the processes; what is left of the budget, too."""
    gpu_tests.main(["--shard", "2/3", "--budget-s", "100", "--jobs", "1", "--", "-k", "decode"])
    *files, alone = instead_of_pytest.read_text().splitlines()
    listed = [line for line in gpu_tests.MANIFEST.read_text().splitlines() if not line.startswith("#")]
    assert [line.split("-m not alone ")[1] for line in files] == [f"{file} -k decode" for file in listed]
    assert alone.split("-m alone ")[1] == " ".join([*listed, "-k", "decode"])
    for line in (*files, alone):
        words = line.split()
        assert words[words.index("--shard") + 1] == "2/3" and 0 < int(words[words.index("--budget-s") + 1]) <= 100
