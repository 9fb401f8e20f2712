"""What the untrusted side holds, taken from a running engine: its slabs, and what its observer saw cross.

It drives model and memory directly, a request at a time, so that a test can choose the nonces of sessions. It hands
out Views and logits; how rows were encoded it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from engine.build import build_runner, resolve
from engine.core.config import EngineConfig
from engine.kv.slots import SlotStore
from engine.runner.batch import Batch, Row, pack
from engine.scx.segments import parts_of
from scripts.scx_attacks.view import Rules, View

PLAIN = "plain"
POOL_BYTES = 256 << 20


@dataclass(slots=True)
class Request:
    """A request on the device. fed: tokens computed; seen: (layer, what) -> tensors as they crossed, a chunk each:
    "k" and "q" (of V1 and V3), and of V4 "qkv", "attended" and "decoded"; the orders of sealed blocks are kept as
    "slots", "firsts" and "order" and not attacked with."""

    slot: int
    fed: int = 0
    seen: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)

    def all(self, layer: int, what: str) -> torch.Tensor:
        """The chunks as one."""
        return torch.cat(self.seen[layer, what])


class _Spy:
    """An attention backend that shows what it was given, for layers that are not encoded and have no observer."""

    def __init__(self, backend: Any, layer: int, observe: Any) -> None:
        self._backend, self._layer, self._observe = backend, layer, observe
        self.scale = backend.scale

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See AttentionBackend."""
        where = (batch.token_slots.long(), batch.positions.long())
        self._observe("V1", self._layer, {"k": k[where], "v": v[where]})
        self._observe("V3", self._layer, {"q": q})
        return self._backend.attend(q, k, v, batch, window, out)  # type: ignore[no-any-return]


class Device:
    """An engine with one scheme. folder: a model; layers: as --scx-layers; key_file: as --scx-key-file."""

    def __init__(
        self, folder: Path, rules: Rules, *, dtype: str, max_tokens: int, layers: str = "all",
        key_file: Path | None = None,
    ) -> None:  # fmt: skip
        self.rules = rules
        scx: dict[str, Any] = {"scx_layers": ""}
        if rules.scheme != PLAIN:
            scx = {"scx_layers": layers, "scx_scheme": rules.scheme, "scx_page_seal": bool(rules.seal_tokens),
                   "scx_seal_tokens": rules.seal_tokens or None, "scx_segment_tokens": rules.segment_tokens or None,
                   "scx_key_file": str(key_file) if key_file else None}  # fmt: skip
        config = EngineConfig(model=str(folder), dtype=dtype, max_model_len=max_tokens, max_num_seqs=2,
                              threads=torch.get_num_threads(),
                              kv_pool_bytes=POOL_BYTES, attention_backend="torch_vattn", **scx)  # fmt: skip
        resolved, self.spec, groups = resolve(config)
        self.runner = build_runner(self.spec, resolved, groups, kernels="torch")
        self._request: Request | None = None
        self._batch: Batch | None = None
        self._watch()

    def _watch(self) -> None:
        if self.runner.scx is not None:
            self.runner.scx.scx.observer = self._observe
        for index, layer in enumerate(self.runner.model.layers):  # type: ignore[attr-defined]
            if not self._encoded(index):
                layer.attention.backend = _Spy(layer.attention.backend, index, self._observe)

    def _encoded(self, layer: int) -> bool:
        return self.runner.scx is not None and layer in self.runner.scx.scx.config.layers

    def _observe(self, view: str, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        assert self._request is not None and self._batch is not None
        for what, tensor in tensors.items():
            if what == "q" and self._encoded(layer) and self.rules.segment_tokens:
                # a query has a row for each segment that it looks at; here the one of its own segment
                parts = parts_of(self._batch, self.rules.segment_tokens)
                own = [range(part.first, part.first + max(0, part.end - part.position)) for part in parts]
                tensor = tensor[torch.tensor([row for rows in own for row in rows])]
            self._request.seen.setdefault((layer, what), []).append(tensor.float().clone())

    def open(self, tokens: int, nonce: bytes) -> Request:
        """Memory and a session for a request of that many tokens."""
        store = self.runner.store
        assert isinstance(store, SlotStore)
        slot = store.allocator.acquire(tokens)
        assert isinstance(slot, int) and store.allocator.ensure(slot, tokens) is None
        if self.runner.scx is not None:
            self.runner.scx.scx.secure.open(slot, nonce)
        return Request(slot)

    @torch.inference_mode()
    def feed(self, request: Request, tokens: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        """Compute the next tokens (n,) in chunks. Returns their logits (n, V)."""
        self._request, logits = request, []
        for chunk in tokens.split(chunk_tokens):
            batch = pack([Row(request.slot, request.fed, chunk.tolist(), True)])
            batch.sample_rows = torch.arange(len(chunk))
            self._batch = batch
            logits.append(self.runner.model(batch))
            request.fed += len(chunk)
        self._request = None
        return torch.cat(logits)

    def slabs(self, request: Request, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, the slab's own memory: (fed, G, D) each."""
        k, v = self.runner.store.layer_views(layer)
        return k[request.slot, : request.fed], v[request.slot, : request.fed]

    def view(self, request: Request, layer: int) -> View:
        """What an attacker gets of one layer."""
        k, v = (side.float().clone() for side in self.slabs(request, layer))
        return View(self.rules, layer, k, v, request.all(layer, "q"), request.all(layer, "k"))

    def close(self, request: Request) -> None:
        """End the session and give the slot back."""
        store = self.runner.store
        assert isinstance(store, SlotStore)
        if self.runner.scx is not None:
            self.runner.scx.scx.secure.close(request.slot)
        store.allocator.release(request.slot)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.runner.close()


def numbered_nonces() -> Iterator[bytes]:
    """Nonces that come once each, and the same in every run: a measurement must repeat. Not for serving."""
    number = 0
    while True:
        yield number.to_bytes(16, "big")
        number += 1


@dataclass(slots=True)
class Engine:
    """A Capture (see table.py): an engine for the scheme, every prompt under a session of its own."""

    folder: Path
    layers: Sequence[int]
    dtype: str
    key_file: Path
    chunk_tokens: int
    nonces: Iterator[bytes] = field(default_factory=numbered_nonces)

    def __call__(self, rules: Rules, prompts: Sequence[torch.Tensor]) -> list[dict[int, View]]:
        """The views of self.layers, for each prompt."""
        found = []
        longest = max(len(prompt) for prompt in prompts)
        with Device(self.folder, rules, dtype=self.dtype, max_tokens=longest,
                    layers=",".join(map(str, self.layers)), key_file=self.key_file) as device:
            for prompt in prompts:
                request = device.open(len(prompt), next(self.nonces))
                device.feed(request, prompt, self.chunk_tokens)
                found.append({layer: device.view(request, layer) for layer in self.layers})
                device.close(request)
        return found
