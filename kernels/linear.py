"""Matrix products from weights packed once: y = x @ weight.T + bias.

It knows nothing of layers. A packed weight is cut into panels of 32 output columns, k-major, so that one product
streams it from memory exactly once at any number of rows. An output element is one chain of multiply-accumulates
over k in ascending order, so its bits do not depend on the number of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from tessera_kernels import native
from tessera_kernels.checks import require, require_rows
from tessera_kernels.embed import embed
from tessera_kernels.silu_mul import silu_mul_reference

if TYPE_CHECKING:
    from tessera_kernels import _cpu

PANEL_COLUMNS: Final = 32
_STORE, _FLOAT, _RESIDUAL, _SILU_MUL = range(4)


class PackedLinear:
    """A weight [N, K] (and bias [N]) packed for this CPU, bf16 or fp32. The original may be freed.

    With `gate_up=True` the weight is [gate; up] (2F rows) and only `silu_mul` may be called.
    Raises ValueError for a wrong shape or dtype.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gate_up: bool = False) -> None:
        require(weight.dim() == 2 and weight.stride(1) == 1, "weight is %s; want (N, K) with contiguous rows",
                tuple(weight.shape))  # fmt: skip
        self.dtype = weight.dtype
        self.out_features, self.in_features = (int(size) for size in weight.shape)
        self.gate_up = gate_up
        if gate_up:
            require(self.out_features % 2 == 0, "a gate_up weight has %d rows; want an even number",
                    self.out_features)  # fmt: skip
        if bias is not None:
            require(tuple(bias.shape) == (self.out_features,), "bias is %s; want (%d,)", tuple(bias.shape),
                    self.out_features)  # fmt: skip
        # two bf16 make one word, so an odd K stays with torch
        self._ops: _cpu.Ops | None = native.OPS.get(self.dtype) if self._packs() else None
        self.weight = weight if self._ops is None else None
        self.bias = bias if self._ops is None else None
        self.panels = torch.empty(0, dtype=torch.uint8)
        self.panel_bias: torch.Tensor | None = None
        if self._ops is not None:
            self.panels = self._pack(self._ops, weight)
            self.panel_bias = None if bias is None else self._pack_bias(bias)
        self._panels_ptr = self.panels.data_ptr()
        self._bias_ptr = 0 if self.panel_bias is None else self.panel_bias.data_ptr()

    def _packs(self) -> bool:
        return self.dtype is torch.float32 or self.in_features % 2 == 0

    @property
    def native(self) -> bool:
        """Whether products run on the C++ kernels."""
        return self._ops is not None

    def _panel_count(self) -> int:
        return -(-self.out_features // PANEL_COLUMNS)

    def _pack(self, ops: _cpu.Ops, weight: torch.Tensor) -> torch.Tensor:
        row_bytes = self.in_features * weight.element_size()
        panels = torch.empty(self._panel_count() * PANEL_COLUMNS * row_bytes, dtype=torch.uint8)
        ops.pack(weight.data_ptr(), weight.stride(0), self.out_features, self.in_features, self.gate_up,
                 panels.data_ptr())  # fmt: skip
        return panels

    def _pack_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """fp32, in panel order, padded with zeros."""
        panels, half = self._panel_count(), PANEL_COLUMNS // 2
        if not self.gate_up:
            return F.pad(bias.float(), (0, panels * PANEL_COLUMNS - self.out_features)).contiguous()
        gate_up = F.pad(bias.float().view(2, -1), (0, panels * half - self.out_features // 2))  # (2, panels * 16)
        return gate_up.view(2, panels, half).transpose(0, 1).contiguous()

    def _run(self, x: torch.Tensor, epilogue: int, out: torch.Tensor) -> torch.Tensor:
        ops = self._ops
        assert ops is not None
        shape = x.shape
        if len(shape) != 2 or shape[1] != self.in_features or x.dtype is not self.dtype or x.stride(1) != 1:
            raise ValueError(
                f"x is {tuple(shape)} {x.dtype} with strides {x.stride()}; "
                f"want (M, {self.in_features}) {self.dtype} with contiguous rows"
            )
        if shape[0]:
            ops.gemm(x.data_ptr(), x.stride(0), shape[0], self._panels_ptr, self.out_features, self.in_features,
                     self._bias_ptr, epilogue, out.data_ptr(), out.stride(0))  # fmt: skip
        return out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) -> (M, N) in the weight's dtype, rounded once to nearest even."""
        require(not self.gate_up, "this weight is packed as gate and up; call silu_mul")
        if self._ops is None:
            return linear_reference(x, self._plain(), self.bias)
        return self._run(x, _STORE, torch.empty((x.shape[0], self.out_features), dtype=self.dtype))

    def logits(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x (M, K), of which `rows` (R,) int32 or int64 are wanted (all without) -> (R, N) fp32, not rounded."""
        require(not self.gate_up, "this weight is packed as gate and up; call silu_mul")
        if rows is not None:
            x = embed(x, rows)
        if self._ops is None:
            bias = None if self.bias is None else self.bias.float()
            return linear_reference(x.float(), self._plain().float(), bias)
        return self._run(x, _FLOAT, torch.empty((x.shape[0], self.out_features), dtype=torch.float32))

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual (M, N) += product of x (M, K), in place; the product is rounded first, as if stored."""
        require(not self.gate_up, "this weight is packed as gate and up; call silu_mul")
        require_rows("residual", residual, self.out_features, self.dtype)
        require(residual.shape[0] == x.shape[0], "residual has %d rows and x %d; want as many", residual.shape[0],
                x.shape[0])  # fmt: skip
        if self._ops is None:
            return residual.add_(linear_reference(x, self._plain(), self.bias))
        return self._run(x, _RESIDUAL, residual)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) -> silu(gate) * up, (M, F): bitwise `silu_mul(PackedLinear([gate; up])(x))` in one pass."""
        require(self.gate_up, "this weight is not packed as gate and up; pass gate_up=True")
        if self._ops is None:
            return silu_mul_reference(linear_reference(x, self._plain(), self.bias))
        return self._run(x, _SILU_MUL, torch.empty((x.shape[0], self.out_features // 2), dtype=self.dtype))

    def _plain(self) -> torch.Tensor:
        assert self.weight is not None
        return self.weight


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T + bias, by torch in x's dtype."""
    return F.linear(x, weight, bias)
