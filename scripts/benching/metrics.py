"""Times of tokens to figures: TTFT, TBT, rates and goodput, each defined once.

TTFT: from the arrival (when the workload says, not when somebody found time to look) to the first token. TBT: between
two successive tokens of one request, all pairs of all requests together. It knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(slots=True)
class Timeline:
    """One request. arrival_s and token_s: seconds from the start of the run; num_tokens: what it really produced.

    token_s has one entry a token seen; a client that got two tokens in one event saw one.
    """

    arrival_s: float
    prompt_tokens: int
    token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Arrival to the first token."""
        return self.token_s[0] - self.arrival_s

    @property
    def tbt_s(self) -> list[float]:
        """Between each two tokens; empty for an answer of one."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


class Bounds(NamedTuple):
    """What a request must keep to count as good."""

    ttft_s: float
    tbt_s: float


class Latency(NamedTuple):
    """Percentiles over a run, seconds. The tbt_* are 0 where no request has two tokens."""

    ttft_p50_s: float
    ttft_p99_s: float
    ttft_max_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    tbt_max_s: float


def quantile(values: Sequence[float], part: float) -> float:
    """Linear between neighbours; part in 0..1. 0 for no values."""
    return float(np.quantile(values, part)) if len(values) else 0.0


def latency(timelines: Sequence[Timeline]) -> Latency:
    """Percentiles over all requests."""
    ttft = [timeline.ttft_s for timeline in timelines]
    tbt = [gap for timeline in timelines for gap in timeline.tbt_s]
    return Latency(quantile(ttft, 0.5), quantile(ttft, 0.99), max(ttft, default=0.0),
                   quantile(tbt, 0.5), quantile(tbt, 0.99), max(tbt, default=0.0))  # fmt: skip


def span_s(timelines: Sequence[Timeline]) -> float:
    """From the first arrival to the last token."""
    return max(t.token_s[-1] for t in timelines) - min(t.arrival_s for t in timelines)


def output_tok_s(timelines: Sequence[Timeline]) -> float:
    """Output tokens a second of span_s."""
    return sum(t.num_tokens for t in timelines) / span_s(timelines)


def total_tok_s(timelines: Sequence[Timeline]) -> float:
    """Prompt and output tokens a second of span_s."""
    return sum(t.num_tokens + t.prompt_tokens for t in timelines) / span_s(timelines)


def goodput(timelines: Sequence[Timeline], bounds: Bounds) -> float:
    """Requests a second whose TTFT and whose own p99 TBT are within the bounds."""
    good = sum(t.ttft_s <= bounds.ttft_s and quantile(t.tbt_s, 0.99) <= bounds.tbt_s for t in timelines)
    return good / span_s(timelines)
