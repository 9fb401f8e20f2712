"""The whole engine on a GPU answers as transformers does: every backend, both layouts, graphs on and off, schedules.

Its cases are those of scripts/gpu_correctness.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from scripts import gpu_correctness as correctness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> correctness.Models:
    """The checkpoints and their judges."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return correctness.Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", correctness.cases(), ids=lambda case: case.name.replace(" ", "-"))
def test_engine(case: correctness.Case, models: correctness.Models) -> None:
    """Greedy tokens are the judge's, or sampled ones the same in graphs and without."""
    why = correctness.skip_reason(case)
    if why:
        pytest.skip(why)
    found = correctness.run_case(case, *models.of(case.model))
    assert found.compared > 0 and not found.wrong, found.wrong[:3]


@pytest.mark.alone
def test_the_allocator_keeps_its_promises() -> None:
    """Every check of scripts.gpu_allocator, the forced races and what they are without their fence among them."""
    done = subprocess.run([sys.executable, "-m", "scripts.gpu_allocator"], capture_output=True, text=True, timeout=200,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "without its fence every race fails" in done.stdout


@pytest.mark.alone
def test_random_load_on_full_memory() -> None:
    """A short soak in the last 36 GiB, at 0.95: the pool overflows, nothing fails, nothing stays held. scripts.gpu_soak
    runs 8 minutes by itself."""
    command = [sys.executable, "-m", "scripts.gpu_soak", "--seconds", "15", "--settle-s", "5", "--leave-bytes"]
    done = subprocess.run([*command, str(36 << 30)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["preempted_total"] > 0, "the memory was never full"
