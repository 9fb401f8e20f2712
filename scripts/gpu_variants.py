"""The settings that scripts.gpu_kernels tries, and the products that it tries them on.

What cannot fit a multiprocessor's shared memory is not listed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tessera_kernels.triton_attention_decode import DecodeConfig
from tessera_kernels.triton_attention_prefill import PrefillConfig
from tessera_kernels.triton_gemm import GemmConfig
from tessera_kernels.triton_gemv import GemvConfig

if TYPE_CHECKING:
    from scripts.gpu_trial import Session

SHARED_BYTES = 227 << 10
HEADS, KV_HEADS, DIM, WIDTH, FFN, VOCAB = 32, 8, 128, 4096, 14336, 128256  # of Llama-3-8B
LAYERS = 8  # of a slab: enough that none stays in the cache

# keys, rows, warps, stages, programs per multiprocessor
DECODE = [
    DecodeConfig(*setting)
    for setting in [
        (64, 16, 4, 3, 2), (64, 16, 4, 2, 4), (32, 16, 4, 4, 3), (32, 16, 4, 3, 4), (32, 16, 4, 5, 2),
        (64, 16, 4, 5, 1), (128, 16, 8, 2, 2), (32, 16, 2, 3, 4), (64, 16, 2, 3, 2), (64, 16, 8, 3, 2),
        (32, 16, 2, 4, 3), (32, 16, 2, 5, 2), (64, 16, 4, 4, 1),
    ]
]  # fmt: skip

# rows, keys, warps, stages, bulk
PREFILL = [
    PrefillConfig(*setting)
    for setting in [
        (128, 64, 8, 2, True), (128, 128, 8, 2, True), (64, 64, 4, 2, True), (128, 64, 8, 3, True),
        (64, 128, 4, 2, True), (64, 64, 4, 3, True), (128, 64, 8, 3, False), (64, 64, 4, 2, False),
        (128, 64, 4, 2, True),
    ]
]  # fmt: skip

# rows, turn, warps
GEMV = [
    GemvConfig(*setting)
    for setting in [
        (8, 1024, 4), (4, 1024, 4), (4, 2048, 4), (2, 2048, 4), (16, 1024, 4), (8, 2048, 8), (4, 2048, 8),
        (2, 4096, 8), (8, 512, 2), (4, 512, 2), (8, 256, 1),
    ]
]  # fmt: skip


def gemm(rows: int, gated: bool, *, head: bool = False) -> list[GemmConfig]:
    """Settings for `rows` rows of x. m, n, k, parts, warps, stages, turned."""
    found: list[tuple[int, int, int, int, int, int, bool]] = []
    m = max(16, 1 << (rows - 1).bit_length())
    if gated:
        if m <= 64:
            found += [(m, 64, 128, 1, 4, 3, True), (m, 64, 64, 1, 4, 6, True), (m, 64, 128, 1, 4, 4, True),
                      (m, 128, 64, 1, 8, 4, True), (m, 64, 64, 1, 4, 4, True)]  # fmt: skip
            if m == 16:
                found += [(16, 32, 128, 1, 4, 4, False), (16, 16, 256, 1, 4, 4, False), (16, 64, 128, 1, 4, 4, False)]
            else:
                found += [(m, 64, 64, 1, 4, 5, False), (m, 32, 128, 1, 4, 3, False)]
        else:
            found += [(128, 64, 64, 1, 4, 4, False), (128, 64, 64, 1, 8, 4, False), (128, 128, 64, 1, 8, 4, False),
                      (128, 128, 64, 1, 8, 3, True), (128, 64, 128, 1, 8, 3, False), (64, 128, 64, 1, 8, 4, True)]
            if m == 256:
                found += [(256, 64, 64, 1, 8, 4, False), (256, 32, 64, 1, 8, 4, False), (256, 64, 64, 1, 8, 3, False)]
    else:
        cuts = (1,) if head else (1, 2, 4)
        for parts in cuts:
            if m == 16:
                found += [(16, 64, 128, parts, 4, 6, True), (16, 64, 256, parts, 4, 4, True),
                          (16, 128, 128, parts, 4, 4, True), (16, 32, 256, parts, 4, 4, False)]  # fmt: skip
            elif m <= 64:
                found += [(m, 64, 128, parts, 4, 4, True), (m, 128, 128, parts, 8, 4, True),
                          (m, 64, 64, parts, 4, 6, False), (m, 128, 64, parts, 4, 5, True)]  # fmt: skip
            else:
                found += [(128, 128, 64, parts, 8, 4, False), (128, 64, 64, parts, 4, 6, False),
                          (128, 256, 64, parts, 8, 4, False), (128, 128, 64, parts, 4, 4, False)]  # fmt: skip
                if m == 256:
                    found += [(256, 128, 64, parts, 8, 4, False), (256, 64, 64, parts, 8, 4, False)]
        if m >= 128 and not head:
            found += [(128, 256, 64, 5, 8, 4, False), (128, 256, 64, 8, 8, 4, False)]
    return [
        GemmConfig(*setting)
        for setting in dict.fromkeys(found)
        if (setting[0] + setting[1] * (2 if gated else 1)) * setting[2] * 2 * setting[5] < SHARED_BYTES - 1024
    ]


# name -> (rows that come out, width, gated, one-row options)
PRODUCTS: dict[str, tuple[int, int, bool]] = {
    "qkv": (6144, WIDTH, False), "o": (WIDTH, WIDTH, False), "gate_up": (FFN, WIDTH, True),
    "down": (WIDTH, FFN, False), "head": (VOCAB, WIDTH, False),
}  # fmt: skip


def weights_of(s: Session, name: str) -> list[torch.Tensor]:
    """Enough copies of a weight that none stays in the cache."""
    rows, width, gated = PRODUCTS[name]
    total = rows * (2 if gated else 1)
    copies = max(2, min(8, math.ceil((240 << 20) / (total * width * 2)) + 1))
    return [s.normal(total, width, scale=width**-0.5) for _ in range(copies)]
