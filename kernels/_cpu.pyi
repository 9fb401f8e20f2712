"""Types of the C++ extension. Addresses are `tensor.data_ptr()`; strides are in elements."""

class KvView:
    def __init__(
        self,
        k: int,
        v: int,
        slot_stride: int,
        token_stride: int,
        head_stride: int,
        slots: int,
        max_tokens: int,
        /,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        input_norm: int,
        post_norm: int,
        cos_sin: int,
        kv: KvView,
        heads: int,
        kv_heads: int,
        head_dim: int,
        width: int,
        ffn: int,
        eps: float,
        scale: float,
        window: int,
        interleaved: bool,
        angles: int,
        /,
    ) -> None: ...
    def set_products(
        self,
        qkv: int,
        qkv_bias: int,
        attn_out: int,
        attn_out_bias: int,
        gate_up: int,
        gate_up_bias: int,
        down: int,
        down_bias: int,
        /,
    ) -> None: ...

class Ops:
    def __init__(self, element_bytes: int, narrow: bool, /) -> None: ...
    @property
    def isa(self) -> str: ...
    def pack(self, weight: int, row_stride: int, n: int, k: int, gate_up: bool, panels: int, /) -> None: ...
    def gemm(
        self,
        x: int,
        x_stride: int,
        rows: int,
        panels: int,
        columns: int,
        depth: int,
        bias: int,
        epilogue: int,
        out: int,
        out_stride: int,
        /,
    ) -> None: ...
    def rmsnorm(
        self, x: int, residual: int, weight: int, out: int, rows: int, width: int, eps: float, /
    ) -> None: ...
    def rope_store(
        self,
        qkv: int,
        cos_sin: int,
        positions: int,
        slots: int,
        q: int,
        kv: KvView,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        interleaved: bool,
        angles: int,
        /,
    ) -> None: ...
    def encode_store(
        self,
        qkv: int,
        cos_sin: int,
        positions: int,
        slots: int,
        tables: int,
        q: int,
        kv: KvView,
        q_map: int,
        k_map: int,
        v_map: int,
        matrices: bool,
        rows: int,
        map_stride: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        interleaved: bool,
        angles: int,
        wide: bool,
        /,
    ) -> None: ...
    def decode_heads(
        self,
        x: int,
        out: int,
        tables: int,
        out_map: int,
        matrices: bool,
        rows: int,
        map_stride: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        /,
    ) -> None: ...
    def encode_job(
        self,
        qkv: int,
        out: int,
        cos_sin: int,
        positions: int,
        tables: int,
        own: int,
        q_map: int,
        k_map: int,
        v_map: int,
        matrices: bool,
        rows: int,
        map_stride: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        angles: int,
        wide: bool,
        once: bool,
        /,
    ) -> int: ...
    def decode_job(
        self,
        x: int,
        out: int,
        tables: int,
        out_map: int,
        matrices: bool,
        rows: int,
        map_stride: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        once: bool,
        /,
    ) -> int: ...
    def draws(
        self,
        key: int,
        info: int,
        info_bytes: int,
        place_at: int,
        labels: int,
        rows: int,
        count: int,
        orders: int,
        inverses: int,
        words: int,
        signs: int,
        /,
    ) -> None: ...
    def build_maps(self, drawn: int, out: int, labels: int, dim: int, stretched: bool, /) -> None: ...
    def attention(
        self,
        q: int,
        out: int,
        kv: KvView,
        slots: int,
        q_starts: int,
        kv_lens: int,
        sequences: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        tokens: int,
        /,
    ) -> None: ...
    def silu_mul(self, x: int, out: int, rows: int, width: int, /) -> None: ...
    def layer(
        self,
        layer: Layer,
        residual: int,
        tokens: int,
        positions: int,
        token_slots: int,
        slots: int,
        q_starts: int,
        kv_lens: int,
        sequences: int,
        /,
    ) -> None: ...

def has_bf16() -> bool: ...
def has_f32() -> bool: ...
def set_threads(threads: int, /) -> None: ...
def threads() -> int: ...
def embed(
    table: int, ids: int, out: int, rows: int, row_bytes: int, wide_ids: bool, vocab: int, /
) -> None: ...
def argmax(logits: int, stride: int, out: int, rows: int, width: int, /) -> None: ...
class Bell:
    def __init__(self, word: int, threads: int, /) -> None: ...
    def add(self, job: int, /) -> int: ...
    def stop(self) -> None: ...

def copy_job(to: int, source: int, nbytes: int, /) -> int: ...
def job_function() -> int: ...
def run_job(job: int, /) -> None: ...
