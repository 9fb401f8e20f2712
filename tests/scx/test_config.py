"""SCX's settings: strict, named, from flags or SCX-vLLM's environment variables, through the names its users know."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import build
from engine.attention.base import backends
from engine.core.config import EngineConfig, make
from engine.core.errors import ConfigError
from engine.scx import get_scx_config, scx_env_init
from engine.scx.config import scx_config
from engine.scx.environment import check_unchanged, parse_layers, snapshot, with_environment
from scripts.scx_exactness import spec_of
from tests import models

VARIABLES = ("SCX_ENC_LAYERS", "SCX_SECURE_DEVICE", "SCX_ENABLE_DEBUG")
SPEC = dataclasses.replace(spec_of(16), layers=30)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables is set, and what a test sets is undone."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def resolved(**settings: Any) -> Any:
    """The checked configuration of a 30-layer Llama."""
    return scx_config(with_environment(EngineConfig(**settings)), SPEC)


@pytest.mark.parametrize(
    "text", ["a", "-1", "30", "0,", ",0", "0,,1", "1.5", "0 1", "٣", "0x1", "all,0", "99999999999"]
)
def test_bad_layers_name_the_value_and_the_range(text: str) -> None:
    """From a flag and from the environment alike."""
    with pytest.raises(ConfigError, match=r"0\.\.29") as caught:
        resolved(scx_layers=text)
    assert repr(text) in str(caught.value)
    os.environ["SCX_ENC_LAYERS"] = text
    with pytest.raises(ConfigError, match=r"0\.\.29"):
        resolved()


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", (0,)), ("0, 27", (0, 27)), ("27,0,27", (0, 27)), (" 3 ", (3,)), ("all", tuple(range(30))),
     ("ALL", tuple(range(30)))],
)  # fmt: skip
def test_good_layers(text: str, layers: tuple[int, ...]) -> None:
    """Blanks, duplicates, any order, all."""
    assert resolved(scx_layers=text).layers == layers


def test_off_by_default_and_by_the_empty_text(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing set, and "" from either side; a flag's "" beats the variable."""
    assert resolved() is None and resolved(scx_layers="") is None
    for blank in ("", " ", "\t"):
        os.environ["SCX_ENC_LAYERS"] = blank
        assert resolved() is None
    os.environ["SCX_ENC_LAYERS"] = "0,29"
    assert resolved().layers == (0, 29)
    assert resolved(scx_layers="") is None
    assert resolved(scx_layers="1").layers == (1,)


def test_bad_devices_are_named_with_those_there_are() -> None:
    """At configuration, not in the middle of a model; the variable as well as the flag."""
    for device in ("gpu7", "cuda:99", "mps", "cpu:1") + (() if torch.cuda.is_available() else ("cuda", "cuda:0")):
        with pytest.raises(ConfigError, match=rf"'{device}'.*cpu"):
            resolved(scx_layers="0", scx_secure_device=device)
    os.environ["SCX_ENC_LAYERS"], os.environ["SCX_SECURE_DEVICE"] = "0", "gpu7"
    with pytest.raises(ConfigError, match="gpu7"):
        resolved()
    assert resolved(scx_secure_device="cpu").secure_device == "cpu"


def test_contradictions_are_refused() -> None:
    """Settings without layers, blocks that cross keys, a key a segment where there is one for everybody."""
    for alone in ({"scx_scheme": "mix"}, {"scx_page_seal": True}, {"scx_segment_tokens": 8}, {"scx_key_file": "x"},
                  {"scx_secure_device": "cpu"}, {"scx_debug": True}):  # fmt: skip
        with pytest.raises(ConfigError, match="without layers"):
            resolved(**alone)
    for bad, said in (
        ({"scx_seal_tokens": 8}, "needs --scx-page-seal"),
        ({"scx_page_seal": True, "scx_segment_tokens": 24}, "24 is not a multiple of the 16"),
        ({"scx_scheme": "perm-static", "scx_segment_tokens": 16}, "perm-static"),
        ({"scx_scheme": "permute"}, "known: mix, perm, perm-static, rotate; did you mean 'perm'"),
        ({"scx_page_seal": True, "scx_seal_tokens": 1}, "2..1024"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolved(scx_layers="0", **bad)
    windowed = dataclasses.replace(SPEC, layer_windows=(0, 64) * 15)
    for shuffled in ({"scx_page_seal": True}, {"scx_segment_tokens": 16}):
        config = EngineConfig(scx_layers="0,3", **shuffled)
        with pytest.raises(ConfigError, match="layer 3 has a sliding window of 64"):
            scx_config(config, windowed)
        assert scx_config(EngineConfig(scx_layers="0,2", **shuffled), windowed) is not None


def test_an_architecture_without_encoded_attention_is_named() -> None:
    """SCX is not ignored where it is not built."""
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM.*LlamaForCausalLM.*Qwen2ForCausalLM"):
        scx_config(EngineConfig(scx_layers="0"), dataclasses.replace(SPEC, architecture="MixtralForCausalLM"))


def test_flags_as_the_command_line_spells_them() -> None:
    """Dashes, underscores, and every SCX flag at once."""
    config = make(EngineConfig, {
        "scx-layers": "0,29", "scx_secure_device": "cpu", "scx-scheme": "perm_static", "scx-page-seal": "true",
        "scx-seal-tokens": "8", "scx-debug": "1", "scx-key-file": "/k",
    })  # fmt: skip
    made = scx_config(config, SPEC)
    assert made is not None and made.scheme == "perm-static" and made.seal_tokens == 8 and made.debug
    assert made.layers == (0, 29) and made.key_file == "/k" and made.page_seal
    assert resolved(scx_layers="0", scx_page_seal=True).seal_tokens == 16 and not resolved(scx_layers="0").page_seal


def test_the_environment_as_scx_vllm_users_set_it() -> None:
    """The seed's call, by position, by upstream's names and by those its README uses; the result is frozen."""
    for arguments, keywords in (
        (("0,27", "cpu", True), {}),
        ((), {"SCX_ENC_LAYERS": "0,27", "SCX_ENABLE_DEBUG": True}),
        ((), {"enc_layers": "0,27", "secure_device": "cpu", "enable_debug": True}),
    ):
        scx_env_init(*arguments, **keywords)  # type: ignore[arg-type]
        assert [os.environ[name] for name in VARIABLES] == ["0,27", "cpu", "True"]
        known = get_scx_config()
        assert (known.enc_layers, known.secure_device, known.enable_debug) == ((0, 27), "cpu", True)
        assert resolved().layers == (0, 27) and resolved().debug
        scx_env_init()
        assert [os.environ[name] for name in VARIABLES] == ["", "cpu", "False"]
        assert get_scx_config().enc_layers == () and resolved() is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_scx_config().secure_device = "x"  # type: ignore[misc]
    with pytest.raises(TypeError, match="layers"):
        scx_env_init(layers="0")
    for bad in ("maybe", "yes"):
        os.environ["SCX_ENABLE_DEBUG"] = bad
        with pytest.raises(ConfigError, match=f"'{bad}' is not true, false, 1 or 0"):
            get_scx_config()
    with pytest.raises(ConfigError, match="'a'"):
        scx_env_init("a")
    assert parse_layers("all", "x") is None


def test_the_package_scx_is_ours(root: Path, tmp_path: Path) -> None:
    """`from scx.keys import scx_env_init` from anywhere, as an installed user would; and no torch for it."""
    code = (
        "import sys\nfrom scx.keys import scx_env_init, get_scx_config\nimport engine.scx\n"
        "assert scx_env_init is engine.scx.scx_env_init and get_scx_config is engine.scx.get_scx_config\n"
        "scx_env_init('0,27')\nassert get_scx_config().enc_layers == (0, 27)\nassert 'torch' not in sys.modules\n"
    )
    (tmp_path / "scx").symlink_to(root / "engine/scx/compat")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_change_after_the_engine_was_built_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Once for a change; the variable by name, not its value."""
    seen = snapshot()
    assert check_unchanged(seen) == seen and not caplog.records
    scx_env_init("0,7")
    with caplog.at_level(logging.WARNING):
        later = check_unchanged(seen)
    assert "SCX_ENC_LAYERS changed after the engine was built" in caplog.text
    caplog.clear()
    assert check_unchanged(later) == later and not caplog.records


def test_a_flag_beats_its_variable() -> None:
    """Layers, device and debugging, in both directions; without layers the other two variables have no effect."""
    scx_env_init("0", "gpu7", True)
    assert resolved(scx_secure_device="cpu").debug
    assert not resolved(scx_secure_device="cpu", scx_debug=False).debug
    os.environ["SCX_ENABLE_DEBUG"] = "False"
    assert resolved(scx_secure_device="cpu", scx_debug=True, scx_layers="1").debug
    os.environ["SCX_ENC_LAYERS"], os.environ["SCX_ENABLE_DEBUG"] = "", "True"
    assert resolved() is None


def test_none_and_all_in_scx_vllms_interface() -> None:
    """None is a default, never the text "None"; "all" is numbers once the number of layers is known, else an error."""
    scx_env_init(None, None, None)
    assert [os.environ[name] for name in VARIABLES] == ["", "cpu", "False"]
    scx_env_init(enc_layers=None, secure_device=None)
    assert [os.environ[name] for name in VARIABLES] == ["", "cpu", "False"]
    scx_env_init("all")
    assert get_scx_config(layers=3).enc_layers == (0, 1, 2) and resolved().layers == tuple(range(30))
    with pytest.raises(ConfigError, match=r"get_scx_config\(layers=N\)"):
        get_scx_config()
    scx_env_init("0,3")
    with pytest.raises(ConfigError, match=r"0\.\.2"):
        get_scx_config(layers=3)


def test_a_paged_backend_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Encoded layers need slots; a backend of blocks is named, and no store was made for it."""
    folder = models.tiny_llama_dir(tmp_path, 3, num_hidden_layers=2)
    paged = next(name for name in backends.names() if backends[name].caps.paged and backends[name].missing() is None)
    config, spec, groups = build.resolve(EngineConfig(
        model=str(folder), dtype="float32", max_num_seqs=2, max_model_len=64, kv_pool_bytes=8 << 20, scx_layers="0",
        attention_backend=paged))  # fmt: skip
    monkeypatch.setattr(build, "make_store", lambda *_: pytest.fail("a store was made"))
    with pytest.raises(ConfigError, match=f"--scx-layers needs a cache of slots, and --attention-backend {paged}"):
        build.build_runner(spec, config, groups)


def test_maps_are_taken_from_the_pools_memory_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Maps of every slot are subtracted before the pool is sized; those that do not fit, and segments whose maps a
    request could grow beyond the limit, are refused with the numbers before anything is allocated."""
    folder = models.tiny_llama_dir(tmp_path, 3, num_hidden_layers=2)
    common: dict[str, Any] = {"model": str(folder), "dtype": "float32", "max_num_seqs": 8, "max_model_len": 64,
                              "kv_page_bytes": 4096}  # fmt: skip
    monkeypatch.setattr(build, "free_memory_bytes", lambda: 4 << 20)
    plain = build.resolve(EngineConfig(**common))[2]
    encoded = build.resolve(EngineConfig(**common, scx_layers="all", scx_scheme="mix"))[2]
    maps = 8 * 4 * 2 * 2 * 16 * 16 * 4  # slots, maps, layers, KV heads, D x D float32
    resolved_config, spec, _ = build.resolve(EngineConfig(**common))
    geometry = build.geometry_of(spec, resolved_config, torch.float32)
    share = EngineConfig().gpu_memory_utilization
    assert plain == int((4 << 20) * share) // geometry.group_bytes
    assert encoded == int(((4 << 20) - maps) * share) // geometry.group_bytes < plain
    monkeypatch.setattr(build, "free_memory_bytes", lambda: maps - 1)
    with pytest.raises(ConfigError, match=f"take {maps} bytes and {maps - 1} are free.*--max-num-seqs"):
        build.resolve(EngineConfig(**common, scx_layers="all", scx_scheme="mix"))
    monkeypatch.setattr("engine.scx.config.SEGMENTS_LIMIT_BYTES", maps // 8 * 7)
    with pytest.raises(ConfigError, match=f"has 8 segments, whose maps take {maps // 8} bytes each"):
        build.resolve(EngineConfig(**common, scx_layers="all", scx_scheme="mix", scx_segment_tokens=8))
