"""One Llama-shaped decoder layer in one call: the other files' kernels as phases of one parallel region.

It knows the order of operations and nothing of configurations. Bitwise equal to calling the operations one by one
(`run_steps`), which stays the judge; it saves their launches and thread wake-ups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tessera_kernels import native
from tessera_kernels.attention_slots import attention, native_head_dim
from tessera_kernels.checks import kv_view, require, require_ints, require_rows
from tessera_kernels.linear import PackedLinear
from tessera_kernels.rmsnorm import rmsnorm
from tessera_kernels.rope_store import rope_store


@dataclass(frozen=True, slots=True)
class Ragged:
    """The step's batch: positions, token_slots (N,); slots, kv_lens (B,); q_starts (B + 1,); all int32."""

    positions: torch.Tensor
    token_slots: torch.Tensor
    slots: torch.Tensor
    q_starts: torch.Tensor
    kv_lens: torch.Tensor

    def __post_init__(self) -> None:
        tokens, sequences = self.positions.shape[0], self.slots.shape[0]
        require_ints("positions", self.positions, tokens)
        require_ints("token_slots", self.token_slots, tokens)
        require_ints("slots", self.slots, sequences)
        require_ints("q_starts", self.q_starts, sequences + 1)
        require_ints("kv_lens", self.kv_lens, sequences)


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """Packed weights of one layer. qkv (H + 2G) * D x C, attn_out C x H * D, gate_up 2F x C packed with gate_up=True,
    down C x F; norms (C,)."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    attn_out: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear


class DecoderLayer:
    """A layer bound to its weights, its angles cos_sin (P, 2, D/2) and its k_view, v_view (S, C, G, D).

    `layer(residual, batch)` updates residual (N, C) in place. Raises ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        weights: LayerWeights,
        cos_sin: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        heads: int,
        *,
        eps: float,
        scale: float,
        window: int = 0,
        interleaved: bool = False,
    ) -> None:
        self.weights, self.cos_sin, self.k_view, self.v_view = weights, cos_sin, k_view, v_view
        self.heads, self.eps, self.scale, self.window, self.interleaved = heads, eps, scale, window, interleaved
        self.dtype, self.width = weights.qkv.dtype, weights.qkv.in_features
        self._check()
        products = (weights.qkv, weights.attn_out, weights.gate_up, weights.down)
        self.native = all(product.native for product in products) and native_head_dim(k_view.shape[3])
        if self.native:
            self._ops = native.OPS[self.dtype]
            self._layer = self._bind(products)

    def _check(self) -> None:
        w, (kv_heads, dim) = self.weights, self.k_view.shape[2:]
        ffn = w.down.in_features
        wanted = {
            "qkv": (w.qkv, (self.heads + 2 * kv_heads) * dim, self.width),
            "attn_out": (w.attn_out, self.width, self.heads * dim),
            "gate_up": (w.gate_up, 2 * ffn, self.width),
            "down": (w.down, self.width, ffn),
        }
        for name, (linear, rows, columns) in wanted.items():
            require((linear.out_features, linear.in_features) == (rows, columns) and linear.dtype is self.dtype,
                    "%s is (%d, %d) %s; want (%d, %d) %s", name, linear.out_features, linear.in_features, linear.dtype,
                    rows, columns, self.dtype)  # fmt: skip
        require(w.gate_up.gate_up, "gate_up must be packed with gate_up=True")
        require(self.heads % kv_heads == 0, "heads=%d is not a multiple of %d kv heads", self.heads, kv_heads)
        for name, norm in (("input_norm", w.input_norm), ("post_norm", w.post_norm)):
            require(tuple(norm.shape) == (self.width,) and norm.dtype is self.dtype and norm.is_contiguous(),
                    "%s is %s %s; want (%d,) %s", name, tuple(norm.shape), norm.dtype, self.width,
                    self.dtype)  # fmt: skip
        require(self.cos_sin.shape[1:] == (2, dim // 2) and self.cos_sin.dtype is torch.float32
                and self.cos_sin.is_contiguous(), "cos_sin is %s %s; want (P, 2, %d) torch.float32 contiguous",
                tuple(self.cos_sin.shape), self.cos_sin.dtype, dim // 2)  # fmt: skip

    def _bind(self, products: tuple[PackedLinear, ...]) -> object:
        w, (kv_heads, dim) = self.weights, self.k_view.shape[2:]
        layer = native.extension().Layer(
            w.input_norm.data_ptr(), w.post_norm.data_ptr(), self.cos_sin.data_ptr(),
            kv_view(self.k_view, self.v_view, self.dtype), self.heads, kv_heads, dim, self.width, w.down.in_features,
            self.eps, self.scale, self.window, self.interleaved, self.cos_sin.shape[0],
        )  # fmt: skip
        addresses: list[int] = []
        for product in products:
            bias = product.panel_bias
            addresses += [product.panels.data_ptr(), 0 if bias is None else bias.data_ptr()]
        layer.set_products(*addresses)
        return layer

    def __call__(self, residual: torch.Tensor, batch: Ragged) -> torch.Tensor:
        """residual (N, C) += attention(norm(residual)), then += mlp(norm(residual)); returns residual."""
        if not self.native:
            return self.run_steps(residual, batch)
        require_rows("residual", residual, self.width, self.dtype)
        tokens = batch.positions.shape[0]
        require(residual.shape[0] == tokens, "residual has %d rows for %d tokens", residual.shape[0], tokens)
        self._ops.layer(
            self._layer, residual.data_ptr(), tokens, batch.positions.data_ptr(), batch.token_slots.data_ptr(),
            batch.slots.data_ptr(), batch.q_starts.data_ptr(), batch.kv_lens.data_ptr(), batch.slots.shape[0],
        )  # type: ignore[arg-type]  # fmt: skip
        return residual

    def run_steps(self, residual: torch.Tensor, batch: Ragged) -> torch.Tensor:
        """The same, one operation at a time."""
        w = self.weights
        qkv = w.qkv(rmsnorm(residual, w.input_norm, self.eps))
        q = rope_store(qkv, self.cos_sin, batch.positions, batch.token_slots, self.k_view, self.v_view, self.heads,
                       self.interleaved)  # fmt: skip
        attended = attention(q, self.k_view, self.v_view, batch.slots, batch.q_starts, batch.kv_lens, self.scale,
                             self.window)  # fmt: skip
        w.attn_out.add_to(attended, residual)
        act = w.gate_up.silu_mul(rmsnorm(residual, w.post_norm, self.eps))
        return w.down.add_to(act, residual)
