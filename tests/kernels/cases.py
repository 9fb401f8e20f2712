"""What the kernel tests share: seeded tensors, slabs in both layouts, ragged batches. It asserts nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = (torch.bfloat16, torch.float32)


def rand(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A normal tensor of its own seed."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def ints(values: list[int]) -> torch.Tensor:
    """(len,) int32."""
    return torch.tensor(values, dtype=torch.int32)


def slab(slots: int, tokens: int, kv_heads: int, dim: int, dtype: torch.dtype, *, layers: int = 0) -> torch.Tensor:
    """(2, S, C, G, D) zeros: k and v; with `layers`, the middle layer of a mega slab (token stride L * G * D)."""
    if not layers:
        return torch.zeros(2, slots, tokens, kv_heads, dim, dtype=dtype)
    return torch.zeros(2, slots, tokens, layers, kv_heads, dim, dtype=dtype)[:, :, :, layers // 2]


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of sequence `seq` from position `start`; the sequence lives in slot `slot`."""

    seq: int
    slot: int
    start: int
    length: int


def ragged(chunks: list[Chunk]) -> dict[str, torch.Tensor]:
    """The five int32 tensors that describe a step."""
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.length)
    return {
        "positions": ints([c.start + i for c in chunks for i in range(c.length)]),
        "token_slots": ints([c.slot for c in chunks for _ in range(c.length)]),
        "slots": ints([c.slot for c in chunks]),
        "q_starts": ints(starts),
        "kv_lens": ints([c.start + c.length for c in chunks]),
    }


def angles(positions: int, dim: int) -> torch.Tensor:
    """cos_sin (P, 2, D/2) fp32 of base 10000."""
    inverse = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    phase = torch.arange(positions)[:, None] * inverse[None]
    return torch.stack((phase.cos(), phase.sin()), dim=1).contiguous()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes and equal bytes."""
    return a.shape == b.shape and bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
