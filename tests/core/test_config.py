"""The configuration: every spelling users know, every refusal with its reason, all problems at once."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from engine.core.config import (
    MIB,
    EngineConfig,
    ServerConfig,
    make,
    resolve_auto,
    resolve_pool_groups,
)
from engine.core.errors import ConfigError
from engine.core.knobs import settings

SPELLINGS = [
    ("model_name", "org/name", "model", "org/name"),
    ("model-attention-backend", "Torch_Vattn", "attention_backend", "torch_vattn"),
    ("model_block_size", "2097152", "kv_page_bytes", 2 * MIB),
    ("model_tensor_parallel_degree", "1", "tensor_parallel_size", 1),
    ("max-num-batched-tokens", "256", "chunk_tokens", 256),
    ("chunk_size", "64", "chunk_tokens", 64),
    ("num-gpu-blocks-override", "24", "kv_pool_groups", 24),
    ("kv-pool-bytes", "64MiB", "kv_pool_bytes", 64 * MIB),
    ("kv-pool-bytes", "1.5GiB", "kv_pool_bytes", 1536 * MIB),
    ("kv-release-after", "never", "kv_release_after_s", math.inf),
    ("kv_release_after", 0.5, "kv_release_after_s", 0.5),
    ("dtype", "BF16", "dtype", "bfloat16"),
    ("dtype", "half", "dtype", "float16"),
    ("scheduler", "faster-transformer", "scheduler", "faster_transformer"),
    ("enforce-eager", "true", "enforce_eager", True),
    ("gpu_memory_utilization", 1, "gpu_memory_utilization", 1.0),
]
REFUSALS = [
    ({"attention_backend": "fa3_vattn"}, "not built"),
    ({"attention_backend": "flash_attn"}, "block tables"),
    ({"attention_backend": "cpu_vatn"}, "did you mean 'cpu_vattn'"),
    ({"tensor_parallel_size": 2}, "--tensor-parallel-size 1"),
    ({"pipeline_parallel_size": 4}, "--pipeline-parallel-size 1"),
    ({"scheduler": "orca", "chunk_size": 64}, "without a budget"),
    ({"scheduler": "faster_transformer", "max_num_batched_tokens": 64}, "without a budget"),
    ({"kv_page_bytes": 100000}, "98304"),
    ({"model_block_size": 16}, "4096..1073741824"),
    ({"kv_pool_bytes": 4096}, "4194304"),
    ({"kv_pool_bytes": "64MiB", "kv_pool_groups": 8}, "give one"),
    ({"low_chunk_size": 64}, "--enable-dynamic-chunking-schedule"),
    ({"enable_dynamic_chunking": True, "low_chunk_size": 100}, "multiple of 32"),
    ({"enable_dynamic_chunking": True, "low_chunk_size": 4096}, "above --high-chunk-size"),
    ({"enable_dynamic_chunking": True, "chunk_size": 64}, "contradicts"),
    ({"enable_dynamic_chunking": True, "scheduler": "vllm"}, "--scheduler sarathi"),
    ({"max_num_seqs": True}, "not an integer"),
    ({"max_num_seqs": 0}, "1..8192"),
    ({"seed": "1e3"}, "not an integer"),
    ({"gpu_memory_utilization": "nan"}, "not a number"),
    ({"gpu_memory_utilization": math.inf}, "not a number"),
    ({"enforce_eager": "maybe"}, "not true or false"),
    ({"model": ""}, "non-empty"),
    ({"trust_remote_code": True}, "ever executed"),
    ({"block_size": 16}, "--kv-page-bytes"),
    ({"max_num_seq": 4}, "did you mean 'max_num_seqs'"),
]


@pytest.mark.parametrize(("name", "given", "attribute", "value"), SPELLINGS)
def test_every_known_spelling_reaches_its_field(name: str, given: object, attribute: str, value: object) -> None:
    """Dashes, underscores, aliases, any case of a name, sizes with units."""
    assert getattr(make(EngineConfig, {name: given}), attribute) == value


@pytest.mark.parametrize(("values", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_what_cannot_be_honoured_is_refused_with_reason_and_fix(values: dict[str, object], words: str) -> None:
    """Never ignored, never rounded."""
    with pytest.raises(ConfigError) as caught:
        make(EngineConfig, values)
    assert words in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    """Whoever fixes a configuration fixes it once."""
    with pytest.raises(ConfigError) as caught:
        make(EngineConfig, {"dtype": "int3", "seed": -1, "zap": 1, "max_num_seqs": "many", "tensor_parallel_size": 2})
    assert len(str(caught.value).split("\n")) == 5


def test_the_constructor_checks_as_strictly_as_make() -> None:
    """LLM(...) and tests build configurations directly."""
    with pytest.raises(ConfigError, match="not an integer"):
        EngineConfig(max_num_seqs="4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="in one process"):
        EngineConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="non-empty"):
        ServerConfig(api_key="")
    with pytest.raises(ConfigError, match="4 or more"):
        ServerConfig(api_key="a b c d")
    with pytest.raises(ConfigError, match="must differ"):
        ServerConfig(api_key="same-key", admin_key="same-key")


def test_every_setting_says_what_it_is_and_has_a_valid_default() -> None:
    """The help is derived: a field without words would be a flag without words. Names never collide."""
    names: list[str] = []
    for kind in (EngineConfig, ServerConfig):
        assert kind() == make(kind, {})
        for setting in settings(kind):
            assert len(setting.knob.help) > 8, setting.name
            assert setting.kind in ("int", "float", "str", "bool")
            if setting.kind in ("int", "float"):
                assert setting.knob.lo is not None and setting.knob.hi is not None, f"{setting.name} has no bounds"
            names += setting.names
    assert len(names) == len(set(names))


def test_auto_is_resolved_into_a_new_configuration() -> None:
    """Frozen stays frozen; what was explicit stays what it was."""
    asked = EngineConfig(chunk_tokens=None)
    found = resolve_auto(asked, checkpoint_dtype="bf16", max_positions=2048, usable_cores=3)
    assert (found.dtype, found.max_model_len, found.threads, found.chunk_tokens) == ("bfloat16", 2048, 3, 512)
    assert asked.dtype == "auto" and asked.max_model_len is None
    vllm = resolve_auto(EngineConfig(scheduler="vllm"), checkpoint_dtype="float32", max_positions=64, usable_cores=1)
    assert vllm.chunk_tokens == 64
    orca = resolve_auto(EngineConfig(scheduler="orca"), checkpoint_dtype="float32", max_positions=64, usable_cores=1)
    assert orca.chunk_tokens is None
    dynamic = resolve_auto(EngineConfig(dynamic_chunking=True), checkpoint_dtype="float32", max_positions=64,
                           usable_cores=1)  # fmt: skip
    assert (dynamic.low_chunk_tokens, dynamic.high_chunk_tokens, dynamic.chunk_schedule_stages) == (128, 2048, 16)
    # resolving twice changes nothing: the engine process resolves what the server may have resolved before
    assert resolve_auto(found, checkpoint_dtype="float32", max_positions=2048, usable_cores=9) == found


def test_a_length_beyond_the_model_is_refused() -> None:
    """Positions the model never saw give nonsense, silently."""
    with pytest.raises(ConfigError, match="at most 2048"):
        resolve_auto(EngineConfig(max_model_len=2049), checkpoint_dtype="float32", max_positions=2048, usable_cores=1)


def test_the_pool_is_sized_exactly_when_asked_and_modestly_when_not() -> None:
    """--kv-pool-bytes exactly; groups exactly; otherwise a part of free memory, at most 4 GiB."""
    group = 4 * MIB
    assert resolve_pool_groups(EngineConfig(kv_pool_bytes=9 * group + 1), group_bytes=group, free_bytes=0) == 9
    assert resolve_pool_groups(EngineConfig(kv_pool_groups=7), group_bytes=group, free_bytes=0) == 7
    assert resolve_pool_groups(EngineConfig(gpu_memory_utilization=0.5), group_bytes=group, free_bytes=20 * group) == 10
    assert resolve_pool_groups(EngineConfig(), group_bytes=group, free_bytes=1 << 40) == 1024
    with pytest.raises(ConfigError, match="holds no page group"):
        resolve_pool_groups(EngineConfig(), group_bytes=group, free_bytes=group // 2)


def test_configuration_needs_the_standard_library_only() -> None:
    """It is read before anything heavy, and by tools that have nothing installed."""
    code = ("import engine.core.config, sys; bad = {'torch', 'yaml', 'msgspec', 'fastapi'} & set(sys.modules); "
            "assert not bad, bad")  # fmt: skip
    subprocess.run([sys.executable, "-S", "-c", code], check=True, timeout=20)


def test_a_configuration_is_a_value() -> None:
    """It crosses processes and is compared in tests."""
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert dataclasses.replace(config, seed=3) == EngineConfig(seed=3)
