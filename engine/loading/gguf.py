"""A GGUF file becomes an ordinary Hugging Face folder, once: convert().

It knows the `llama` and `qwen2` architectures' names and keys, undoes the row permutation of Llama's q and k, and
writes what the rest of the engine reads from any checkpoint. It does not know caches (resolve.py) and imports no
torch: bfloat16 is rounded here, in numpy, to nearest even. Quantised tensors become bfloat16, F32, F16 and BF16
stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.errors import LoadError
from engine.loading.gguf_file import GgufFile
from engine.loading.gguf_tokenizer import rebuild_tokenizer
from engine.loading.safetensors_header import TORCH_NAMES, write_file
from engine.tokenization.jsonfile import write_object

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ARCHITECTURES: Mapping[str, str] = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_TOP_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NO_WEIGHTS = ("rope_freqs.weight",)  # becomes part of config.json

# What Llama 3.1 and later use; GGUF keeps only the resulting factors, so they are recomputed and compared.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


@dataclass(frozen=True, slots=True)
class ConvertedTensor:
    """A tensor to write: its GGUF name, its Hugging Face name, safetensors dtype, shape, and heads to un-permute
    its rows by (0 = none)."""

    source: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    heads: int


class GgufModel:
    """A GGUF file read as a language model: `config` (config.json's content) and its tensors under their
    Hugging Face names. Raises LoadError for an architecture, key or shape that does not fit."""

    def __init__(self, path: str | Path) -> None:
        self.file = GgufFile(path)
        self.path = self.file.path
        try:
            self.config = self._config()
            self.tensors = self._tensors()
        except BaseException:
            self.file.close()
            raise
        stored: dict[str, int] = {}
        for tensor in self.tensors:
            stored[tensor.dtype] = stored.get(tensor.dtype, 0) + math.prod(tensor.shape)
        self.config["torch_dtype"] = TORCH_NAMES[max(stored, key=lambda dtype: stored[dtype])]

    def close(self) -> None:
        """Unmap the file."""
        self.file.close()

    def values(self, tensor: ConvertedTensor) -> npt.NDArray[np.float32]:
        """The tensor in float32 before any rounding, rows in Hugging Face's order."""
        return unpermute(self.file.dequantised(tensor.source), tensor.heads)

    def stored_bytes(self, tensor: ConvertedTensor) -> bytes:
        """The tensor's bytes in tensor.dtype, rows in Hugging Face's order."""
        if self.file.tensors[tensor.source].type_name in ("F32", "F16", "BF16"):
            return bytes(unpermute(self.file.array(tensor.source), tensor.heads).tobytes())
        return bytes(to_bfloat16(self.values(tensor)).tobytes())

    # ---------------------------------------------------------------- config.json

    def _config(self) -> dict[str, Any]:
        arch = self._meta("general.architecture", str)
        if arch not in ARCHITECTURES:
            raise LoadError(f"{self.path}: GGUF architecture {arch[:80]!r} is not supported; "
                            f"supported: {', '.join(ARCHITECTURES)}")
        self.arch = arch
        if self._meta(f"{arch}.expert_count", int, 0):
            raise LoadError(f"{self.path}: is a mixture of experts, which is not supported")
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise LoadError(f"{self.path}: tensor 'token_embd.weight' is missing or no matrix")
        vocab, hidden = embedding.shape
        heads = self._size("attention.head_count", 1 << 12)
        uneven = hidden % heads and not self._has("attention.key_length")
        if hidden != self._size("embedding_length", 1 << 20) or uneven:
            raise LoadError(f"{self.path}: token_embd.weight is {hidden} wide, which does not fit "
                            f"embedding_length and head_count={heads}")
        head_dim = self._size("attention.key_length", 1 << 10, hidden // heads)
        rotary = self._size("rope.dimension_count", 1 << 10, head_dim)
        if rotary != head_dim:
            raise LoadError(f"{self.path}: {arch}.rope.dimension_count={rotary} differs from head_dim={head_dim}; "
                            "partial rotary positions are not supported")
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[arch]],
            "model_type": arch,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "num_hidden_layers": self._size("block_count", 1 << 10),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads, heads),
            "head_dim": head_dim,
            "intermediate_size": self._size("feed_forward_length", 1 << 20),
            "max_position_embeddings": self._size("context_length", 1 << 27),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
            "vocab_size": vocab,
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "rope_theta": self._number("rope.freq_base", 1.0, 1e12, 10000.0),
        }
        if arch == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.file.tensors
        if (scaling := self._rope_scaling(config)) is not None:
            config["rope_scaling"] = scaling
        for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
            if f"tokenizer.ggml.{key}_token_id" in self.file.metadata:
                config[name] = self._meta(f"tokenizer.ggml.{key}_token_id", int)
        return config

    def _rope_scaling(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Hugging Face's rope_scaling object, from the keys or from Llama 3's factor tensor."""
        if "rope_freqs.weight" in self.file.tensors:
            return self._llama3_scaling(config)
        kind = self._meta(f"{self.arch}.rope.scaling.type", str, "none")
        older = self._number("rope.scale_linear", 0.0, 4096.0, 0.0)  # what files before rope.scaling.* had
        factor = self._number("rope.scaling.factor", 0.0, 4096.0, 0.0) or older
        if (kind == "none" and not older) or factor in (0.0, 1.0):
            return None
        if kind in ("none", "linear"):
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self._size("rope.scaling.original_context_length", 1 << 27,
                                  config["max_position_embeddings"])
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        raise LoadError(f"{self.path}: {self.arch}.rope.scaling.type={kind[:40]!r} is not supported; "
                        "supported: none, linear, yarn, and llama3 through rope_freqs")

    def _llama3_scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The llama3 parameters that give exactly the file's factors (head_dim / 2 of them), or LoadError."""
        import numpy as np

        found = self.file.dequantised("rope_freqs.weight").reshape(-1)
        if found.size != config["head_dim"] // 2:
            raise LoadError(f"{self.path}: rope_freqs.weight has {found.size} factors, "
                            f"wanted {config['head_dim'] // 2}")
        parameters: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": float(found.max()),
            "low_freq_factor": _LLAMA3_LOW,
            "high_freq_factor": _LLAMA3_HIGH,
            "original_max_position_embeddings": self._size("rope.scaling.original_context_length", 1 << 27,
                                                           _LLAMA3_ORIGINAL),
        }
        wanted = llama3_factors(config["rope_theta"], config["head_dim"], parameters)
        if not np.allclose(found, wanted, rtol=1e-4, atol=1e-5):
            raise LoadError(f"{self.path}: rope_freqs.weight is not what llama3 scaling with low_freq_factor=1, "
                            "high_freq_factor=4 gives; use this model's Hugging Face folder")
        return parameters

    # ---------------------------------------------------------------- tensors

    def _tensors(self) -> list[ConvertedTensor]:
        """Every tensor of the file under its new name, in file order, shapes checked against config."""
        wanted = hf_shapes(self.config)
        tensors: list[ConvertedTensor] = []
        for name, stored in self.file.tensors.items():
            if name in _NO_WEIGHTS:
                continue
            renamed = self._hf_name(name)
            if renamed not in wanted:
                raise LoadError(f"{self.path}: tensor {name[:80]!r} is not one a {self.arch} model has")
            if stored.shape != wanted[renamed]:
                raise LoadError(f"{self.path}: tensor {name!r} has shape {stored.shape}, its metadata make it "
                                f"{wanted[renamed]}")
            heads = 0
            if self.arch == "llama" and ".attn_q." in name:
                heads = self.config["num_attention_heads"]
            elif self.arch == "llama" and ".attn_k." in name:
                heads = self.config["num_key_value_heads"]
            if stored.type_name in ("F64", "I8", "I16", "I32", "I64"):
                raise LoadError(f"{self.path}: tensor {name!r} has type {stored.type_name}: no weights have that")
            dtype = stored.type_name if stored.type_name in TORCH_NAMES else "BF16"
            tensors.append(ConvertedTensor(name, renamed, dtype, stored.shape, heads))
        missing = sorted(wanted.keys() - {tensor.name for tensor in tensors})
        if missing:
            raise LoadError(f"{self.path}: tensor {missing[0]!r} (by its Hugging Face name) is missing, and "
                            f"{len(missing) - 1} more")
        return tensors

    def _hf_name(self, name: str) -> str:
        """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; "" when there is no such name."""
        if name in _TOP_NAMES:
            return _TOP_NAMES[name]
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
            return ""
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"

    # ---------------------------------------------------------------- metadata

    def _has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.metadata

    def _meta(self, key: str, kind: type[Any], default: Any = None) -> Any:
        value = self.file.metadata.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise LoadError(f"{self.path}: metadata {key}={str(value)[:40]!r} is not of type {kind.__name__}")
        return value

    def _size(self, key: str, limit: int, default: int | None = None) -> int:
        value: int = self._meta(f"{self.arch}.{key}", int, default)
        if not 1 <= value <= limit:
            raise LoadError(f"{self.path}: metadata {self.arch}.{key}={value} is outside 1..{limit}")
        return value

    def _number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value: float = self._meta(f"{self.arch}.{key}", float, default)
        if not low <= value <= high:
            raise LoadError(f"{self.path}: metadata {self.arch}.{key}={value} is outside {low}..{high}")
        # GGUF keeps float32; the decimal that was meant (1e-05, not 9.999999747378752e-06) is the shortest one
        return _shortest_float(value)


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a Llama or Qwen2 checkpoint with this config.json has."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    qkv_bias = config.get("attention_bias", config["model_type"] == "qwen2")
    out_bias = config.get("attention_bias", False)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden), "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden), "self_attn.o_proj.weight": (hidden, q_rows),
        "mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if qkv_bias:
        layer |= {f"self_attn.{part}_proj.bias": (rows,) for part, rows in zip("qkv", (q_rows, kv_rows, kv_rows),
                                                                             strict=True)}
    if out_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def unpermute(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows (heads * D, ...) from GGUF's order (pairs of a rotation next to each other) to Hugging Face's (halves).

    heads = 0 returns the array as it is. Inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    if not heads:
        return rows
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])  # (heads, D/2, 2, ...)
    return split.swapaxes(1, 2).reshape(rows.shape)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of bfloat16, rounded to nearest even as torch does; NaN stays (a quiet) NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


def llama3_factors(theta: float, head_dim: int, parameters: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """What each of the head_dim / 2 rotary frequencies is divided by under llama3 scaling. Source: Llama 3.1."""
    import numpy as np

    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))


def _shortest_float(value: float) -> float:
    """The shortest decimal that is this float32."""
    import numpy as np

    return float(str(np.float32(value)))


def convert(path: str | Path, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the content of the GGUF file `path` as a Hugging Face folder into `folder`, which exists and is empty.

    progress: called with (bytes written, bytes in all) after each tensor.
    Raises LoadError naming the file and what is wrong in it.
    """
    model = GgufModel(path)
    try:
        tokenizer = rebuild_tokenizer(model.file.metadata, model.path, model.config["vocab_size"], model.arch)
        write_object(folder / "tokenizer.json", tokenizer.tokenizer, indent=None)
        write_object(folder / "tokenizer_config.json", tokenizer.tokenizer_config)
        write_object(folder / "generation_config.json", tokenizer.generation_config)
        write_object(folder / "config.json", model.config)
        write_file(folder / "model.safetensors", [(t.name, t.dtype, t.shape) for t in model.tensors],
                   _chunks(model, progress))
    finally:
        model.close()


def _chunks(model: GgufModel, progress: Callable[[int, int], None] | None) -> Iterator[bytes]:
    """Each tensor's bytes in order, telling progress."""
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    total = sum(math.prod(tensor.shape) * widths[tensor.dtype] for tensor in model.tensors)
    done = 0
    for tensor in model.tensors:
        chunk = model.stored_bytes(tensor)
        yield chunk
        done += len(chunk)
        if progress is not None:
            progress(done, total)
