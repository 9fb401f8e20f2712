"""The GPU's kernel set: our Triton kernels where they were measured faster, the vendor's products elsewhere.

One row streams weights through a matrix-vector kernel; a few to a few hundred rows take the tile setting measured on
this device, if any beat the library; the rest is the library. Every operation can stand in a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.attention.base import placed
from engine.parts.kernel_set import Layer, kernel_sets
from engine.parts.layer import Attention, PreNormLayer
from engine.runner.batch import Batch
from engine.scx.attention import ScxAttention


class CudaLinear:
    """x W^T + b. Rows decide the kernel: 1, as many as the table of this device knows, more."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, float_out: bool = False,
                 pdl: bool = False) -> None:  # fmt: skip
        from tessera_kernels import cublaslt, triton_gemm, triton_gemv

        self._gemm, self._gemv, self._library = triton_gemm, triton_gemv, cublaslt
        self.weight, self.bias, self.float_out, self.pdl = weight.contiguous(), bias, float_out, pdl
        self._bulk = triton_gemm.fits(self.weight)

    def parts(self, x: torch.Tensor) -> torch.Tensor | None:
        """(P, N, out) float32 whose sum is the product, where it is fastest cut along K; None elsewhere."""
        config = self._gemm.measured_config(x, self.weight.shape[0], False) if self._bulk else None
        if config is None or config.parts == 1 or x.shape[0] == 1:
            return None
        return self._gemm.linear_parts(x, self.weight, self.bias, config=config, pdl=self.pdl)

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, in). See Linear."""
        if x.shape[0] == 1:
            return self._gemv.gemv(
                x, self.weight, self.bias, add_to=add_to, float_out=self.float_out, pdl=self.pdl
            )
        config = self._gemm.measured_config(x, self.weight.shape[0], False) if self._bulk else None
        if config is not None:
            return self._gemm.gemm(
                x, self.weight, self.bias, config=config, add_to=add_to, float_out=self.float_out, pdl=self.pdl
            )
        if self.bias is None:
            y = self._library.measured_matmul(x, self.weight, add_to=add_to, float_out=self.float_out)
            if y is not None:
                return y
        if add_to is not None and self.bias is None:
            return add_to.addmm_(x, self.weight.t())
        if add_to is not None:
            return add_to.add_(F.linear(x, self.weight, self.bias))
        if self.float_out and x.dtype is not torch.float32:
            # rounding logits to 16 bits would make ties that greedy decoding then breaks by index
            wide = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
            return wide if self.bias is None else wide.add_(self.bias)
        return F.linear(x, self.weight, self.bias)


class CudaGatedLinear:
    """silu(gate) * up over weights that hold gate above up."""

    def __init__(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, ...], *, pdl: bool = False
    ) -> None:
        from tessera_kernels.triton_silu_mul import silu_mul

        self._silu_mul = silu_mul
        self.both = CudaLinear(torch.cat([gate, up]), torch.cat(biases) if biases else None, pdl=pdl)
        self._half = gate.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C). Returns (N, F)."""
        both = self.both
        if x.shape[0] == 1:
            return both._gemv.gemv(x, both.weight, both.bias, gated=True, pdl=both.pdl)
        config = both._gemm.measured_config(x, self._half, True) if both._bulk else None
        if config is not None:
            return both._gemm.gemm(x, both.weight, both.bias, config=config, gated=True, pdl=both.pdl)
        return self._silu_mul(both(x), both.pdl)


class PlainPath:
    """What stands between the projections of a plain layer; ScxAttention is that of one encoded in the stream."""

    def __init__(self, attention: Attention, pdl: bool) -> None:
        from tessera_kernels.triton_rope_store import rope_store

        self._attention, self._rope_store, self._pdl = attention, rope_store, pdl

    def encode(self, projected: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Projections (N, (H + 2G) * D), or their parts -> queries (N, H, D); keys and values are stored."""
        a = self._attention
        slots, rows = batch.places
        return self._rope_store(
            projected, a.rope, batch.positions, slots, a.k, a.v, a.heads, rows=rows, out=out, pdl=self._pdl
        )

    def attend(self, q: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H, D) -> (N, H * D), in `out` where given."""
        a = self._attention
        return a.backend.attend(q, a.k, a.v, batch, a.window, out)

    def decode(self, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Nothing was encoded."""
        return attended


class WaitingPath:
    """The same of an encoded layer whose secure side the host waits for: all that needs its answers, and they
    themselves, stand where attention stands. So no graph holds them, and they are asked for real rows alone."""

    def __init__(self, attention: ScxAttention, projected: torch.dtype) -> None:
        """projected: the type in which the secure side takes projections."""
        self._attention, self._projected = attention, projected

    def encode(self, projected: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Projections, or their parts -> projections (N, (H + 2G) * D), in `out` where given; nothing is stored yet."""
        whole = projected if projected.dim() == 2 else projected.sum(0)
        return whole.to(self._projected) if out is None else out.copy_(whole)

    def attend(self, projected: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Projections (N, (H + 2G) * D) -> (N, H * D), decoded, in `out` where given; keys and values are stored."""
        a = self._attention
        return placed(a.decode(a.attend(a.encode(projected, batch), batch), batch), out)

    def decode(self, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Decoded already."""
        return attended


class CudaLayer:
    """A pre-norm layer with fewer launches: norms inside one-row products, parts of cut products summed by the
    operation that reads them. Sums run in another order than step by step, so bits may differ within rounding."""

    def __init__(self, layer: PreNormLayer) -> None:
        from tessera_kernels.triton_gemv import gemv
        from tessera_kernels.triton_rmsnorm import rmsnorm

        self._gemv, self._rmsnorm = gemv, rmsnorm
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, Attention | ScxAttention)
        assert isinstance(attention.qkv, CudaLinear) and isinstance(attention.out, CudaLinear)
        assert isinstance(mlp.gate_up, CudaGatedLinear) and isinstance(mlp.down, CudaLinear)
        self._qkv, self._out, self._gate_up, self._down = attention.qkv, attention.out, mlp.gate_up, mlp.down
        self._norms = (layer.input_norm, layer.post_norm)
        dim, dtype = attention.k.shape[-1], self._qkv.weight.dtype
        self.leaves: tuple[tuple[int, ...], torch.dtype] = ((self._out.weight.shape[1] // dim, dim), dtype)
        self._path: PlainPath | ScxAttention | WaitingPath
        if isinstance(attention, Attention):
            self._path = PlainPath(attention, self._qkv.pdl)
        elif attention.scx.secure.in_stream:
            self._path = attention
        else:
            self.leaves = (self._qkv.weight.shape[:1], torch.float32 if self._qkv.float_out else dtype)
            self._path = WaitingPath(attention, self.leaves[1])
        self.selective = isinstance(self._path, PlainPath)  # an encoded row is answered for, whoever wants it

    def before(self, hidden: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """What stands before attention: hidden (N, C) -> queries (N, H, D), or what else `leaves` says, in `out` where
        given."""
        norm, pdl = self._norms[0], self._qkv.pdl
        normed = self._rmsnorm(hidden, norm.weight, norm.eps, pdl=pdl)
        parts = self._qkv.parts(normed)
        return self._path.encode(self._qkv(normed) if parts is None else parts, batch, out)

    def attend(self, q: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Attention alone: what before() gives -> (N, H * D), in `out` where given."""
        return self._path.attend(q, batch, out)

    def after(self, hidden: torch.Tensor, attended: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What stands behind attention, onto hidden (N, C) in place."""
        norm, pdl = self._norms[1], self._qkv.pdl
        attended = self._path.decode(attended, batch)
        parts = self._out.parts(attended)
        if parts is None:
            self._out(attended, add_to=hidden)
            normed = self._rmsnorm(hidden, norm.weight, norm.eps, pdl=pdl)
        else:
            normed = self._rmsnorm(parts, norm.weight, norm.eps, residual=hidden, pdl=pdl)
        return self._down(self._gate_up(normed), add_to=hidden)

    def finish(self, q: torch.Tensor, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What stands behind `before` in a model's last layer, for the rows that get logits: (R, C). The others' keys
        and values are stored, and nothing else of them is wanted: in a long prompt that is nearly a whole layer less.
        """
        sampling = batch.sampling() if self.selective else None
        if sampling is None:
            self.after(hidden, self.attend(q, batch), batch)
            return hidden.index_select(0, batch.sample_rows)
        kept = hidden.index_select(0, batch.sample_rows)
        if kept.shape[0]:
            self.after(kept, self.attend(q.index_select(0, batch.sample_rows), sampling), sampling)
        return kept

    def last(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See Layer."""
        if batch.spans:
            return self.finish(self.before(hidden, batch), hidden, batch)
        return self(hidden, batch).index_select(0, batch.sample_rows)

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """hidden: (N, C), updated in place. See Layer."""
        if hidden.shape[0] == 1:
            return self._one_row(hidden, batch)
        return self.after(hidden, self.attend(self.before(hidden, batch), batch), batch)

    def _one_row(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The same for one token: both norms are taken inside the products behind them."""
        (before, after), pdl = self._norms, self._qkv.pdl
        gemv, both = self._gemv, self._gate_up.both
        qkv = gemv(hidden, self._qkv.weight, self._qkv.bias, norm=before.weight, eps=before.eps, pdl=pdl,
                   float_out=self._qkv.float_out)  # fmt: skip
        attended = self.attend(self._path.encode(qkv, batch), batch)
        self._out(self._path.decode(attended, batch), add_to=hidden)
        inner = gemv(hidden, both.weight, both.bias, norm=after.weight, eps=after.eps, gated=True, pdl=pdl)
        return self._down(inner, add_to=hidden)


@kernel_sets.register("cuda")
class CudaKernels:
    """KernelSet over tessera_kernels' Triton files and PyTorch, on a GPU."""

    def __init__(self, *, pdl: bool | None = None) -> None:
        """pdl: kernels may start while the one before ends (programmatic dependent launch); None: where the device
        can."""
        from tessera_kernels import triton_argmax, triton_rmsnorm, triton_rope_store
        from tessera_kernels.triton_support import starts_early

        self._pdl = starts_early() if pdl is None else pdl
        self._triton_argmax = triton_argmax
        self._rmsnorm, self._rope_store = triton_rmsnorm.rmsnorm, triton_rope_store.rope_store
        # a graph captured with a workspace goes on using it, so outgrown ones are kept
        self._argmaxes: list[triton_argmax.RowArgmax] = []

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> CudaLinear:
        """See KernelSet."""
        return CudaLinear(weight, bias, float_out=wide, pdl=self._pdl)

    def gated_linear(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, ...] = ()
    ) -> CudaGatedLinear:
        """See KernelSet."""
        return CudaGatedLinear(gate, up, biases, pdl=self._pdl)

    def head(self, weight: torch.Tensor) -> CudaLinear:
        """See KernelSet."""
        return CudaLinear(weight, None, float_out=True, pdl=self._pdl)

    def embed(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See KernelSet."""
        return F.embedding(tokens, table)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See KernelSet."""
        return self._rmsnorm(x, weight, eps)

    def rope_store(
        self, qkv: torch.Tensor, rope: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """See KernelSet. A token whose slot is -1 stores nothing."""
        slots, rows = batch.places
        return self._rope_store(qkv, rope, batch.positions, slots, k, v, heads, rows=rows)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See KernelSet."""
        rows, vocab = logits.shape
        if not self._argmaxes or self._argmaxes[-1].max_rows < rows or self._argmaxes[-1].vocab < vocab:
            room = max(512, 1 << (rows - 1).bit_length())
            self._argmaxes.append(self._triton_argmax.RowArgmax(room, vocab, logits.device))
        return self._argmaxes[-1](logits)[0]

    def fuse(self, layer: Layer) -> Layer:
        """See KernelSet. Results agree within rounding, not bitwise."""
        if isinstance(layer, PreNormLayer) and isinstance(layer.attention, Attention | ScxAttention):
            return CudaLayer(layer)
        return layer


def missing() -> str | None:
    """Why this kernel set cannot run here, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    try:
        import tessera_kernels.triton_gemm  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error}); kernel set torch runs without it"
    return None
