"""Chooses tokens from logits: temperature, min-p, top-k, top-p, in that order; each row on its own.

Randomness is a function of (request seed, output index) alone, so batching, preemption and order cannot shift it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.core.request import SamplingParams

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Pick:
    """One row's rule. index: how many outputs came before; stop_ids: banned while index < params.min_tokens."""

    params: SamplingParams
    index: int
    stop_ids: frozenset[int]

    @property
    def greedy(self) -> bool:
        """Whether plain argmax answers it."""
        return self.params.temperature == 0 and not (self.stop_ids and self.index < self.params.min_tokens)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, index): two rounds of the splitmix64 finaliser."""
    state = (seed & _MASK) ^ ((index + 1) * 0x9E3779B97F4A7C15 & _MASK)
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def _candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits that top-k and top-p can leave, falling, and their ids; (all, None) when neither is on.

    Sorting a whole vocabulary costs milliseconds a row, so top-p looks at the largest few first and at more only
    when those do not hold its mass.
    """
    vocab = scaled.shape[0]
    if params.top_k > 0:
        values, ids = torch.topk(scaled, min(params.top_k, vocab))
        return values, ids
    if params.top_p >= 1:
        return scaled, None
    total = torch.logsumexp(scaled, dim=0)
    for count in (256, 4096, vocab):
        values, ids = torch.topk(scaled, min(count, vocab))
        if count >= vocab or float((values - total).exp().sum()) > params.top_p + 1e-4:
            break
    return values, ids


def sample_row(logits: torch.Tensor, params: SamplingParams, point: float) -> int:
    """The token at `point` in [0, 1) of the filtered distribution. logits: (V,) float32; params.temperature > 0."""
    scaled = logits / params.temperature
    if params.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(params.min_p), float("-inf"))
    total = torch.logsumexp(scaled, dim=0)
    values, ids = _candidates(scaled, params)
    if params.top_k > 0:  # top-p counts within what top-k left
        total = torch.logsumexp(values, dim=0)
    weights = (values - total).double().exp()
    running = weights.cumsum(0)
    if params.top_p < 1:  # the smallest set that reaches top_p; the first always stays
        running = running[: int((running - weights < params.top_p).sum())]
    index = int(torch.searchsorted(running, point * float(running[-1]), right=True))
    index = min(index, running.shape[0] - 1)
    return index if ids is None else int(ids[index])


def torch_argmax(logits: torch.Tensor) -> torch.Tensor:
    """(R, V) to (R,), by PyTorch."""
    return logits.argmax(dim=-1)


class Sampler:
    """Rows of logits to token ids. A row that is not finite ends its own request, never its neighbours."""

    def __init__(self, vocab: int, argmax: Callable[[torch.Tensor], torch.Tensor] = torch_argmax) -> None:
        """argmax: (R, V) float32 to (R,) int64, the first of equals, a NaN above all."""
        self.vocab, self.argmax = vocab, argmax

    def __call__(self, logits: torch.Tensor, picks: list[Pick]) -> torch.Tensor:
        """logits: (R, V) float32, may be changed. Returns (R,) int64 on their device; -1 where a row has no finite
        maximum. Greedy rows wait for nothing."""
        for row, pick in enumerate(picks):
            if pick.index < pick.params.min_tokens and pick.stop_ids:
                logits[row, [token for token in pick.stop_ids if token < self.vocab]] = float("-inf")
        tokens = finite_argmax(logits, self.argmax)
        for row, pick in enumerate(picks):
            if pick.params.temperature > 0 and (logits.device.type != "cpu" or tokens[row] >= 0):
                drawn = sample_row(logits[row], pick.params, uniform(pick.params.seed or 0, pick.index))
                tokens[row] = torch.where(tokens[row] < 0, tokens[row], drawn)
        return tokens


def finite_argmax(logits: torch.Tensor, argmax: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(R, V) to (R,) int64; -1 for a row whose maximum is not finite."""
    chosen = argmax(logits).long()
    best = logits.gather(1, chosen[:, None])[:, 0]
    return torch.where(best.isfinite(), chosen, -1)
