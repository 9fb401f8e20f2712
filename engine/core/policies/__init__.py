"""Scheduling policies: one short file each, found by name. A policy orders the draft's verbs; it cannot break memory.

It deliberately knows nothing of ledgers, slots or preemption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.core.draft import StepDraft
from engine.core.errors import ConfigError
from engine.core.policies._pace import Pace
from engine.core.policies._schedule import ChunkSchedule
from engine.core.registry import Registry

DEFAULT_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What a policy may be told. max_model_len: tokens of the longest sequence.

    chunk_tokens: token budget of a step (sarathi, simple_chunking; None = 512) or of a batch of prompts (vllm;
    None = max_model_len). schedule: dynamic chunking instead of chunk_tokens; pace: chunks of at most chunk_tokens by
    what steps take; prompt_order: "arrival", "shortest" or "deadline" (sarathi only, all three); ttft_target_s: for
    "deadline", seconds from arrival to the first token.
    """

    max_model_len: int
    chunk_tokens: int | None = None
    schedule: ChunkSchedule | None = None
    pace: Pace | None = None
    prompt_order: str = "arrival"
    ttft_target_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_model_len < 1:
            raise ConfigError(f"max_model_len={self.max_model_len} is below 1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens} is below 1; use 512 or leave it out")

    def refuse(self, policy: str, *, chunk_tokens: bool = False) -> None:
        """Raise ConfigError for what `policy` cannot honour: a schedule, a pace, an order of prompts, and chunk_tokens
        where asked."""
        if self.prompt_order != "arrival":
            raise ConfigError(f"policy {policy} takes prompts as they arrive; use --scheduler sarathi")
        if self.pace is not None:
            raise ConfigError(f"policy {policy} does not adapt its chunks; use --scheduler sarathi")
        if self.schedule is not None:
            raise ConfigError(f"policy {policy} has no dynamic chunking; use --scheduler sarathi")
        if chunk_tokens and self.chunk_tokens is not None:
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens}: policy {policy} runs whole prompts without a budget; "
                "leave it out or use --scheduler sarathi"
            )


class Policy(Protocol):
    """Decides who runs in a step.

    reserves_context: each sequence reserves max_model_len tokens from admission on, so nothing ever grows.
    prompt_limit: the longest prompt [tokens] that it can start.
    """

    reserves_context: bool
    prompt_limit: int

    def __init__(self, options: PolicyOptions) -> None: ...

    def fill(self, draft: StepDraft) -> None:
        """Propose one step. Every running sequence must be visited or left in place; none may be lost."""


policies: Registry[type[Policy]] = Registry("policy", "engine.core.policies")


def make_policy(
    name: str,
    *,
    max_model_len: int,
    chunk_tokens: int | None = None,
    schedule: ChunkSchedule | None = None,
    pace: Pace | None = None,
    prompt_order: str = "arrival",
    ttft_target_s: float | None = None,
) -> Policy:
    """The policy of that name. Raises ConfigError for an unknown one or an option that it cannot honour."""
    return policies[name](PolicyOptions(max_model_len, chunk_tokens, schedule, pace, prompt_order, ttft_target_s))


__all__ = ["ChunkSchedule", "DEFAULT_CHUNK_TOKENS", "Pace", "Policy", "PolicyOptions", "make_policy", "policies"]
