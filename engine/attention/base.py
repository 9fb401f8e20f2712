"""What an attention backend promises, as data, and what it does, as one call.

A backend reads K and V of a slot as an ordinary strided tensor. It never sees pages: everything below a sequence's
length is mapped, nothing beyond is, unless its capabilities ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.core.errors import ConfigError
from engine.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from engine.loading.spec import ModelSpec
    from engine.runner.batch import Batch


@dataclass(frozen=True, slots=True)
class Caps:
    """Where a backend fits. dtypes: torch names. head_dims: empty = any. over_read_tokens: how far past a sequence's
    length it may read (mapped memory must reach that far). rank: among those that fit, the lowest is `auto`."""

    device: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] = ()
    over_read_tokens: int = 0
    batch_invariant: bool = False
    rank: int = 100


class AttentionBackend(Protocol):
    """One step's attention, layer by layer."""

    caps: Caps

    @classmethod
    def missing(cls) -> str | None:
        """Why this machine cannot run it, or None."""

    def __init__(self, spec: ModelSpec) -> None: ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int = 0
    ) -> torch.Tensor:
        """Causal attention. q: (N, H, D); k, v: (S, C, G, D) strided slab views. Returns (N, H * D).

        Query i of chunk b sits at position kv_lens[b] - length_b + i and attends to its own position and
        those before it, the last `window` of them where window > 0.
        """


backends: Registry[type[AttentionBackend]] = Registry("attention backend", "engine.attention")

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
    absent = backend.missing()
    if absent:
        reasons.append(absent)
    return reasons


def choose_backend(asked: str, device: str, dtype: str, head_dim: int) -> tuple[str, dict[str, list[str]]]:
    """The backend to use and why each other one lost. Raises ConfigError when the one asked for does not fit."""
    reasons = {name: why_not(name, device, dtype, head_dim) for name in backends}
    fitting = sorted((name for name, why in reasons.items() if not why), key=lambda name: backends[name].caps.rank)
    if asked == "auto":
        if not fitting:
            raise ConfigError(f"no attention backend fits {device}, {dtype}, head size {head_dim}: {reasons}")
        losers = {name: why or [f"{fitting[0]} is faster here"] for name, why in reasons.items() if name != fitting[0]}
        return fitting[0], losers
    if asked not in reasons:
        _ = backends[asked]  # raises, with the known names
    if reasons[asked]:
        raise ConfigError(
            f"--attention-backend {asked} does not fit: "
            f"{'; '.join(reasons[asked])}; use {' or '.join(['auto', *fitting])}"
        )
    return asked, {}
