"""A GPU session that is cut off has written down every part before, and goes on with what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import gpu_session
from scripts.gpu_session import Part, Session

MEASURED = """
import json, sys
out, known = sys.argv[sys.argv.index("--json") + 1], {}
if "--settings" in sys.argv:
    known = json.load(open(sys.argv[sys.argv.index("--settings") + 1]))["settings"]
print("knew", sorted(known))
found = {"device": "Some GPU", "torch": "2", "copy_gbytes_s": 1, "product_tflops_s": 1, "failures": ["one"],
         "settings": {sys.argv[1]: {"128": 1}}}
json.dump(found, open(out, "w"))
"""


def test_parts_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done, failed, cut off, passed over, no time left: each has its line, and settings travel from part to part."""
    (tmp_path / "measured.py").write_text(MEASURED)
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_session, "TUNING", tmp_path / "tuning")
    session = Session(tmp_path / "out", 100.0)
    session.results["setup"] = {"status": "done", "device": "Some GPU"}
    for name, module, options, needs in (
        ("first", "measured", ("decode",), ()), ("second", "measured", ("gemm",), ()), ("bad", "bad", (), ()),
        ("slow", "slow", (), ()), ("lacking", "bad", (), ("no_such_package",)),
    ):  # fmt: skip
        budget_s = 1.5 if name == "slow" else 30
        assert session.run(Part(name, budget_s, module, options, needs, kernels=module == "measured"), 1.0)
    session.ends_s = 0.0
    assert not session.run(Part("late", 30, "bad", (), ()), 1.0)
    kept = json.loads((tmp_path / "out" / "session.json").read_text())
    assert {name: part["status"] for name, part in kept.items()} == {
        "setup": "done", "first": "done", "second": "done", "bad": "failed with status 3",
        "slow": "cut off after 2 s", "lacking": "passed over: no_such_package not installed",
        "late": "not started: the session's time is spent",
    }  # fmt: skip
    assert kept["slow"]["tail"] == ["begun"] and kept["second"]["tail"] == ["knew ['decode']"]
    assert kept["first"]["failures"] == ["one"]
    for place in (tmp_path / "tuning" / "some_gpu.json", tmp_path / "out" / "settings.json"):
        assert json.loads(place.read_text())["settings"] == {"decode": {"128": 1}, "gemm": {"128": 1}}
    (tmp_path / "tuning" / "some_gpu.json").unlink()  # a fresh checkout that goes on with the same results
    later = Session(tmp_path / "out", 100.0)
    assert later.results.keys() == kept.keys()
    assert later.run(Part("third", 30, "measured", ("sample",), (), kernels=True), 1.0)
    assert later.results["third"]["tail"] == ["knew ['decode', 'gemm']"]
