"""x W^T for a few to a few hundred rows on a GPU, where the weights' bytes and not the arithmetic set the time.

It knows nothing of layers. Tiles arrive through the bulk copy engine (tensor descriptors). A product may be cut along
K so that every multiprocessor has work: the parts stay float32 and whoever reads them next adds them up (rmsnorm and
rope_store do; `sum_parts` is for everyone else).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import require
from tessera_kernels.triton_gemv import gemv_reference
from tessera_kernels.triton_support import (
    early,
    gdc_launch,
    gdc_wait,
    power_of_two,
    precision,
    require_float,
    settings_for,
)

gemm_reference = gemv_reference  # the same function of more rows


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Rows of x, weight rows and K a tile; parts along K; warps; tiles in flight; `turned`: compute W x^T, so that the
    matrix unit's long side lies along the weights (what few rows want)."""

    m: int = 64
    n: int = 64
    k: int = 128
    parts: int = 1
    warps: int = 4
    stages: int = 4
    turned: bool = False


@triton.jit
def _product(x_tile, w_tile, acc, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x w^T, (BLOCK_M, BLOCK_N), or its transpose when TURNED."""
    if TURNED:
        return tl.dot(w_tile, x_tile.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)


# the number of rows changes from step to step and must not choose another binary
@triton.jit(do_not_specialize=["m_rows"])
def _gemm_kernel(
    x_desc, w_desc, w, bias, y, m_rows, n_rows, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    TURNED: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # tiles that share weights are neighbours, so that the weights come from memory once
    tiles_m = tl.cdiv(m_rows, BLOCK_M)
    tile_m, tile_n, part = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    turns = tl.cdiv(K, BLOCK_K)
    first, last = part * turns // PARTS, (part + 1) * turns // PARTS
    if PDL:
        gdc_launch()
        # the weights of the first turns are fetched into the second-level cache while the kernel before ends
        line = tl.arange(0, BLOCK_N)
        at = w + tl.minimum(n0 + line, n_rows - 1).to(tl.int64)[:, None] * K
        column = tl.minimum(first * BLOCK_K + tl.arange(0, AHEAD) * 64, K - 1)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at + column[None, :]],
                                  dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip
        gdc_wait()
    if TURNED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for turn in tl.range(first, last, num_stages=STAGES):
        x_tile = x_desc.load([m0, turn * BLOCK_K])  # (BLOCK_M, BLOCK_K), zeros outside
        w_tile = w_desc.load([n0, turn * BLOCK_K])  # (BLOCK_N, BLOCK_K)
        acc = _product(x_tile, w_tile, acc, TURNED, PRECISION)
        if GATED:
            u_tile = w_desc.load([n_rows + n0, turn * BLOCK_K])
            acc_up = _product(x_tile, u_tile, acc_up, TURNED, PRECISION)
    if TURNED:
        acc = tl.trans(acc)
        if GATED:
            acc_up = tl.trans(acc_up)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    here = (m < m_rows)[:, None] & (n < n_rows)[None, :]
    if BIAS:  # noqa: SIM102 (known when compiling; `part` is not)
        if part == 0:
            acc += tl.load(bias + n, mask=n < n_rows, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            acc_up += tl.load(bias + n_rows + n, mask=n < n_rows, other=0.0).to(tl.float32)[None, :]
        gate = acc.to(w.dtype.element_ty).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(w.dtype.element_ty).to(tl.float32)
        acc = silu * acc_up.to(w.dtype.element_ty).to(tl.float32)
    at_y = y + (part * m_rows + m).to(tl.int64)[:, None] * n_rows + n[None, :]
    if ADD:
        acc = acc.to(y.dtype.element_ty).to(tl.float32) + tl.load(at_y, mask=here, other=0.0).to(tl.float32)
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["count"])
def _sum_parts_kernel(parts, y, count, PARTS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + i, mask=here, other=0.0)
    if ADD:
        total = total.to(y.dtype.element_ty).to(tl.float32) + tl.load(y + i, mask=here, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=here)


def fits(weight: torch.Tensor) -> bool:
    """Whether the bulk copy engine can fetch tiles of this weight: rows of whole 16-byte units, 16-byte aligned."""
    return weight.is_contiguous() and weight.shape[1] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0


def measured_config(x: torch.Tensor, rows: int, gated: bool) -> GemmConfig | None:
    """The setting measured fastest on this device for x (M, K) and this many weight rows; None where nothing beat the
    library."""
    if x.dtype is torch.float32:
        return None
    table: dict[str, Any] = settings_for(x, "gemm").get(f"{rows}x{x.shape[1]}{'g' if gated else ''}", {})
    for top, setting in sorted((int(top), setting) for top, setting in table.items()):
        if x.shape[0] <= top:
            return GemmConfig(**setting) if setting else None
    return None


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, config: GemmConfig,
    *, gated: bool, add: bool, pdl: bool,
) -> None:  # fmt: skip
    require_float("weight", weight)
    require(weight.dim() == 2 and fits(weight), "weight is %s with strides %s; want (N, K) contiguous, rows of whole "
            "16-byte units", tuple(weight.shape), weight.stride())  # fmt: skip
    total, width = weight.shape
    require(x.dim() == 2 and x.shape[1] == width and x.dtype is weight.dtype and x.is_contiguous(),
            "x is %s %s; want (M, %d) %s contiguous", tuple(x.shape), x.dtype, width, weight.dtype)  # fmt: skip
    rows = total // 2 if gated else total
    x_desc = TensorDescriptor(x, list(x.shape), [width, 1], [config.m, config.k])
    w_desc = TensorDescriptor(weight, [total, width], [width, 1], [config.n, config.k])
    grid = (triton.cdiv(x.shape[0], config.m) * triton.cdiv(rows, config.n), config.parts)
    _gemm_kernel[grid](
        x_desc, w_desc, weight, bias if bias is not None else x, y, x.shape[0], rows, width, BLOCK_M=config.m,
        BLOCK_N=config.n, BLOCK_K=config.k, PARTS=config.parts, STAGES=config.stages, TURNED=config.turned,
        GATED=gated, ADD=add, BIAS=bias is not None, PRECISION=precision(x.dtype),
        AHEAD=1 << (config.stages * config.k // 64).bit_length() - 1, num_warps=config.warps, **early(pdl),
    )  # fmt: skip


def linear_parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, config: GemmConfig, pdl: bool = False
) -> torch.Tensor:
    """x (M, K), weight (N, K) -> (P, M, N) float32 whose sum is x W^T + bias; P = config.parts."""
    parts = torch.empty((config.parts, x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    if x.shape[0]:
        _launch(x, weight, bias, parts, config, gated=False, add=False, pdl=pdl)
    return parts


def sum_parts(
    parts: torch.Tensor, dtype: torch.dtype, add_to: torch.Tensor | None = None, pdl: bool = False
) -> torch.Tensor:
    """(P, M, N) float32 -> their sum, (M, N) in dtype; with add_to (M, N) it is rounded and added in place."""
    y = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device) if add_to is None else add_to
    count = y.numel()
    if count:
        _sum_parts_kernel[(triton.cdiv(count, 1024),)](
            parts, y, count, PARTS=parts.shape[0], ADD=add_to is not None, BLOCK=1024, num_warps=4, **early(pdl)
        )
    return y


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: GemmConfig,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    float_out: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """x (M, K) -> x W^T + bias, (M, N), of weight (N, K).

    gated: weight is [gate; up], (2F, K), and silu(gate) * up, (M, F), comes out (config.parts must be 1, as a part of
    a gate has no SiLU). add_to (M, N): the rounded product is added in place. float_out: float32, not rounded.
    Raises ValueError for a wrong shape, dtype or stride.
    """
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    require(not gated or (config.parts == 1 and rows % config.n == 0 and weight.shape[0] % 2 == 0),
            "a gated product wants config.parts=1 and %d a multiple of config.n=%d", rows, config.n)  # fmt: skip
    require(add_to is None or (add_to.shape == (x.shape[0], rows) and add_to.is_contiguous() and not float_out),
            "add_to wants (%d, %d) contiguous and float_out=False", x.shape[0], rows)  # fmt: skip
    dtype = torch.float32 if float_out else x.dtype
    if config.parts > 1:
        return sum_parts(linear_parts(x, weight, bias, config=config, pdl=pdl), dtype, add_to, pdl)
    y = torch.empty((x.shape[0], rows), dtype=dtype, device=x.device) if add_to is None else add_to
    if x.shape[0]:
        _launch(x, weight, bias, y, config, gated=gated, add=add_to is not None, pdl=pdl)
    return y


def default_config(rows: int, dtype: torch.dtype) -> GemmConfig:
    """A setting that works on any device for `rows` rows of x; tests use it, layers prefer the measured or the library.
    """
    if dtype is torch.float32:  # multiplied without matrix units: larger tiles would not fit the registers
        return GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
    return GemmConfig(m=min(128, max(16, power_of_two(rows))), n=64, k=64, warps=4, stages=3, turned=rows <= 32)
