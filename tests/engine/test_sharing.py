"""When prompts and decodes of a step share a GPU: only where both halves are worth it; and how often a step's decodes
are lined up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.attention.fa_vattn import shared_sms, worth_it
from engine.attention.triton_vattn import DecodeHalf
from engine.runner.batch import Row, Span, pack

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


class Recorder:
    """Stands in for the decode kernel's module: what was lined up, in which workspace."""

    def __init__(self) -> None:
        self.DecodeWorkspace = SimpleNamespace(make=lambda *shape, **options: SimpleNamespace(room=shape[4], **options))
        self.lines: list[tuple[list[int], int, int, int]] = []

    def line_up(self, slots: torch.Tensor, kv_lens: torch.Tensor, workspace: Any, sms: int) -> None:
        """Note it."""
        self.lines.append((slots.tolist(), workspace.room, workspace.window, sms))

    def attention_decode(self, *given: object, **options: object) -> None:
        """Nothing."""


def test_a_step_is_lined_up_once_a_window_and_anew_when_something_changed() -> None:
    """Layers of one step share it; another step, other multiprocessors or a larger workspace do not."""
    half, kernel = DecodeHalf.__new__(DecodeHalf), Recorder()
    half._kernel, half._spec, half.scale, half.pdl = kernel, SPEC, 1.0, False  # type: ignore[assignment]
    half._workspaces, half._lined_up = {}, {}
    k = torch.empty(4, 64, 8, 128)

    def run(batch: Any, window: int = 0, sms: int = 0) -> int:
        before, rows = len(kernel.lines), torch.empty(batch.num_tokens, 32, 128)
        half(rows, k, k, batch, window, rows.flatten(1), sms=sms)
        return len(kernel.lines) - before

    def step(count: int) -> Any:
        return pack([Row(i, 9, [1], True) for i in range(count)])

    first, second, many = step(2), step(2), step(600)
    assert [run(first), run(first), run(first, window=8), run(first), run(first, window=8)] == [1, 0, 1, 0, 0]
    assert [run(second), run(second, sms=66), run(second, sms=66), run(second)] == [1, 1, 0, 1]
    assert [run(many), run(second), run(many), run(many)] == [1, 1, 1, 0]
    assert [line[1:] for line in kernel.lines] == [
        (512, 0, 0), (512, 8, 0), (512, 0, 0), (512, 0, 66), (512, 0, 0), (1024, 0, 0), (1024, 0, 0), (1024, 0, 0)]
    hybrid = pack([Row(3, 0, [1, 2, 3], True), Row(1, 9, [1], True)])
    assert run(hybrid) == 1 and kernel.lines[-1][0] == [1]
