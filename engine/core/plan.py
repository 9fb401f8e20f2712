"""The frozen messages between the scheduler and whoever runs a step.

They hold ids and counts, never tensors, pages or text. A sequence's tokens travel once per epoch, in its admission;
after that the executor knows them, because it samples them itself. What exists once per sequence and step (Chunk,
SampledToken, Update) is a NamedTuple: a frozen dataclass costs four times as much to make, and a step makes thousands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.core.request import SamplingParams


class Chunk(NamedTuple):
    """`length` consecutive tokens of one sequence, run in one step; a decode is a chunk of one.

    start: tokens whose KV is already written. samples: the last known token is inside, so one token comes out.
    """

    seq_id: int
    epoch: int
    start: int
    length: int
    samples: bool

    @property
    def end(self) -> int:
        """Tokens whose KV is written after this step."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence (or a new epoch of one) that needs a slot from this step on.

    tokens: everything known: the prompt, and after a preemption the outputs so far.
    num_outputs: how many of `tokens` are outputs; the sampler counts on from there, so seeds do not shift.
    tenant: see Request.
    """

    seq_id: int
    epoch: int
    tokens: tuple[int, ...]
    num_outputs: int
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    tenant: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does, in this order: release slots, admit, map memory, run the chunks, sample.

    chunks: prefill chunks first, then decodes. releases: seq_ids whose slot is given back (finished, aborted or
    preempted; a preempted one may be admitted again only in a later plan). preempted, ignored: for information.
    """

    step_id: int
    chunks: tuple[Chunk, ...] = ()
    admissions: tuple[Admission, ...] = ()
    releases: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    ignored: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing for an executor to do: no chunk and no release (an admission comes with its chunk)."""
        return not self.chunks and not self.releases

    @property
    def num_tokens(self) -> int:
        """Tokens run by this step."""
        return sum(chunk.length for chunk in self.chunks)


class SampledToken(NamedTuple):
    """The token that a chunk with `samples` produced."""

    seq_id: int
    epoch: int
    token: int


class TokenLogprobs(NamedTuple):
    """What the model thought at one output: parallel ids and natural logarithms of probability. The first is the
    sampled token, the likeliest follow, falling (the sampled one among them, if it is)."""

    ids: tuple[int, ...]
    values: tuple[float, ...]


class SampledLogprobs(NamedTuple):
    """The logprobs of a SampledToken of the same step, for the few sequences that asked."""

    seq_id: int
    epoch: int
    logprobs: TokenLogprobs


class Failure(NamedTuple):
    """One sequence's chunk went wrong (say, its logits were not finite); the others of the step are whole."""

    seq_id: int
    epoch: int
    message: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out. refused: sequences whose memory growth was refused; their chunks did not run.

    Every chunk with `samples` is answered exactly once: by a token, a refusal or a failure. logprobs lie beside
    the tokens, so that a step without them costs nothing more.
    """

    step_id: int
    tokens: tuple[SampledToken, ...] = ()
    refused: tuple[int, ...] = ()
    failed: tuple[Failure, ...] = ()
    logprobs: tuple[SampledLogprobs, ...] = ()


class Update(NamedTuple):
    """News for a client: tokens emitted now and, at the end, why ("stop" | "length" | "abort" | "error").

    logprobs: one for each token where they were asked for, else empty."""

    request_id: str
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
