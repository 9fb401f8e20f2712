"""The offline API: a model in this process, prompts in, texts out.

It runs the code of the engine process without the process, and the detokenizer of the server without the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from engine.build import build_engine, stop_ids_for
from engine.core.clock import MonotonicClock
from engine.core.config import EngineConfig
from engine.core.errors import RequestError
from engine.core.plan import Update
from engine.core.request import Request, SamplingParams, check_token_ids
from engine.core.seeds import SeedSource
from engine.loading.resolve import resolve_model
from engine.loading.spec import read_config
from engine.scx import environment
from engine.tokenization import Detokenizer, load_tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class CompletionOutput:
    """One sample. finish_reason: "stop" | "length" | "abort" | "error"."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its samples, in the order of the prompts."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(slots=True)
class _Live:
    """A sample being generated."""

    output: CompletionOutput
    detokenizer: Detokenizer


class LLM:
    """`LLM("path-or-name").generate(["Once upon a time"], SamplingParams(max_tokens=32))`.

    model: a folder, a GGUF file or a hub id; None is SmolLM2-135M-Instruct. Other keywords are EngineConfig's fields.
    Raises ConfigError for a setting that cannot be honoured. Use as a context manager, or call close().
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        path = resolve_model(model)
        self.config = EngineConfig(model=str(path), **settings)
        self.spec = read_config(path)
        self.tokenizer = load_tokenizer(self.config.tokenizer or path)
        self._scx_environment = environment.snapshot()
        self.engine = build_engine(self.config)
        self._clock = MonotonicClock()
        self._seeds = SeedSource(self.config.seed)
        self._count = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt (a text or token ids). One SamplingParams for all or one each.

        Raises RequestError for a prompt that is empty, too long or holds ids outside the vocabulary; nothing has run
        then. Returns one RequestOutput a prompt, in order.
        """
        self._scx_environment = environment.check_unchanged(self._scx_environment)
        many: Sequence[Prompt] = [prompts] if _is_single(prompts) else prompts  # type: ignore[list-item,assignment]
        params = sampling_params or SamplingParams()
        each = list(params) if isinstance(params, Sequence) else [params] * len(many)
        if len(each) != len(many):
            raise RequestError(f"{len(each)} sampling_params for {len(many)} prompts; give one, or one a prompt")
        results: list[RequestOutput] = []
        requests: list[Request] = []
        live: dict[str, _Live] = {}
        for prompt, rule in zip(many, each, strict=True):
            result, new = self._prepare(prompt, rule)
            results.append(result)
            for request, output in zip(new, result.outputs, strict=True):
                requests.append(request)
                live[request.request_id] = _Live(
                    output, Detokenizer(self.tokenizer, stop=rule.stop, min_tokens=rule.min_tokens, continues=True)
                )
        for request in requests:
            self.engine.validate(request)
        for request in requests:
            self.engine.add(request)
        try:
            self._run(live, tqdm(total=len(live), desc="generate", unit="sample", disable=not use_tqdm))
        finally:
            for request_id in live:
                self.engine.abort(request_id)
        return results

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template. See generate."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Iterable[Any] = [messages] if single else messages
        prompts = [
            self.tokenizer.encode(self.tokenizer.render_chat(list(conversation)), add_special_tokens=False)
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def close(self) -> None:
        """Give slots, pages and threads back. Idempotent."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[RequestOutput, list[Request]]:
        """Encode one prompt into the n requests of its samples."""
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_token_ids("prompt", ids, self.spec.vocab)
        name = f"offline-{self._count}"
        self._count += 1
        stop_ids = stop_ids_for(self.spec, params)
        requests = []
        for i in range(params.n):
            seed = self._seeds.next() if params.seed is None else params.seed + i
            sample = params.replace(seed=seed, n=1)
            requests.append(Request(f"{name}-{i}", tuple(ids), sample, self._clock.now_s(), stop_ids))
        return RequestOutput(name, text, ids, [CompletionOutput(i) for i in range(params.n)]), requests

    def _run(self, live: dict[str, _Live], bar: tqdm[Any]) -> None:
        """Step until every sample has ended."""
        with bar:
            while live:
                for update in self.engine.step():
                    if update.request_id in live and self._feed(live[update.request_id], update):
                        del live[update.request_id]
                        bar.update()

    def _feed(self, sample: _Live, update: Update) -> bool:
        """Add an update's tokens to a sample. Returns True when the sample has ended."""
        output = sample.output
        delta = sample.detokenizer.push(list(update.tokens))
        output.token_ids += update.tokens[: delta.num_tokens_kept] if delta.stopped else update.tokens
        output.text += delta.text
        if delta.stopped:
            output.finish_reason = "stop"
            self.engine.abort(update.request_id)
            return True
        if update.finish_reason is None:
            return False
        output.text += sample.detokenizer.finish().text
        output.finish_reason = update.finish_reason
        return True


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether `prompts` is one prompt: a text, or a list of ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
