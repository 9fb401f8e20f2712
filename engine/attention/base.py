"""What an attention backend promises, as data, and what it does, as one call; and which one `auto` takes.

A slab backend reads K and V of a slot as an ordinary strided tensor. It never sees pages: everything below a sequence's
length is mapped, nothing beyond is. A paged backend (research) reads Batch.paged instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.core.errors import ConfigError
from engine.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from engine.loading.spec import ModelSpec
    from engine.runner.batch import Batch

PHASES = ("prefill", "decode")
NEAR = 1.02  # a backend that wins one phase also takes the other where it is at most this much slower
Times = Mapping[str, Mapping[str, float]]  # phase -> backend -> microseconds


@dataclass(frozen=True, slots=True)
class Caps:
    """Where a backend fits. dtypes: torch names. head_dims: empty = any. over_read_tokens: how far past a sequence's
    length it may read; the allocator maps none, so only 0 is taken. graphs: every launch reads lengths and slots on
    the device, so a decode graph may replay it. paged: wants block tables, of blocks of a multiple of block_multiple
    tokens. rank: where nobody measured, the lowest of those that fit is `auto`."""

    device: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] = ()
    over_read_tokens: int = 0
    batch_invariant: bool = False
    graphs: bool = True
    paged: bool = False
    block_multiple: int = 1
    rank: int = 100


class AttentionBackend(Protocol):
    """One step's attention, layer by layer."""

    caps: Caps  # read-only; composed backends have their own

    @classmethod
    def missing(cls) -> str | None:
        """Why this machine cannot run it, or None."""

    def __init__(self, spec: ModelSpec) -> None: ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Causal attention. q: (N, H, D); k, v: (S, C, G, D) strided slab views (paged: blocks). Returns (N, H * D), in
        `out` where given.

        Query i of chunk b sits at position kv_lens[b] - length_b + i and attends to its own position and
        those before it, the last `window` of them where window > 0.
        """


backends: Registry[type[AttentionBackend]] = Registry("attention backend", "engine.attention")


def placed(attended: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """What a backend returns that cannot write into `out` itself."""
    return attended if out is None else out.copy_(attended)


def why_not(name: str, device: str, dtype: str, head_dim: int) -> list[str]:
    """Every reason for which a backend does not fit; empty when it does."""
    backend = backends[name]
    caps = backend.caps
    reasons = []
    if caps.device not in ("any", device):
        reasons.append(f"it runs on {caps.device}, not {device}")
    if dtype not in caps.dtypes:
        reasons.append(f"dtype {dtype} is not one of {', '.join(caps.dtypes)}")
    if caps.head_dims and head_dim not in caps.head_dims:
        reasons.append(f"head size {head_dim} is not one of {', '.join(map(str, caps.head_dims))}")
    if caps.over_read_tokens:
        reasons.append(f"it may read {caps.over_read_tokens} tokens past a sequence's length, which are not mapped")
    absent = backend.missing()
    if absent:
        reasons.append(absent)
    return reasons


class Choice(NamedTuple):
    """Backends by phase, and why each other one lost."""

    prefill: str
    decode: str
    lost: dict[str, list[str]]


def choose_backend(asked: str, device: str, dtype: str, head_dim: int, measured: Times | None = None) -> Choice:
    """The backends to use. measured: times of this device; a phase that lacks any goes by rank.

    Raises ConfigError when the one asked for does not fit.
    """
    reasons = {name: why_not(name, device, dtype, head_dim) for name in backends}
    fitting = sorted((name for name, why in reasons.items() if not why), key=lambda name: backends[name].caps.rank)
    if asked != "auto":
        if asked not in reasons:
            _ = backends[asked]  # raises, with the known names
        if reasons[asked]:
            raise ConfigError(
                f"--attention-backend {asked} does not fit: "
                f"{'; '.join(reasons[asked])}; use {' or '.join(['auto', *fitting])}"
            )
        return Choice(asked, asked, {})
    slabs = [name for name in fitting if not backends[name].caps.paged]
    if not slabs:
        raise ConfigError(f"no attention backend fits {device}, {dtype}, head size {head_dim}: {reasons}")
    # a backend that no graph can replay would cost decodes more than its kernels gain
    able = {"prefill": slabs, "decode": [name for name in slabs if backends[name].caps.graphs] or slabs}
    known = measured or {}
    times = {phase: {n: us for n, us in known.get(phase, {}).items() if n in able[phase]} for phase in PHASES}
    prefill, decode = (min(able[phase], key=lambda name: times[phase].get(name, float("inf"))) for phase in PHASES)
    decodes = times["decode"]
    if (not decodes and prefill in able["decode"]) or decodes.get(prefill, float("inf")) <= NEAR * decodes[decode]:
        decode = prefill
    lost = {
        name: why or [_slower(name, {"prefill": prefill, "decode": decode}, times)]
        for name, why in reasons.items()
        if name not in (prefill, decode)
    }
    return Choice(prefill, decode, lost)


def _slower(name: str, winners: Mapping[str, str], times: Times) -> str:
    """Why a backend that fits was not taken."""
    if backends[name].caps.paged:
        return "it reads block tables: for research, by name only"
    said = [
        f"{phase} {times[phase][name]:.0f} us, {winner} {times[phase][winner]:.0f} us"
        for phase, winner in winners.items()
        if name in times[phase] and winner in times[phase]
    ]
    return ", ".join(said) or f"not measured here; {winners['prefill']} stands before it in rank"


def make_backend(choice: Choice, spec: ModelSpec) -> AttentionBackend:
    """The chosen backend, or one that runs prompts by one and decodes by another."""
    prefill = backends[choice.prefill](spec)
    if choice.prefill == choice.decode:
        return prefill
    from engine.attention.by_phase import ByPhase

    return ByPhase(prefill, backends[choice.decode](spec))
