"""Sampling on a GPU for all rows at once, without waiting for the device: the rules of a step's rows as one table.

It follows engine/runner/sampler.py, which is the judge: the same token for the same row, except where the point drawn
falls within float32 rounding of a boundary between two tokens, or where equal logits stand at a cut (here the lower
id is kept; PyTorch's topk promises no order). Numbers of the host make the point, so batching cannot shift it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.core.request import SamplingParams
from engine.runner.sampler import Pick, finite_argmax, uniform

FIELDS = 5  # as tessera_kernels.triton_sample.FIELDS: temperature, log(min_p), top_p, top_k, point
GRAPH_EDITS = 8  # ids whose logits a row may change inside a CUDA graph; more run outside

Argmax = Callable[[torch.Tensor], torch.Tensor]


def edits_of(pick: Pick, vocab: int) -> dict[int, float]:
    """What is added to which logits of a row: its biases, and -inf for every stop id before min_tokens outputs."""
    changed = dict(pick.params.logit_bias)
    if pick.index < pick.params.min_tokens:
        changed.update((token, -math.inf) for token in sorted(pick.stop_ids) if token < vocab)
    return changed


def plain_rules(rows: int, edits: int) -> np.ndarray:
    """(rows, FIELDS + 2 * edits) float64 rules that change nothing: greedy, no edits."""
    table: np.ndarray = np.zeros((rows, FIELDS + 2 * edits))
    table[:, FIELDS : FIELDS + edits] = -1
    return table


def fill_rules(table: np.ndarray, picks: Sequence[Pick], vocab: int) -> None:
    """Write each pick's rule into its row of a plain table that has room for its edits."""
    edits = (table.shape[1] - FIELDS) // 2
    for row, pick in zip(table, picks, strict=False):
        params: SamplingParams = pick.params
        if params.temperature > 0:
            log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
            point = uniform(params.seed or 0, pick.index)
            row[:FIELDS] = (params.temperature, log_min_p, params.top_p, params.top_k, point)
        changed = edits_of(pick, vocab)
        row[FIELDS : FIELDS + len(changed)] = list(changed.keys())
        row[FIELDS + edits : FIELDS + edits + len(changed)] = list(changed.values())


def choose(logits: torch.Tensor, rules: torch.Tensor, argmax: Argmax) -> torch.Tensor:
    """logits (R, V) float32, changed in place; rules (R, FIELDS + 2 E) float64, both on the device -> (R,) int64 ids,
    -1 for a row that is not finite. Fixed launches, so it can stand in a CUDA graph."""
    from tessera_kernels.triton_sample import edit_logits, sample_rows

    edit_logits(logits, rules)
    return sample_rows(logits, rules, argmax(logits).long())


class DeviceSampler:
    """As Sampler, for logits on a GPU: the same few launches for any mix of rules, no wait."""

    def __init__(self, vocab: int, argmax: Argmax) -> None:
        """argmax: (R, V) float32 to (R,) int64, the first of equals, a NaN above all."""
        self.vocab, self.argmax = vocab, argmax

    def __call__(self, logits: torch.Tensor, picks: list[Pick]) -> torch.Tensor:
        """See Sampler."""
        if all(pick.greedy for pick in picks):
            return finite_argmax(logits, self.argmax)
        most = max(len(edits_of(pick, self.vocab)) for pick in picks)
        table = plain_rules(len(picks), 1 << (most - 1).bit_length() if most else 0)
        fill_rules(table, picks, self.vocab)
        return choose(logits, _staged(table, logits.device), self.argmax)


class GraphRules:
    """The rules that CUDA graphs read: (most, FIELDS + 2 * GRAPH_EDITS) float64 at a fixed place on the device."""

    def __init__(self, most: int, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self.table = torch.from_numpy(plain_rules(most, GRAPH_EDITS)).to(device)
        self._plain = True  # whether every row of the table is

    def fits(self, picks: Sequence[Pick]) -> bool:
        """Whether no row changes more logits than the table has room for, or wants them back as logprobs."""
        return all(
            pick.greedy or (pick.params.logprobs is None and len(edits_of(pick, self._vocab)) <= GRAPH_EDITS)
            for pick in picks
        )

    def load(self, picks: Sequence[Pick]) -> None:
        """Put the picks' rules into the first rows, plain ones behind; without a copy when all stay plain."""
        plain = all(pick.greedy for pick in picks)
        if plain and self._plain:
            return
        rules = plain_rules(self.table.shape[0], GRAPH_EDITS)
        fill_rules(rules, picks, self._vocab)
        self.table.copy_(_staged(rules, self.table.device), non_blocking=True)
        self._plain = plain


def _staged(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """The table on the device, through pinned memory where the device is a GPU: nothing waits for the copy."""
    host = torch.from_numpy(table)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
