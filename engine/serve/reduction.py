"""Live figures of rho: of a few requests, the engine tokens and the base tokens of prompt and output are counted.

One sample in EVERY, one count at a time, in a text worker, after the request has ended, and only while a worker has
nothing else to do; what cannot be counted then is left out. Only counts leave this module. It knows no estimator:
that is engine/core/demand.py, in the engine process, where admission is. Also what the server says of its context.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.core.config import EngineConfig
from engine.core.demand import Advertised, advertise
from engine.patching.reduction import Reduction, load_reduction
from engine.serve.errors import ApiError
from engine.serve.text_pool import TextPool

log = logging.getLogger(__name__)

EVERY = 16
Report = Callable[[str, int, int], None]


class ReductionSampler:
    """report(side, base tokens, engine tokens) for one sample in EVERY."""

    def __init__(self, text: TextPool, report: Report) -> None:
        self._text = text
        self._report = report
        self._turn = 0
        self._task: asyncio.Task[None] | None = None

    def choose(self) -> list[int] | None:
        """A list to collect the next sample's output in, if it is one to count."""
        self._turn = (self._turn + 1) % EVERY
        return [] if self._turn == 0 else None

    def ended(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """A chosen sample is over."""
        if (self._task is None or self._task.done()) and self._text.idle:
            self._task = asyncio.get_running_loop().create_task(self._count(list(prompt), list(output)))

    async def _count(self, prompt: list[int], output: list[int]) -> None:
        for side, tokens in (("in", prompt), ("out", output)):
            try:
                counted = await self._text.count_both(tokens)
            except ApiError:
                return  # a worker that was late or is gone: the text pool says so itself
            self._report(side, counted.base, counted.own)


def context_of(config: EngineConfig, patch: Path | None, max_model_len: int) -> tuple[Reduction, Advertised | None]:
    """What is known of rho, and the context in base tokens where the input side was measured; the log says it. patch:
    the artefact's folder."""
    reduction = load_reduction(config.token_reduction, patch, config.token_reduction_domain)
    if reduction.into is None:
        return reduction, None
    context = advertise(max_model_len, reduction.into)
    log.info("a context of %d tokens is %d base tokens for %.0f %% of the texts of domain %s, and at least %d for any",
             max_model_len, context.likely, 100 * context.confidence, reduction.domain, context.safe)
    return reduction, context


def context_card(context: Advertised | None, domain: str) -> dict[str, Any]:
    """The extension field of a model's card: its context in base tokens, and how sure that is."""
    if context is None:
        return {}
    return {"base_context": {"tokens": context.likely, "confidence": context.confidence, "domain": domain,
                             "guaranteed_tokens": context.safe}}  # fmt: skip
