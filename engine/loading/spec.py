"""config.json as one frozen, range-checked description of a model: ModelSpec.

It does not know which architectures the engine has (the model registry does: pass `known` to have them checked),
holds no tensors, and ignores `auto_map`: a model folder is data (rule R5).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.errors import LoadError
from engine.tokenization.jsonfile import read_object, read_optional_object

log = logging.getLogger(__name__)

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("bfloat16", "float16", "float32")

# Ranges are far above any real model and far below what could overflow a product of two of them in 64 bits.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 27
MAX_EOS_IDS = 256


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions. kind: one of ROPE_KINDS; theta: the base; factor: context stretch of every scaled kind.

    original_positions: the context before scaling (llama3, yarn; dynamic: where stretching begins).
    low_freq_factor, high_freq_factor: llama3. beta_fast, beta_slow, mscale, mscale_all_dim, truncate: yarn;
    attention_factor: yarn's multiplier of cos and sin, None = derived from factor and the mscales.
    Names follow Hugging Face's rope_parameters.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults of generation_config.json; None = the file says nothing, use the engine's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint. Sizes in elements: hidden C, ffn F, heads H, kv_heads G, head_dim D, vocab V, layers L.

    eps: of every RMSNorm. tie: the head is the embedding. dtype: bfloat16 | float16 | float32, as stored.
    max_positions: max_position_embeddings; context_tokens: the longest sequence, rope stretch included.
    qkv_bias, out_bias, mlp_bias: which linears have one. sliding_window: tokens, None = full attention everywhere;
    layer_windows: L numbers, 0 = that layer attends to everything. eos_ids: every id that ends a text, the first
    is the tokenizer's; bos_id: None = the model has none.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    rope: RopeSpec
    tie: bool
    dtype: str
    max_positions: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_windows: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def context_tokens(self) -> int:
        """Positions the rotary embedding is made for. yarn: original * factor; dynamic: stretched by factor."""
        if self.rope.kind == "yarn":
            return max(self.max_positions, int(self.rope.original_positions * self.rope.factor))
        if self.rope.kind == "dynamic":
            return int(self.max_positions * self.rope.factor)
        return self.max_positions


class _Fields:
    """Typed, range-checked access to one JSON object; every complaint names file and key."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self.values = values
        self.origin = origin

    def fail(self, key: str, value: object, wanted: str) -> LoadError:
        return LoadError(f"{self.origin}: {key}={str(value)[:80]!r} is not {wanted}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise LoadError(f"{self.origin}: {key} is missing; it must be an integer in {low}..{high}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, value, f"an integer in {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise LoadError(f"{self.origin}: {key} is missing; it must be a number in {low}..{high}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.fail(key, value, f"a number in {low}..{high}")  # NaN fails the comparison
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value


def read_config(path: str | Path, known: Iterable[str] | None = None) -> ModelSpec:
    """The ModelSpec of the model folder `path`.

    known: architecture names the engine has; an architecture outside them is refused. None skips that check.
    Raises LoadError naming file, key, value and what is allowed.
    """
    folder = Path(path)
    origin = str(folder / "config.json")
    config = _Fields(read_object(folder / "config.json"), origin)
    architecture = _architecture(config, known)
    if config.values.get("quantization_config") is not None:
        raise LoadError(f"{origin}: quantization_config is set, and quantised safetensors are not supported; "
                        "use the unquantised checkpoint or a GGUF file")
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise LoadError(f"{origin}: hidden_act={activation!r} is not supported; supported: silu")

    hidden = config.integer("hidden_size", 1, MAX_WIDTH)
    heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    head_dim, kv_heads = _head_shapes(config, hidden, heads)
    vocab = config.integer("vocab_size", 1, MAX_VOCAB)
    positions = config.integer("max_position_embeddings", 1, MAX_POSITIONS, default=2048)
    is_qwen2 = architecture.startswith("Qwen2")  # its q, k, v have biases without any key saying so
    attention_bias = config.flag("attention_bias", is_qwen2)
    windows = _layer_windows(config, layers, is_qwen2)
    generation = _Fields(read_optional_object(folder / "generation_config.json"),
                         str(folder / "generation_config.json"))
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=config.integer("intermediate_size", 1, MAX_WIDTH),
        vocab=vocab,
        eps=config.number("rms_norm_eps", 1e-12, 1.0, default=1e-6),
        rope=_rope(config, positions, head_dim),
        tie=config.flag("tie_word_embeddings", False),
        dtype=_dtype(config, folder),
        max_positions=positions,
        qkv_bias=attention_bias,
        out_bias=attention_bias and not is_qwen2,
        mlp_bias=config.flag("mlp_bias", False),
        sliding_window=max(windows) or None,
        layer_windows=windows,
        eos_ids=_eos_ids(config, generation, vocab),
        bos_id=_token_id(config, generation, "bos_token_id", vocab),
        pad_id=_token_id(config, generation, "pad_token_id", vocab),
        generation=_generation_defaults(generation),
    )


def _architecture(config: _Fields, known: Iterable[str] | None) -> str:
    """The first of `architectures`; refused when the engine has no such model."""
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise config.fail("architectures", names, "a list of architecture names; is this a causal language model?")
    if known is not None and names[0] not in (listed := sorted(known)):
        raise LoadError(f"{config.origin}: architecture {names[0][:80]!r} is not supported; "
                        f"supported: {', '.join(listed)}")
    return str(names[0])


def _head_shapes(config: _Fields, hidden: int, heads: int) -> tuple[int, int]:
    """(head_dim, kv_heads), checked against each other."""
    if config.values.get("head_dim") is None and hidden % heads:
        raise LoadError(f"{config.origin}: hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
                        "and head_dim is not given")
    head_dim = config.integer("head_dim", 2, MAX_HEAD_DIM, default=max(2, hidden // heads))
    if head_dim % 2:
        raise LoadError(f"{config.origin}: head_dim={head_dim} is odd; rotary positions need an even one")
    kv_heads = config.integer("num_key_value_heads", 1, heads, default=heads)
    if heads % kv_heads:
        raise LoadError(f"{config.origin}: num_attention_heads={heads} is not a multiple of "
                        f"num_key_value_heads={kv_heads}")
    return head_dim, kv_heads


def _rope(config: _Fields, positions: int, head_dim: int) -> RopeSpec:
    """Both spellings: rope_theta + rope_scaling {type | rope_type}, and transformers 5's rope_parameters."""
    key = "rope_parameters" if config.values.get("rope_parameters") is not None else "rope_scaling"
    raw = config.values.get(key)
    if raw is not None and not isinstance(raw, dict):
        raise config.fail(key, raw, "an object")
    rope = _Fields({**(raw or {})}, f"{config.origin}: {key}")
    theta = rope.number("rope_theta", 1.0, 1e12, default=config.number("rope_theta", 1.0, 1e12, default=10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise LoadError(f"{config.origin}: {key} has rope_type={kind[:80]!r}, which is not supported; "
                        f"supported: {', '.join(ROPE_KINDS)}")
    for holder in (rope, config):
        if holder.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            raise LoadError(f"{holder.origin}: partial_rotary_factor below 1 is not supported")
    if kind == "default":
        return RopeSpec(theta=theta)
    factor = rope.number("factor", 1.0, 4096.0)
    if kind == "linear":
        return RopeSpec(kind, theta, factor)
    if kind == "dynamic":
        if head_dim <= 2:
            raise LoadError(f"{config.origin}: dynamic rope needs head_dim above 2, found {head_dim}")
        return RopeSpec(kind, theta, factor, original_positions=positions)
    original = rope.integer("original_max_position_embeddings", 1, MAX_POSITIONS,
                            default=config.integer("original_max_position_embeddings", 1, MAX_POSITIONS,
                                                   default=positions))
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 4096.0)
        high = rope.number("high_freq_factor", 1e-6, 4096.0)
        if high <= low:
            raise LoadError(f"{rope.origin}: high_freq_factor={high} must be above low_freq_factor={low}")
        return RopeSpec(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    given = rope.values.get("attention_factor") is not None
    return RopeSpec(
        kind, theta, factor, original,
        attention_factor=rope.number("attention_factor", 0.0, 1e3) if given else None,
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, default=1.0),
        mscale=rope.number("mscale", 0.0, 1e3, default=0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0, 1e3, default=0.0),
        truncate=rope.flag("truncate", True),
    )


def _layer_windows(config: _Fields, layers: int, is_qwen2: bool) -> tuple[int, ...]:
    """Window [tokens] of each layer, 0 = none. Qwen2 needs use_sliding_window and spares its first layers."""
    window = config.integer("sliding_window", 0, MAX_POSITIONS, default=0)
    if not config.flag("use_sliding_window", not is_qwen2):
        window = 0
    kinds = config.values.get("layer_types")
    if kinds is not None and window:
        good = isinstance(kinds, list) and len(kinds) == layers
        if not good or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
            raise config.fail("layer_types", kinds, f"{layers} times full_attention or sliding_attention")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    first = config.integer("max_window_layers", 0, 1 << 20, default=28) if is_qwen2 else 0
    return tuple(window if layer >= first else 0 for layer in range(layers))


def _dtype(config: _Fields, folder: Path) -> str:
    """`dtype` or, as older files spell it, `torch_dtype`; what the weights are stored in when neither is there."""
    name = config.text("dtype", config.text("torch_dtype", "")).removeprefix("torch.")
    if not name:
        from engine.loading.safetensors_header import stored_dtype

        name = stored_dtype(folder)
    if name not in DTYPES:
        raise LoadError(f"{config.origin}: dtype={name[:40]!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _ids(source: _Fields, key: str) -> list[int]:
    """One id, a list of them or nothing, as a list. Ids are range-checked."""
    value = source.values.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if len(listed) > MAX_EOS_IDS:
        raise LoadError(f"{source.origin}: {key} lists {len(listed)} ids, above the limit of {MAX_EOS_IDS}")
    for token in listed:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MAX_VOCAB:
            raise source.fail(key, token, f"a token id in 0..{MAX_VOCAB - 1}")
    return listed


def _eos_ids(config: _Fields, generation: _Fields, vocab: int) -> tuple[int, ...]:
    """generation_config.json rules where it names any (it may be a list); config.json otherwise."""
    found = _ids(generation, "eos_token_id") or _ids(config, "eos_token_id")
    inside = tuple(dict.fromkeys(token for token in found if token < vocab))
    if len(inside) < len(set(found)):
        log.warning("%s: ignoring eos ids at or above vocab_size=%d", config.origin, vocab)
    return inside


def _token_id(config: _Fields, generation: _Fields, key: str, vocab: int) -> int | None:
    """A single optional id; one that the model has no row for (some files say so) counts as none."""
    found = _ids(config, key) or _ids(generation, key)
    return found[0] if found and found[0] < vocab else None


def _generation_defaults(generation: _Fields) -> GenerationDefaults:
    """Sampling fields the engine has. do_sample is ignored, as in vLLM; a repetition penalty is said, not applied.
    """
    penalty = generation.number("repetition_penalty", 0.0, 1e6, default=1.0)
    if not math.isclose(penalty, 1.0):
        log.warning("%s: repetition_penalty=%g is not supported and not applied", generation.origin, penalty)
    has = {key for key, value in generation.values.items() if value is not None}
    return GenerationDefaults(
        temperature=generation.number("temperature", 0.0, 100.0) if "temperature" in has else None,
        top_p=_top_p(generation) if "top_p" in has else None,
        top_k=generation.integer("top_k", -1, MAX_VOCAB) if "top_k" in has else None,
        min_p=generation.number("min_p", 0.0, 1.0) if "min_p" in has else None,
    )


def _top_p(generation: _Fields) -> float:
    """top_p in (0, 1]."""
    value = generation.number("top_p", 0.0, 1.0)
    if value <= 0.0:
        raise generation.fail("top_p", value, "a number in (0, 1]")
    return value
