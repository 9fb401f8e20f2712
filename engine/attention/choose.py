"""Which attention backends a device gets: the one asked for, or by phase the fastest that fits.

It knows what backends promise and what was measured of them, nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from engine.attention.base import AttentionBackend, backends
from engine.attention.by_phase import ByPhase
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.loading.spec import ModelSpec

PHASES = ("prefill", "decode")
NEAR = 1.02  # a backend that wins one phase also takes the other where it is at most this much slower
Times = Mapping[str, Mapping[str, float]]  # phase -> backend -> microseconds


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
    return ByPhase(prefill, backends[choice.decode](spec))
