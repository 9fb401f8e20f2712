"""An engine process whose loop is a few lines: the real process, wire and signals, without torch or a model.

`python -m tests.serve.fake_engine`. A sample's tokens are its prompt's, repeated; some prompts ask for trouble by
their first id (see TROUBLE). It must never be reachable from the package: only tests name this module.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.core.config import EngineConfig
from engine.core.errors import ConfigError, RequestError
from engine.core.plan import Update
from engine.core.request import Request
from engine.serve import wire
from engine.serve.engine_process import Built, main

VOCAB = 512
LENGTH = 256
STEP_S = 0.01
RAISE_ID, REFUSE_ID, STEP_RAISES_ID, DIE_ID, SLEEP_ID = 500, 501, 502, 503, 504  # ids that ask for trouble


@dataclass
class Live:
    """A sample and how many tokens it has had."""

    request: Request
    done: int = 0


class FakeLoop:
    """The interface of EngineLoop: every step gives each live sample one token of its own prompt."""

    def __init__(self) -> None:
        self.live: dict[str, Live] = {}
        self.ended = 0
        self.count = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: Request) -> int:
        if request.prompt[0] == RAISE_ID:
            raise RuntimeError("a secret that must not reach the client")
        if request.prompt[0] == REFUSE_ID:
            raise RequestError("the pool is too small for this", "prompt")
        self.live[request.request_id] = Live(request)
        self.count += 1
        return self.count

    def abort(self, request_id: str) -> bool:
        return self.live.pop(request_id, None) is not None

    def set_kv_limit(self, groups: int) -> int:
        if groups > 64:
            raise ConfigError(f"groups={groups} is not in 1..64")
        if groups < len(self.live):
            raise RequestError("a live request may need more", "groups")
        return len(self.live)

    def step(self) -> list[Update]:
        time.sleep(STEP_S)
        updates = []
        for name, sample in list(self.live.items()):
            first = sample.request.prompt[0]
            if first == STEP_RAISES_ID:
                raise RuntimeError("a secret that must not reach the client")
            if first == DIE_ID:
                os.kill(os.getpid(), signal.SIGKILL)
            if first == SLEEP_ID and sample.done == 1:
                continue
            token = sample.request.prompt[sample.done % len(sample.request.prompt)]
            sample.done += 1
            stopped = token in sample.request.stop_ids
            ended = stopped or sample.done >= (sample.request.params.max_tokens or LENGTH)
            reason = ("stop" if stopped else "length") if ended else None
            updates.append(Update(name, (token,), reason))
            if ended:
                del self.live[name]
        return updates

    def stats(self) -> dict[str, Any]:
        return {"running": len(self.live), "waiting": 0, "kv_groups_in_use": len(self.live)}

    def close(self) -> None:
        self.live.clear()


def build(config: EngineConfig, report: Callable[[str], None]) -> Built:
    """As engine_process.build_real."""
    report("building a fake")
    if config.seed == 13:
        raise ConfigError("--seed 13 is refused by the fake engine; use another")
    if config.seed == 14:
        raise RuntimeError("cannot build")
    return Built(FakeLoop(), wire.Facts(LENGTH, VOCAB, [1], 4096, 2, 64, "a fake engine"))


if __name__ == "__main__":
    status = main(build)
    sys.stderr.flush()
    os._exit(status)
