"""y = W x for one row on a GPU: the weights stream past once, as near to the memory's speed as loads can be.

Optionally the row is RMS-normalised on its way in, SiLU(gate) * up is taken, and the result is added onto a residual.
It knows nothing of layers. One row leaves a matrix unit idle, so products are plain multiply-adds in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tessera_kernels.checks import require
from tessera_kernels.triton_support import early, gdc_launch, gdc_wait, require_float, settings_for


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """Weight rows a program, weights of a row a turn, warps."""

    rows: int = 8
    turn: int = 1024
    warps: int = 4


@triton.jit
def _turn(w_tile, x, norm, k, ss, acc, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          NORM: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """One turn's contribution to acc (BLOCK_N, BLOCK_K / VECTOR) and to the sum of squares."""
    x_tile = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        ss += x_tile * x_tile
        x_tile *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    product = w_tile.to(tl.float32) * x_tile[None, :]
    # a thread's own VECTOR neighbours are added at once: an eighth of the registers
    acc += tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // VECTOR, VECTOR)), 2)
    return ss, acc


@triton.jit
def _gemv_kernel(
    x, norm, w, bias, y, n_rows, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows past the end read the last row again; only the store is masked
    row = w + tl.minimum(n, n_rows - 1).to(tl.int64)[:, None] * K
    w_tile = tl.load(row + k[None, :], mask=(k < K)[None, :], other=0.0)  # weights never change: before the wait
    if GATED:
        row_up = row + n_rows.to(tl.int64) * K
        u_tile = tl.load(row_up + k[None, :], mask=(k < K)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    ss = tl.zeros((BLOCK_K,), tl.float32)
    none = tl.zeros((BLOCK_K,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for start in range(0, K, BLOCK_K):
        # the next turn's weights are asked for before this turn's are used
        ahead = start + BLOCK_K + k
        w_next = tl.load(row + ahead[None, :], mask=(ahead < K)[None, :], other=0.0)
        if GATED:
            u_next = tl.load(row_up + ahead[None, :], mask=(ahead < K)[None, :], other=0.0)
        ss, acc = _turn(w_tile, x, norm, start + k, ss, acc, K, BLOCK_N, BLOCK_K, NORM, VECTOR)
        if GATED:
            none, acc_up = _turn(u_tile, x, norm, start + k, none, acc_up, K, BLOCK_N, BLOCK_K, NORM, VECTOR)
            u_tile = u_next
        w_tile = w_next
    value = tl.sum(acc, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(ss, 0) / K + eps)
        value *= scale
    here = n < n_rows
    if BIAS:
        value += tl.load(bias + n, mask=here, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, 1) * scale
        if BIAS:
            up += tl.load(bias + n_rows + n, mask=here, other=0.0).to(tl.float32)
        gate = value.to(w.dtype.element_ty).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(w.dtype.element_ty).to(tl.float32)
        value = silu * up.to(w.dtype.element_ty).to(tl.float32)
    if ADD:
        value = value.to(y.dtype.element_ty).to(tl.float32) + tl.load(y + n, mask=here, other=0.0).to(tl.float32)
    tl.store(y + n, value.to(y.dtype.element_ty), mask=here)


def measured_config(x: torch.Tensor, rows: int, width: int, gated: bool) -> GemvConfig:
    """The fastest measured on this device for this weight, else one that is good on any."""
    found: dict[str, Any] | None = settings_for(x, "gemv").get(f"{rows}x{width}{'g' if gated else ''}")
    if found and x.dtype is not torch.float32:
        return GemvConfig(**found)
    return GemvConfig(rows=4 if gated else 8, turn=1024 if width >= 1024 else 256, warps=4 if width >= 1024 else 1)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    float_out: bool = False,
    config: GemvConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x (1, K) -> (1, N): W x + bias of weight (N, K), both contiguous.

    norm (K,): x is first divided by its rms (eps as in rmsnorm) and multiplied by it, in float32. gated: weight is
    [gate; up], (2F, K), and silu(gate) * up, (1, F), comes out. add_to (1, N): the product is rounded, added to it in
    place, and it is returned. float_out: float32 comes out, not rounded. Raises ValueError for a wrong shape, dtype
    or stride.
    """
    require_float("weight", weight)
    require(weight.dim() == 2 and weight.is_contiguous(), "weight is %s with strides %s; want (N, K) contiguous",
            tuple(weight.shape), weight.stride())  # fmt: skip
    total, width = weight.shape
    require(x.shape == (1, width) and x.dtype is weight.dtype and x.stride(1) == 1,
            "x is %s %s; want (1, %d) %s", tuple(x.shape), x.dtype, width, weight.dtype)  # fmt: skip
    require(not gated or total % 2 == 0, "weight has %d rows; gate and up want an even number", total)
    rows = total // 2 if gated else total
    require(add_to is None or (add_to.shape == (1, rows) and add_to.stride(1) == 1 and not float_out),
            "add_to wants (1, %d) and float_out=False", rows)  # fmt: skip
    config = config or measured_config(x, rows, width, gated)
    y = add_to
    if y is None:
        y = torch.empty((1, rows), dtype=torch.float32 if float_out else x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(rows, config.rows),)](
        x, norm if norm is not None else x, weight, bias if bias is not None else x, y, rows, eps, K=width,
        BLOCK_N=config.rows, BLOCK_K=config.turn, VECTOR=16 // weight.element_size(), NORM=norm is not None,
        GATED=gated, ADD=add_to is not None, BIAS=bias is not None, num_warps=config.warps, **early(pdl),
    )  # fmt: skip
    return y


def gemv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> torch.Tensor:
    """The same by torch, in x's dtype throughout (pass float64 for a judge)."""
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    y = F.linear(x, weight, bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y
