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


@pytest.mark.parametrize("wanted", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_the_rows_that_get_logits_are_a_batch_of_decodes(wanted: tuple[int, ...]) -> None:
    """Whoever samples, from nobody to everybody: the last token of each such chunk, at its length."""
    shape = [(5, 0, 4), (2, 10, 3), (0, 3, 1), (3, 7, 1)]  # slot, start, tokens
    rows = [Row(slot, start, [0] * count, i in wanted) for i, (slot, start, count) in enumerate(shape)]
    last = pack(rows).sampling()
    assert last is not None and not last.spans and last.num_tokens == len(wanted)
    kept = [shape[i] for i in wanted]
    assert last.slots.tolist() == last.token_slots.tolist() == [slot for slot, _, _ in kept]
    assert last.kv_lens.tolist() == [start + count for _, start, count in kept]
    assert last.positions.tolist() == [start + count - 1 for _, start, count in kept]
    assert last.q_starts.tolist() == list(range(len(wanted) + 1))
    assert last.sample_rows.tolist() == list(range(len(wanted)))


def test_decodes_alone_are_their_own_last_rows() -> None:
    """Nothing to pick out."""
    assert pack([Row(0, 3, [1], True), Row(1, 5, [1], True)]).sampling() is None


def test_rows_for_nobody_lie_behind_the_others() -> None:
    """A batch widened to more rows of logits says who they are for, and those behind are for no slot and length 0."""
    batch = pack([Row(4, 2, [1, 2, 3], True), Row(5, 0, [1, 2], False), Row(6, 9, [1], True)])
    wide = batch.widened(5)
    assert wide.sample_rows.tolist() == [2, 5, 0, 0, 0]
    assert wide.ends is not None and wide.ends.tolist() == [[4, 6, -1, -1, -1], [5, 10, 0, 0, 0]]
    decodes = wide.sampling()
    assert decodes is not None and decodes.slots.tolist() == [4, 6, -1, -1, -1]
    assert batch.widened(2) is batch and batch.widened(1) is batch
    assert (wide.tokens is batch.tokens) and wide.spans == batch.spans
