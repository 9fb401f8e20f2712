"""When prompts and decodes of a step share a GPU: only where both halves are worth it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.attention.fa_vattn import shared_sms, worth_it
from engine.runner.batch import Span

SPEC: Any = SimpleNamespace(heads=32, kv_heads=8, head_dim=128)


def share(chunk: int, context: int, decodes: int, length: int) -> int:
    """Multiprocessors of 132 for `decodes` of `length` beside a chunk that ends at `context`."""
    spans = (Span(0, 0, chunk, context),)
    return shared_sms(spans, torch.full((decodes,), length, dtype=torch.int32), SPEC, 132)


def test_the_smaller_half_decides() -> None:
    """Few decodes or a short chunk: one after the other; as the prompts outweigh the decodes, these get less."""
    assert share(1024, 2048, 64, 2800) == 66
    assert share(1024, 4096, 20, 2800) == 33
    assert share(8192, 8192, 4, 1000) == share(8192, 8192, 20, 1000) == 0
    assert share(32, 64, 64, 2800) == share(1024, 2048, 2, 64) == 0


def test_short_prompts_that_come_together_go_into_one_launch() -> None:
    """One prompt has a launch anyhow; several only if they are long."""
    short, long = Span(0, 0, 100, 100), Span(1, 100, 1124, 4096)
    assert worth_it((short,)) and worth_it((short, long)) and not worth_it((short, Span(2, 100, 300, 300)))
