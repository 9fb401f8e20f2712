"""What start-up refuses or lowers, with value and fix: lengths, pools and mappings that cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.build import build_engine, within_mappings
from engine.core.config import EngineConfig
from engine.core.errors import ConfigError, LoadError
from engine.gpu import LEAST_REHEARSED, choose_device, rehearsal
from engine.serve.engine_process import build_real
from tests import models


def test_a_derived_pool_is_lowered_to_what_can_be_mapped() -> None:
    """vm.max_map_count bounds the ledger; a pool the user asked for is refused instead."""
    derived, asked = EngineConfig(), EngineConfig(kv_pool_groups=100)
    assert within_mappings(derived, 100, 1000) == 100
    assert within_mappings(derived, 100, 40) == 40
    with pytest.raises(ConfigError, match="100 page groups and the system can map 40"):
        within_mappings(asked, 100, 40)
    with pytest.raises(ConfigError, match="max_map_count"):
        within_mappings(derived, 100, 0)


def test_small_pages_for_a_large_pool_are_refused_with_the_fix() -> None:
    """4 KiB pages under 1 GiB in per-layer slabs need more mappings than Linux gives a process."""
    settings = {"kv_page_bytes": 4096, "kv_pool_bytes": 1 << 30, "kv_layout": "per_layer", "max_num_seqs": 8}
    with pytest.raises(ConfigError, match="larger --kv-page-bytes"):
        build_engine(EngineConfig(model=str(models.smollm2_dir()), max_model_len=512, **settings))


def test_a_derived_length_is_lowered_and_an_explicit_one_refused() -> None:
    """A pool smaller than the model's context shortens requests, unless that length was asked for."""
    folder = str(models.smollm2_dir())
    engine = build_engine(EngineConfig(model=folder, kv_pool_bytes=24 << 20, max_num_seqs=2))
    assert engine.scheduler.max_model_len == (24 << 20) // 2 // 11520
    engine.close()
    with pytest.raises(ConfigError, match="--max-model-len 8192 needs"):
        build_engine(EngineConfig(model=folder, kv_pool_bytes=24 << 20, max_model_len=8192))


def test_what_needs_a_gpu_is_refused_without_one() -> None:
    """A device, a driver, a backend: the reason and what to use, before anything is loaded."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    folder = str(models.smollm2_dir())
    for settings, words in (
        ({"device": "cuda"}, "use --device cpu"),
        ({"kv_driver": "cuda"}, "use memfd"),
        ({"attention_backend": "triton_vattn"}, "runs on cuda, not cpu"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_engine(EngineConfig(model=folder, **settings))


@pytest.mark.parametrize(
    ("capability", "triton", "lacks"),
    [((9, 0), True, None), ((8, 0), True, None), ((7, 5), True, "is 7.5, and 8.0"), ((9, 0), False, "Triton"),
     (None, True, "sees no CUDA device")],
)  # fmt: skip
def test_auto_takes_a_gpu_that_the_kernels_run_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int] | None, triton: bool, lacks: str | None,
) -> None:  # fmt: skip
    """Else the CPU, with the reason in one line of the log; asked for by name, the reason is the error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there" if triton else None)
    with caplog.at_level("INFO", "engine.gpu"):
        assert choose_device("auto") == ("cuda" if lacks is None else "cpu")
        assert choose_device("cpu") == "cpu"
    (line,) = caplog.messages
    assert (lacks or "device cuda: a GPU") in line
    if lacks is None:
        assert choose_device("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match=lacks):
            choose_device("cuda")


def test_an_unknown_architecture_is_named(tmp_path: object) -> None:
    """A checkpoint of a family that is not built says which ones are."""
    folder = models.tiny_llama_dir(tmp_path, 1)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    with pytest.raises(LoadError, match=r"MambaForCausalLM.*LlamaForCausalLM, .*Qwen2ForCausalLM"):
        build_engine(EngineConfig(model=str(folder)))


def test_the_engine_process_lowers_a_derived_pool_too(tmp_path: Path) -> None:
    """It resolves the configuration before it builds; the pool must not count as asked for because of that."""
    folder = models.tiny_llama_dir(tmp_path, 1)
    built = build_real(EngineConfig(model=str(folder), kv_page_bytes=16384, max_num_seqs=2), lambda text: None)
    try:
        assert built.facts.pool_groups == built.loop.scheduler.ledger.total_groups < 65_530 // 2
    finally:
        built.loop.close()


@pytest.mark.parametrize("tokens", [LEAST_REHEARSED, 3, 16, 512, 8192])
@pytest.mark.parametrize("sequences", [1, 2, 256])
def test_a_rehearsal_stays_within_its_slot(tokens: int, sequences: int) -> None:
    """No row reaches past the tokens that are mapped; one step has all sequences sample."""
    steps = list(rehearsal(3, tokens, sequences))
    for rows in steps:
        assert all(row.slot == 3 and row.samples and row.tokens and row.start + len(row.tokens) <= tokens
                   for row in rows)  # fmt: skip
    assert sequences in map(len, steps)
