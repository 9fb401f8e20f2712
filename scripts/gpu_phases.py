"""Sections of scripts.gpu_kernels about whole backends: by phase, blocks against slabs, sampling.

Backends run as the engine calls them, over a mega slab of a few layers, in CUDA graphs; what they plan on the host is
planned before. Times of `phases` decide which backend `auto` takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from engine.attention.base import backends
from engine.core.request import SamplingParams
from engine.runner.batch import Batch, Paged, Row, pack
from engine.runner.device_sampler import choose, fill_rules, plain_rules
from engine.runner.sampler import Pick, finite_argmax
from scripts.gpu_timing import Call
from tessera_kernels import triton_attention_prefill
from tessera_kernels.triton_argmax import RowArgmax
from tessera_kernels.triton_sample import edit_logits, sample_rows

if TYPE_CHECKING:
    from scripts.gpu_trial import Session

HEADS, KV_HEADS, DIM, LAYERS, VOCAB = 32, 8, 128, 8, 128256
SPEC: Any = SimpleNamespace(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
Chunks = list[tuple[int, int]]  # (tokens cached before, tokens of the chunk), prompts first
PREFILL: dict[str, Chunks] = {"2048 whole": [(0, 2048)], "512 at 2k": [(1536, 512)], "512 at 8k": [(7680, 512)],
                              "2048 at 8k": [(6144, 2048)]}  # fmt: skip
DECODE: dict[str, Chunks] = {"64x2048": [(2047, 1)] * 64, "256x384": [(383, 1)] * 256, "16x1024": [(1023, 1)] * 16,
                             "1x768": [(767, 1)]}  # fmt: skip

@dataclass
class Case:
    """A step of chunks over a mega slab k, v (S, C, L, G, D), or over blocks of it."""

    s: Session
    shape: str
    chunks: Chunks
    k: torch.Tensor
    v: torch.Tensor
    batch: Batch
    q: torch.Tensor

    @classmethod
    def make(cls, s: Session, shape: str, chunks: Chunks) -> Case:
        """Random keys, values and queries on the device; where nothing runs, a slab of few tokens."""
        room = 64 if s.compile_only else max(start + count for start, count in chunks)
        both = s.normal(2, len(chunks), room, LAYERS, KV_HEADS, DIM)
        host = pack([Row(slot, start, [0] * count, True) for slot, (start, count) in enumerate(chunks)])
        batch = host if s.compile_only else host.to(torch.device(s.device))
        return cls(s, shape, chunks, both[0], both[1], batch, s.normal(host.num_tokens, HEADS, DIM))

    def call(self, backend: Any) -> Call:
        """The backend on one layer of the slab; layer 0 begins a new step."""
        def layer(i: int) -> None:
            if i == 0:
                self.batch = replace(self.batch)
            backend.attend(self.q, self.k[:, :, i], self.v[:, :, i], self.batch)

        return layer

    def blocks(self, tokens: int) -> Case:
        """The same memory as blocks of so many tokens, dealt out in random order."""
        whole = self.k.shape[1] // tokens * tokens
        k, v = (x[:, :whole].reshape(-1, tokens, *x.shape[2:]) for x in (self.k, self.v))
        order = torch.randperm(k.shape[0], dtype=torch.int32).view(len(self.chunks), -1)
        b = self.batch
        paged = Paged(order.to(self.s.device), order.numpy(), tokens, b.token_slots, b.positions)
        return replace(self, k=k, v=v, batch=replace(b, paged=paged))

    def compile(self, calls: list[Call]) -> None:
        """Build what they launch."""
        self.s.compile([lambda c=call: c(0) for call in calls])  # type: ignore[misc]

    def time(self, section: str, variant: str, call: Call) -> float:
        """Microseconds a layer, recorded with its bytes (keys and values once) and products."""
        nbytes = sum(start + count for start, count in self.chunks) * KV_HEADS * DIM * 4.0
        flops = sum(4.0 * HEADS * DIM * (start * count + count * (count + 1) / 2) for start, count in self.chunks)
        return self.s.time(section, self.shape, variant, call, LAYERS, nbytes=nbytes, flops=flops, calls=LAYERS)


def usable(s: Session, *, paged: bool = False) -> dict[str, Any]:
    """Backends that run here, by name; a line for each that cannot."""
    found = {}
    for name in backends:
        caps = backends[name].caps
        if caps.device != "cuda" or caps.paged is not paged or caps.block_multiple > 1:
            continue
        missing = None if s.compile_only and name.startswith("triton") else backends[name].missing()
        if missing:
            print(f"  {name}: {missing}", flush=True)
        else:
            found[name] = backends[name](SPEC)
    return found


def ours(calls: dict[str, Call]) -> list[Call]:
    """Those that Triton compiles."""
    return [call for name, call in calls.items() if name.startswith("triton")]


def phases(s: Session) -> None:
    """Each backend on prompts and on decodes; the geometric means go into the settings."""
    times: dict[str, dict[str, float]] = {}
    tried = usable(s)
    for phase, shapes in (("prefill", PREFILL), ("decode", DECODE)):
        totals = dict.fromkeys(tried, 0.0)
        for shape, chunks in shapes.items():
            case = Case.make(s, f"{phase} {shape}", chunks)
            calls = {name: case.call(backend) for name, backend in tried.items()}
            case.compile(ours(calls))
            for name, call in calls.items():
                totals[name] += math.log(case.time("phases", name, call)) / len(shapes)
            s.show_best("phases", case.shape, 9)
        times[phase] = {name: round(math.exp(total), 2) for name, total in totals.items() if total < math.inf}
    if not s.compile_only:
        s.report.settings["phases"] = {str(DIM): times}
        print("  by phase:", times, flush=True)


def paged(s: Session) -> None:
    """The same kernels over slabs and over blocks of 32 tokens (a 2 MiB page of 32 layers) and of 16."""
    shapes = {"64x512": [(511, 1)] * 64, "64x2048": [(2047, 1)] * 64, "64x8192": [(8191, 1)] * 64,
              "2048 whole": [(0, 2048)], "512 at 8k": [(7680, 512)], "2048 at 8k": [(6144, 2048)]}  # fmt: skip
    plain = triton_attention_prefill.measured_config
    slabs, blocks = usable(s), usable(s, paged=True)
    for shape, chunks in shapes.items():
        case = Case.make(s, shape, chunks)
        calls = {name: case.call(backend) for name, backend in slabs.items()}
        for tokens in (32, 16):
            cut = case.blocks(tokens)
            calls |= {f"{name}, blocks of {tokens}": cut.call(backend) for name, backend in blocks.items()}
        case.compile(ours(calls))
        for name, call in calls.items():
            case.time("paged", name, call)
        if chunks[0][1] > 1:  # like with like: bulk copies cannot follow a table, so the slab kernel without them
            triton_attention_prefill.measured_config = lambda q, dim: replace(plain(q, dim), bulk=False)
            try:
                case.compile([calls["triton_vattn"]])
                case.time("paged", "triton_vattn, no bulk copies", calls["triton_vattn"])
            finally:
                triton_attention_prefill.measured_config = plain
        s.show_best("paged", shape, 9)


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0}, "temperature": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50}, "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}  # fmt: skip


def sample(s: Session) -> None:
    """Choosing tokens from logits of a vocabulary of 128,256, by rule."""
    row_argmax = RowArgmax(256, VOCAB, s.device)

    def argmax(x: torch.Tensor) -> torch.Tensor:
        return row_argmax(x)[0]

    for rows in (1, 16, 64, 256):
        logits = s.normal(rows, VOCAB, scale=3.0, dtype=torch.float32)
        calls: dict[str, Call] = {}
        for name, values in RULES.items():
            rules = plain_rules(rows, 8)
            fill_rules(rules, [Pick(SamplingParams(seed=i, **values), 0, frozenset()) for i in range(rows)], VOCAB)
            calls[name] = _choosing(logits, torch.from_numpy(rules).to(s.device), argmax)
        calls["* argmax alone"] = lambda i, x=logits: finite_argmax(x, argmax)  # type: ignore[misc]
        calls["* torch.sort alone"] = lambda i, x=logits: x.sort(dim=-1, descending=True)  # type: ignore[misc]
        none = torch.zeros(rows, dtype=torch.int64, device=s.device)
        plain = torch.from_numpy(plain_rules(rows, 8)).to(s.device)
        # piece by piece: where nothing runs, argmax leaves no index that anything may follow
        s.compile([partial(argmax, logits), partial(edit_logits, logits, plain),
                   partial(sample_rows, logits, plain, none)])  # fmt: skip
        for name, call in calls.items():
            s.time("sample", f"{rows} rows", name, call, 1, nbytes=rows * VOCAB * 4.0, calls=2)
        s.show_best("sample", f"{rows} rows", 9)


def _choosing(logits: torch.Tensor, rules: torch.Tensor, argmax: Any) -> Call:
    return lambda i: choose(logits, rules, argmax)
