"""config.json becomes a ModelSpec or a LoadError that names file, key, value and what is allowed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import LoadError
from engine.loading import ModelSpec, RopeSpec, read_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip


def spec_of(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    """read_config of BASE with changes; a value of None removes the key."""
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    return read_config(folder)


def test_a_plain_config(tmp_path: Path) -> None:
    """Every field arrives; what is absent has Hugging Face's default."""
    spec = spec_of(tmp_path)
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn) == (2, 64, 4, 2, 16, 128)
    assert (spec.vocab, spec.eps, spec.tie, spec.dtype, spec.max_positions) == (512, 1e-5, False, "bfloat16", 1024)
    assert (spec.eos_ids, spec.bos_id, spec.rope) == ((2,), 1, RopeSpec())
    assert not (spec.qkv_bias or spec.out_bias or spec.mlp_bias) and spec.sliding_window is None
    bare = spec_of(tmp_path, num_key_value_heads=None, rms_norm_eps=None, rope_theta=None, torch_dtype=None)
    assert (bare.kv_heads, bare.eps, bare.rope.theta, bare.dtype) == (4, 1e-6, 10000.0, "float32")
    assert spec_of(tmp_path, torch_dtype=None, dtype="float16").dtype == "float16"
    assert spec_of(tmp_path, head_dim=32).head_dim == 32
    biased = spec_of(tmp_path, attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias and biased.out_bias and biased.mlp_bias


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        ({"type": "linear", "factor": 2.0}, RopeSpec("linear", 10000.0, 2.0)),
        ({"rope_type": "dynamic", "factor": 4}, RopeSpec("dynamic", 10000.0, 4.0, 1024)),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 256},
            RopeSpec("llama3", 10000.0, 8.0, 256, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16,
             "attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
            RopeSpec("yarn", 10000.0, 4.0, 512, attention_factor=1.5, beta_fast=16.0, mscale=0.7, mscale_all_dim=0.9,
                     truncate=False),
        ),
        ({"rope_type": "default"}, RopeSpec()),
    ],
)  # fmt: skip
def test_rope_in_both_spellings(tmp_path: Path, scaling: dict[str, Any], wanted: RopeSpec) -> None:
    """rope_scaling with type or rope_type, and transformers 5's rope_parameters with the base inside, mean the same."""
    assert spec_of(tmp_path, rope_scaling=scaling).rope == wanted
    new = {"rope_type": scaling.get("rope_type", scaling.get("type")), "rope_theta": 10000.0, **scaling}
    assert spec_of(tmp_path, rope_theta=None, rope_parameters=new).rope == wanted


def test_context_tokens_follow_the_scaling(tmp_path: Path) -> None:
    """yarn and dynamic reach beyond max_position_embeddings, the others do not."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert spec_of(tmp_path, rope_scaling=yarn).context_tokens == 4096
    assert spec_of(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0}).context_tokens == 2048
    assert spec_of(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}).context_tokens == 1024


def test_real_checkpoints_written_by_transformers(llama_dir: Path, qwen2_dir: Path, tmp_path: Path) -> None:
    """What save_pretrained of version 5 writes is read; Qwen2 has q, k, v biases without a key saying so."""
    llama, qwen2 = read_config(llama_dir), read_config(qwen2_dir)
    assert (llama.architecture, llama.qkv_bias, llama.dtype) == ("LlamaForCausalLM", False, "float32")
    assert (qwen2.architecture, qwen2.qkv_bias, qwen2.out_bias) == ("Qwen2ForCausalLM", True, False)
    from transformers import LlamaConfig

    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    LlamaConfig(rope_parameters=scaling, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert read_config(tmp_path).rope == RopeSpec("llama3", 5e5, 8.0, 64)


@pytest.mark.parametrize("used", [True, False])
def test_sliding_windows_as_transformers_lays_them_out(tmp_path: Path, used: bool) -> None:
    """Qwen2: only with use_sliding_window, and only from max_window_layers on; layer_types rule where given."""
    from transformers import Qwen2Config

    theirs = Qwen2Config(num_hidden_layers=4, use_sliding_window=used, sliding_window=16, max_window_layers=3)
    wanted = tuple(16 if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    keys: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 16,
                            "use_sliding_window": used, "max_window_layers": 3}  # fmt: skip
    spec = spec_of(tmp_path, **keys)
    assert spec.layer_windows == wanted and spec.sliding_window == (16 if used else None)
    chosen = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert spec_of(tmp_path, **keys, layer_types=chosen).layer_windows == ((16, 0, 0, 16) if used else (0, 0, 0, 0))


def test_generation_defaults_and_the_eos_list(tmp_path: Path) -> None:
    """The eos list and sampling defaults of generation_config.json; ids without a row in the model are left out."""
    spec = spec_of(tmp_path, generation={"eos_token_id": [7, 2, 7, 100_000], "temperature": 0.6, "top_k": 20,
                                         "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.05})  # fmt: skip
    assert spec.eos_ids == (7, 2)
    assert (spec.generation.temperature, spec.generation.top_k, spec.generation.top_p) == (0.6, 20, 0.9)
    assert spec.generation.min_p is None
    assert spec_of(tmp_path, eos_token_id=[3, 4]).eos_ids == (3, 4)
    assert spec_of(tmp_path, eos_token_id=None, bos_token_id=None).bos_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT9LMHeadModel"]}, r"GPT9LMHeadModel.*supported: LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "list of architecture names"),
        ({"hidden_size": 65}, "not a multiple of num_attention_heads=4"),
        ({"hidden_size": -1}, "hidden_size='-1'.*1\\.\\.1048576"),
        ({"hidden_size": 2**63}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_key_value_heads": 8}, "1\\.\\.4"),
        ({"head_dim": 15}, "odd"),
        ({"vocab_size": 1 << 25}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope'.*default, linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}}, "above"),
        ({"rope_scaling": [1]}, "not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "supported: silu"),
        ({"torch_dtype": "int8"}, "bfloat16, float16, float32"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": list(range(300))}, "256"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """One line: file, key, value, what is allowed."""
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=words) as caught:
        read_config(tmp_path, known=["Qwen2ForCausalLM", "LlamaForCausalLM"])
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


def test_auto_map_is_data(tmp_path: Path) -> None:
    """R5: a config that points at code is read as if it did not, and the code is never imported."""
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    spec_of(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"nul", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes) -> None:
    """Empty, cut, not UTF-8, bottomless, absurd numbers: LoadError; so is a missing or enormous file."""
    with pytest.raises(LoadError, match="missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LoadError):
        read_config(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(LoadError, match="above the limit"):
        read_config(tmp_path)


def test_flipped_and_cut_bytes(tmp_path: Path, llama_dir: Path) -> None:
    """600 damaged config.json and generation_config.json: a spec within range or a LoadError, nothing else."""
    rng = random.Random(11)
    refused = 0
    for name in ("config.json", "generation_config.json"):
        for file in ("config.json", "generation_config.json"):
            shutil.copy(llama_dir / file, tmp_path / file)
        whole = (llama_dir / name).read_bytes()
        for _ in range(300):
            raw = bytearray(whole)
            for _ in range(rng.choice((1, 1, 4))):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)
            try:
                assert 0 < read_config(tmp_path).hidden <= 1 << 20
            except LoadError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 200
