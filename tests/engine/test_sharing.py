"""Which prompts of a step get a launch of their own on a GPU, and how often its decodes are lined up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.attention.fa_vattn import worth_it
from engine.attention.triton_vattn import DecodeHalf
from engine.runner.batch import Row, Span, pack

SPEC: Any = SimpleNamespace(heads=32, kv_heads=8, head_dim=128)


def test_short_prompts_that_come_together_go_into_one_launch() -> None:
    """One prompt has a launch anyhow; several only if they are long."""
    short, long = Span(0, 0, 100, 100), Span(1, 100, 1124, 4096)
    assert worth_it((short,)) and worth_it((short, long)) and not worth_it((short, Span(2, 100, 300, 300)))


class Recorder:
    """Stands in for the decode kernel's module: what was lined up, in which workspace."""

    def __init__(self) -> None:
        self.DecodeWorkspace = SimpleNamespace(make=lambda *shape, **options: SimpleNamespace(room=shape[4], **options))
        self.lines: list[tuple[list[int], int, int]] = []

    def line_up(self, slots: torch.Tensor, kv_lens: torch.Tensor, workspace: Any) -> None:
        """Note it."""
        self.lines.append((slots.tolist(), workspace.room, workspace.window))

    def attention_decode(self, *given: object, **options: object) -> None:
        """Nothing."""


def test_a_step_is_lined_up_once_a_window_and_anew_when_something_changed() -> None:
    """Layers of one step share it; another step or a larger workspace do not."""
    half, kernel = DecodeHalf.__new__(DecodeHalf), Recorder()
    half._kernel, half._spec, half.scale, half.pdl = kernel, SPEC, 1.0, False  # type: ignore[assignment]
    half._workspaces, half._lined_up = {}, {}
    k = torch.empty(4, 64, 8, 128)

    def run(batch: Any, window: int = 0) -> int:
        before, rows = len(kernel.lines), torch.empty(batch.num_tokens, 32, 128)
        half(rows, k, k, batch, window, rows.flatten(1))
        return len(kernel.lines) - before

    def step(count: int) -> Any:
        return pack([Row(i, 9, [1], True) for i in range(count)])

    first, second, many = step(2), step(2), step(600)
    assert [run(first), run(first), run(first, window=8), run(first), run(first, window=8)] == [1, 0, 1, 0, 0]
    assert [run(second), run(second)] == [1, 0]
    assert [run(many), run(second), run(many), run(many)] == [1, 1, 1, 0]
    assert [line[1:] for line in kernel.lines] == [
        (512, 0), (512, 8), (512, 0), (1024, 0), (1024, 0), (1024, 0)]
    hybrid = pack([Row(3, 0, [1, 2, 3], True), Row(1, 9, [1], True)])
    assert run(hybrid) == 1 and kernel.lines[-1][0] == [1]
