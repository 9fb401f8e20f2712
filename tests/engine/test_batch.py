"""A packed batch says which of its chunks are prompts, so that backends need not ask a device."""

from __future__ import annotations

import pytest

from engine.runner.batch import Row, Span, pack


@pytest.mark.parametrize(
    ("lengths", "prompts"),
    [([1], 0), ([5], 1), ([5, 1, 1], 1), ([1, 1], 0), ([3, 1, 2, 1], 3), ([1, 4], 2), ([2, 2], 2)],
)
def test_spans_reach_to_the_last_longer_chunk(lengths: list[int], prompts: int) -> None:
    """Every chunk behind the spans is one token, and no span could be dropped from the end."""
    rows = [Row(slot=7 - i, start=10 * i, tokens=[0] * n, samples=True) for i, n in enumerate(lengths)]
    batch = pack(rows)
    assert len(batch.spans) == prompts
    first = 0
    for row, span in zip(rows, batch.spans, strict=False):
        count = len(row.tokens)
        assert span == Span(row.slot, first, first + count, row.start + count)
        first += count
    assert batch.num_prefill_tokens == first
    assert batch.num_tokens - first == len(lengths) - prompts
