"""`python -m scripts.scx COMMAND`: every command explains itself, and those of docs/scx.md end with the status that
their finding deserves, on tiny models."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from engine import LLM
from engine.scx.schemes import row_bytes
from scripts import scx, scx_exactness, scx_example
from scripts.scx_attacks import gates
from tests import models


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set levels and threads of their process; other tests read the engine's warnings."""
    monkeypatch.setattr(logging.getLogger("engine"), "setLevel", lambda level: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name in ("SCX_ENC_LAYERS", "SCX_SECURE_DEVICE", "SCX_ENABLE_DEBUG"):
        monkeypatch.setenv(name, "")  # the example sets them


@pytest.mark.parametrize("command", scx.COMMANDS)
def test_every_command_tells_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the list of commands says."""
    with pytest.raises(SystemExit) as ended:
        scx.main([command, "--help"])
    assert ended.value.code == 0 and f"python -m scripts.scx {command}" in capsys.readouterr().out


def test_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and the list."""
    for wrong in ([], ["leaks"]):
        assert scx.main(wrong) == 2
        said = capsys.readouterr().err
        assert all(name in said for name in scx.COMMANDS)


@pytest.mark.parametrize("command", ["accuracy", "lm-eval", "overhead", "worker"])
def test_what_the_user_can_fix_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a layer that the model has not."""
    flags = ["--model", str(models.tiny_llama_dir(tmp_path, 61, max_position_embeddings=2048)), "--layers", "0,7"]
    more = {"lm-eval": ["--tasks", "x"], "accuracy": ["--documents", "1", "--passages", "1", "--tokens", "32"]}
    assert scx.main([command, *flags, *more.get(command, [])]) == 2
    assert "layer 7 is outside 0..1" in capsys.readouterr().err


def test_the_exactness_matrix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a case, JSON, status 0; 1 when a case is beyond its limit, and when no case is asked for."""
    chosen = ["exactness", "--head-dim", "16", "--only", "float32", "preempt", "per_layer", "torch_vattn"]
    assert scx.main(chosen) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["cases"] == len(lines) == 14 and not found["failed"] and all(line[:3] == "ok " for line in lines)
    monkeypatch.setitem(scx_exactness.LIMITS, "float32", 1e-12)
    assert scx.main([*chosen, "mix", "sealed"]) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]) == 2
    assert scx.main(["exactness", "--only", "float8"]) == 1


def test_the_leakage_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scheme in both tables, the record and the picture; a gate that does not hold is a line and status 1. So
    few tokens may break a gate of their own, but plain rows must fall and A7 must find everything."""
    folder = models.tiny_llama_dir(tmp_path, 62, hidden_size=128, num_hidden_layers=2)
    record, picture = tmp_path / "record.json", tmp_path / "picture.svg"
    command = ["leakage", "--model", str(folder), "--tokens", "100", "--pool", "32", "--json", str(record),
               "--picture", str(picture)]  # fmt: skip
    status = scx.main(command)
    said = capsys.readouterr().out
    broken = [line for line in said.splitlines() if line.startswith("GATE")]
    assert status == bool(broken) and not any(" plain" in line or "A7" in line for line in broken)
    rows = {row.split("|")[1].strip(): row for row in said.splitlines() if row.startswith("| ")}
    assert len(rows) == 10 and {"plain", "perm-static", "perm", "rotate", "mix"} < set(rows)
    kept = json.loads(record.read_text())
    assert len(kept["rows"]) == 9 and len(kept["gates"]) == len(broken) and picture.read_text().count("<svg") == 1
    monkeypatch.setattr(gates, "WORKS", 1.01)
    assert scx.main(command) == 1 and "GATE plain: A1 V recovers only" in capsys.readouterr().out
    assert scx.main(["leakage", "--model", str(folder), "--tokens", "64"]) == 2
    assert "--tokens 64 is outside 65.." in capsys.readouterr().err


def test_the_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SCX-vLLM's call, its variables, engine.LLM: the plain answers with encoded layers, or status 1."""
    folder = str(models.tiny_llama_dir(tmp_path, 63, num_hidden_layers=3))
    assert scx.main(["example", folder]) == 0
    said = capsys.readouterr().out
    assert "encoded layers: none" in said and "encoded layers: (0, 2)" in said and "answers are the same" in said
    others = iter([folder, str(models.tiny_llama_dir(tmp_path, 65, num_hidden_layers=3))])
    monkeypatch.setattr(scx_example, "LLM", lambda _, **settings: LLM(next(others), **settings))
    assert scx.main(["example", folder]) == 1 and "THE ANSWERS DIFFER" in capsys.readouterr().out


def test_what_a_worker_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, in this process and in a worker; bytes are the formula's and calls are two, wherever keys are."""
    folder = models.tiny_llama_dir(tmp_path, 64, max_position_embeddings=2048)
    flags = ["--model", str(folder), "--layers", "0,1", "--batch", "2", "--rounds", "1", "--dtype", "float32"]
    assert scx.main(["worker", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["formula_bytes_a_row_and_layer"] == sum(row_bytes("perm", 4, 2, 16, 4)) == 1536
    for where in ("in this process", "worker"):
        assert found[where]["bytes_a_row_and_layer"] == 1536 and found[where]["calls_a_layer_and_step"] == 2
    assert "bytes_a_row_and_layer" not in found["plain"]
