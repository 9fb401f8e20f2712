"""One HTTP request's samples, from token ids to pieces of text: n per prompt, stop strings, usage, abort.

It does not know HTTP or JSON, and nothing of the engine but its client. Whoever uses a Generation closes it: what has
not ended then is aborted in the engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.core.clock import Clock
from engine.core.plan import TokenLogprobs
from engine.core.request import MAX_SEED, SamplingParams
from engine.core.seeds import SeedSource
from engine.serve import wire
from engine.serve.engine_client import EngineClient, EngineFailed
from engine.serve.errors import ApiError
from engine.serve.logprobs_json import chars_begun
from engine.serve.mailbox import Mailbox, Piece
from engine.serve.metrics import Metrics

if TYPE_CHECKING:
    from engine.serve.reduction import ReductionSampler
    from engine.tokenization import Detokenizer


class ClientGone(Exception):
    """The client has left; there is nobody to answer."""


class Prompt(NamedTuple):
    """One prompt. base_tokens: how many tokens of the base vocabulary its text has; echo: text that goes before the
    answer, whole characters; None = nothing does."""

    ids: list[int]
    base_tokens: int
    echo: str | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice and, at the end, why it ended ("stop" | "length"). logprobs: of the tokens that came,
    where they were asked for; text may lag behind them. offsets: characters of the answer before each of them."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Sequence[TokenLogprobs] = ()
    offsets: Sequence[int] = ()


@dataclass(slots=True)
class _Sample:
    """A choice being generated."""

    request_id: str
    detokenizer: Detokenizer
    num_tokens: int = 0
    base_tokens: int = 0
    begun: bool = False  # the prompt ends inside a character, and no token has said yet whether it goes on with it
    chars: int = 0  # begun in tokens whose logprobs were told
    last_s: float = 0.0
    finish_reason: str | None = None
    output: list[int] | None = None  # every token, where it is to be counted


@dataclass(frozen=True, slots=True)
class Tools:
    """What a generation needs of the server. base_lengths: id -> base tokens it stands for; None = a plain model."""

    engine: EngineClient
    tokenizer: Any
    eos_ids: tuple[int, ...]
    clock: Clock
    metrics: Metrics
    seeds: SeedSource
    base_lengths: Sequence[int] | None = None
    sampler: ReductionSampler | None = None


class Generation:
    """Samples prompt-major: choice index = prompt index * n + sample index."""

    def __init__(self, tools: Tools, prompts: Sequence[Prompt], params: SamplingParams, *, max_tokens: Sequence[int],
                 priority: int, accepted_s: float, max_base_tokens: int | None = None, tenant: bytes = b"") -> None:
        """max_tokens: output tokens of each prompt, already within the context (params.max_tokens is not used).
        max_base_tokens: a sample ends with the token that brings it to so many base tokens.

        accepted_s: when the request was whole; all its times count from there. tenant: see Request.
        """
        from engine.tokenization import Detokenizer
        from engine.tokenization.stream import unfinished_bytes

        self.name = secrets.token_hex(12)
        self.mailbox = Mailbox(len(prompts) * params.n)
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self.base_prompt_tokens = sum(prompt.base_tokens for prompt in prompts)
        self.echoes = [prompt.echo or "" for prompt in prompts for _ in range(params.n)]
        self._tools = tools
        self._accepted_s, self._tenant = accepted_s, tenant
        self._max_base_tokens = max_base_tokens
        self._open = 0
        begun = [unfinished_bytes(tools.tokenizer.table, prompt.ids) for prompt in prompts]
        self._samples = []
        for i in range(len(prompts) * params.n):
            cut, echoed = begun[i // params.n], prompts[i // params.n].echo is not None
            detokenizer = Detokenizer(tools.tokenizer, stop=params.stop, min_tokens=params.min_tokens, continues=True,
                                      begun=cut, owed=echoed)
            self._samples.append(_Sample(f"{self.name}-{i}", detokenizer, begun=bool(cut)))
        if tools.sampler is not None:
            for sample in self._samples:
                sample.output = tools.sampler.choose()
        self._prompts = prompts if any(sample.output is not None for sample in self._samples) else ()
        self._adds = [
            self._add(sample.request_id, prompts[i // params.n].ids, params, i % params.n, max_tokens[i // params.n],
                      priority)
            for i, sample in enumerate(self._samples)
        ]

    def start(self) -> None:
        """Send every sample to the engine. Raises ApiError 503 when it has just gone."""
        try:
            self._tools.engine.add(self._adds, self.mailbox)
        except EngineFailed as error:
            raise ApiError(503, f"{error}; try again later") from None
        self._open = len(self._samples)
        self._adds = []
        self._tools.metrics.prompt_tokens.inc(self.prompt_tokens)

    async def accepted(self) -> None:
        """Wait until the engine took all of it, so that a refusal can still become a 400. Raises as next() does."""
        await self.mailbox.accepted()
        if self.mailbox.gone:
            raise ClientGone
        self.raise_refusal(self.mailbox.peek())

    async def next(self) -> list[TextDelta]:
        """Wait for text. Empty lists are possible (half a character came). Call while not done.

        Raises ApiError when the engine ended a sample with an error, ClientGone when the client left.
        """
        pieces = await self.mailbox.take()
        if self.mailbox.gone:
            raise ClientGone
        self.raise_refusal(pieces)
        now_s = self._tools.clock.now_s()
        deltas = []
        for index, piece in pieces.items():
            delta = self._feed(index, piece, now_s)
            if delta is not None:
                deltas.append(delta)
        return deltas

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return self._open == 0

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all samples; those behind a stop string are not counted."""
        return sum(sample.num_tokens for sample in self._samples)

    def usage(self) -> dict[str, int]:
        """OpenAI's usage object; on a patched model also in base tokens."""
        done = self.completion_tokens
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": done,
                 "total_tokens": self.prompt_tokens + done}  # fmt: skip
        if self._tools.base_lengths is not None:
            usage["base_prompt_tokens"] = self.base_prompt_tokens
            usage["base_completion_tokens"] = sum(sample.base_tokens for sample in self._samples)
        return usage

    def close(self, outcome: str = "abort") -> None:
        """Abort what has not ended, and count it. Idempotent."""
        unfinished = [sample for sample in self._samples if sample.finish_reason is None]
        for sample in unfinished:
            sample.finish_reason = outcome
        if unfinished and self._open:
            self._tools.engine.abort([sample.request_id for sample in unfinished])
            self._tools.metrics.requests.labels(outcome).inc(len(unfinished))
        self._open = 0

    @staticmethod
    def raise_refusal(pieces: dict[int, Piece]) -> None:
        """ApiError for the first sample that ended with an error: the whole answer has failed."""
        for piece in pieces.values():
            if piece.error is not None:
                raise ApiError(piece.status if piece.status in (400, 503) else 500, piece.error, piece.param)
            if piece.finish_reason in ("abort", "error"):
                raise ApiError(500, "the engine ended this request; try again")

    def _add(self, request_id: str, prompt: list[int], params: SamplingParams, sample: int, max_tokens: int,
             priority: int) -> wire.Add:
        seed = self._tools.seeds.next() if params.seed is None else (params.seed + sample) & MAX_SEED
        sampling = wire.Sampling(
            max_tokens=max_tokens, temperature=float(params.temperature), top_k=params.top_k,
            top_p=float(params.top_p), min_p=float(params.min_p), seed=seed,
            min_tokens=min(params.min_tokens, max_tokens), ignore_eos=params.ignore_eos,
            stop_token_ids=list(params.stop_token_ids), logprobs=params.logprobs,
            logit_bias=list(params.logit_bias))  # fmt: skip
        eos = () if params.ignore_eos else self._tools.eos_ids
        stop_ids = sorted({*eos, *params.stop_token_ids})
        return wire.Add(request_id, prompt, sampling, stop_ids, priority, self._accepted_s, self._tenant)

    def _feed(self, index: int, piece: Piece, now_s: float) -> TextDelta | None:
        """Tokens of one sample to text; notices stop strings."""
        sample = self._samples[index]
        if sample.finish_reason is not None:
            return None
        tokens, full = self._within(sample, piece.tokens)
        delta = sample.detokenizer.push(tokens)
        if sample.output is not None:
            sample.output += tokens
        text, kept = delta.text, delta.num_tokens_kept if delta.stopped else len(tokens)
        self._measure(sample, kept, now_s)
        if self._tools.base_lengths is not None:
            sample.base_tokens += sum(self._tools.base_lengths[token] for token in tokens[:kept])
        logprobs = piece.logprobs[:kept]
        offsets = [self._offset(sample, entry.ids[0]) for entry in logprobs]
        if delta.stopped:
            self._tools.engine.abort([sample.request_id])
            sample.finish_reason = "stop"
        elif full or piece.finish_reason is not None:
            if piece.finish_reason is None:
                self._tools.engine.abort([sample.request_id])
            text += sample.detokenizer.finish().text
            cut = len(tokens) < len(piece.tokens)
            sample.finish_reason = "length" if cut or piece.finish_reason is None else piece.finish_reason
        if sample.finish_reason is not None:
            self._open -= 1
            self._tools.metrics.requests.labels(sample.finish_reason).inc()
            self._tools.metrics.e2e_s.observe(now_s - self._accepted_s)
            if sample.output is not None and self._tools.sampler is not None:
                n = len(self._samples) // len(self._prompts)
                self._tools.sampler.ended(self._prompts[index // n].ids, sample.output)
        if not text and not logprobs and sample.finish_reason is None:
            return None
        return TextDelta(index, text, sample.finish_reason, logprobs, offsets)

    def _within(self, sample: _Sample, tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens up to the one that reaches max_base_tokens, and whether one of them does."""
        if self._max_base_tokens is None:
            return tokens, False
        lengths, done = self._tools.base_lengths, sample.base_tokens
        if lengths is None:
            done = sample.num_tokens
        for place, token in enumerate(tokens, 1):
            done += 1 if lengths is None else lengths[token]
            if done >= self._max_base_tokens:
                return tokens[:place], True
        return tokens, False

    def _offset(self, sample: _Sample, token: int) -> int:
        """Characters before a token, which is counted. One that goes on with the prompt's last character begins it,
        as far as the answer goes."""
        table, before = self._tools.tokenizer.table, sample.chars
        piece = b"" if token in table.special_ids else table.piece(token)
        sample.chars += chars_begun(piece)
        if sample.begun and piece:
            sample.begun = False
            sample.chars += 0x80 <= piece[0] < 0xC0
        return before

    def _measure(self, sample: _Sample, tokens: int, now_s: float) -> None:
        if tokens == 0:
            return
        metrics = self._tools.metrics
        metrics.output_tokens.inc(tokens)
        if sample.num_tokens == 0:
            metrics.ttft_s.observe(now_s - self._accepted_s)
        else:
            for _ in range(min(tokens, 64)):
                metrics.between_s.observe((now_s - sample.last_s) / tokens)
        sample.num_tokens += tokens
        sample.last_s = now_s
