"""What engine.LLM gives each token of a text: its logarithm of probability, and whether it was the likeliest.

A text runs as one request of its own, in chunks like any prompt, under a session of its own where layers are encoded.
It knows no metric and no scheme.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from engine import LLM
from engine.runner.batch import Row, pack

CHUNK_TOKENS = 256


class Scored(NamedTuple):
    """Of tokens 1..n-1 of a text, each after those before it: logprobs (n-1,) float32, likeliest (n-1,) bool."""

    logprobs: torch.Tensor
    likeliest: torch.Tensor


@torch.inference_mode()
def score(llm: LLM, tokens: Sequence[int]) -> Scored:
    """tokens: at least two, at most the engine's length. The engine must be idle. Raises ConfigError where the pool is
    too small."""
    executor: Any = llm.engine.executor
    runner = executor.runner
    store, sessions = runner.store, runner.scx
    slot = store.borrow(len(tokens))
    try:
        if sessions is not None:
            sessions.scx.secure.open(slot, secrets.token_bytes(16))
        found = []
        for start in range(0, len(tokens) - 1, CHUNK_TOKENS):
            chunk = list(tokens[start : min(start + CHUNK_TOKENS, len(tokens) - 1)])
            batch = pack([Row(slot, start, chunk, True)])
            batch.sample_rows = torch.arange(len(chunk))
            logits = runner.model(store.place(batch.to(runner.device)))  # (n, V) float32
            after = torch.tensor(tokens[start + 1 : start + 1 + len(chunk)], device=logits.device)
            mine = logits.log_softmax(-1).gather(1, after[:, None])[:, 0]
            found.append((mine.cpu(), (logits.argmax(-1) == after).cpu()))
    finally:
        if sessions is not None:
            sessions.scx.secure.close(slot)
        store.give_back(slot)
    logprobs, likeliest = (torch.cat(column) for column in zip(*found, strict=True))
    return Scored(logprobs, likeliest)
