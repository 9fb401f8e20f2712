"""Chooses tokens from logits: bias, temperature, min-p, top-k, top-p, in that order; each row on its own.

Logprobs are of the logits as the model gave them, and computed row by row as well. Randomness is a function of
(request seed, output index) alone, so batching, preemption and order cannot shift it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        params = self.params
        changes = bool(params.logit_bias) or bool(self.stop_ids and self.index < params.min_tokens)
        return params.temperature == 0 and params.logprobs is None and not changes


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
            if pick.params.logit_bias:
                ids, bias = zip(*pick.params.logit_bias, strict=True)
                logits[row, list(ids)] += torch.tensor(bias, dtype=logits.dtype, device=logits.device)
            if pick.index < pick.params.min_tokens and pick.stop_ids:
                logits[row, [token for token in pick.stop_ids if token < self.vocab]] = float("-inf")
        tokens = finite_argmax(logits, self.argmax)
        for row, pick in enumerate(picks):
            if pick.params.temperature > 0 and (logits.device.type != "cpu" or tokens[row] >= 0):
                drawn = sample_row(logits[row], pick.params, uniform(pick.params.seed or 0, pick.index))
                tokens[row] = torch.where(tokens[row] < 0, tokens[row], drawn)
        return tokens


class RawRows:
    """The rows that want logprobs, kept as the model gave them before a Sampler changes them."""

    def __init__(self, logits: torch.Tensor, picks: Sequence[Pick]) -> None:
        """logits: (R, V)."""
        self.rows = [row for row, pick in enumerate(picks) if pick.params.logprobs is not None]
        self._counts = [picks[row].params.logprobs or 0 for row in self.rows]
        self._logits = logits[self.rows]

    def logprobs(self, picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """picked: (R,) ids, all rows. Returns ids (W, K + 1) int64 and log-probabilities (W, K + 1) float32 of the W
        rows: the picked token, then the likeliest; -1 fills up where a row wants fewer than K.

        One row at a time: a reduction over several may add in another order, and the numbers must not depend on who
        else is in the batch.
        """
        width = max(self._counts) + 1
        ids = torch.full((len(self.rows), width), -1, dtype=torch.int64, device=self._logits.device)
        values = torch.zeros((len(self.rows), width), dtype=torch.float32, device=self._logits.device)
        chosen = picked[self.rows].clamp(min=0)
        for place, (logits, count) in enumerate(zip(self._logits, self._counts, strict=True)):
            total = torch.logsumexp(logits, dim=0)
            best = torch.topk(logits, min(count, logits.shape[0]))
            found = torch.cat([chosen[place : place + 1], best.indices])
            ids[place, : found.shape[0]] = found
            values[place, : found.shape[0]] = logits[found] - total
        return ids, values


def finite_argmax(logits: torch.Tensor, argmax: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(R, V) to (R,) int64; -1 for a row whose maximum is not finite."""
    chosen = argmax(logits).long()
    best = logits.gather(1, chosen[:, None])[:, 0]
    return torch.where(best.isfinite(), chosen, -1)
