"""What SCX is asked to do, checked against the model and the machine; frozen from then on.

Settings come from engine flags, and where those are silent from SCX-vLLM's environment variables. It makes no keys and
no devices: engine/scx/open.py does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.core.config import DEFAULT_SEAL_TOKENS, EngineConfig
from engine.core.errors import ConfigError
from engine.loading.spec import ModelSpec
from engine.scx.environment import parse_layers

# Architectures whose attention is: project, rotate, attend, project back.
ARCHITECTURES = ("LlamaForCausalLM", "LlamaSCXForCausalLM", "Qwen2ForCausalLM", "Qwen2SCXForCausalLM")
ALIASES = ("LlamaSCXForCausalLM", "Qwen2SCXForCausalLM")
OWN_WORKER, UNIX = "worker", "unix:"  # secure devices that are processes
SEGMENTS_LIMIT_BYTES = 1 << 30  # of one request's maps


@dataclass(frozen=True, slots=True)
class ScxConfig:
    """layers: encoded ones, rising. secure_device: a torch device, or a worker (in_worker). seal_tokens: 0 = rows keep
    their order. segment_tokens: 0 = one key a request."""

    layers: tuple[int, ...]
    secure_device: str = "cpu"
    scheme: str = "perm"
    seal_tokens: int = 0
    segment_tokens: int = 0
    key_file: str | None = None
    debug: bool = False

    @property
    def page_seal(self) -> bool:
        """Whether full blocks of rows are shuffled."""
        return self.seal_tokens > 0

    @property
    def in_worker(self) -> bool:
        """Whether the secure side is a process of its own."""
        return self.secure_device == OWN_WORKER or self.secure_device.startswith(UNIX)


def known_devices() -> list[str]:
    """Devices that can be the secure one here."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def device_of(text: str) -> str:
    """The secure device, checked. Raises ConfigError naming it and the devices that are there."""
    name = "cuda:0" if text == "cuda" else text
    if name == OWN_WORKER or (name.startswith(UNIX) and name != UNIX):
        return name
    if name not in known_devices():
        raise ConfigError(f"--scx-secure-device {text!r} is not a device here; use {' or '.join(known_devices())}, "
                          f"{OWN_WORKER} (a process of its own, started here) or {UNIX}PATH (of a running worker)")
    return name


def scx_config(config: EngineConfig, spec: ModelSpec) -> ScxConfig | None:
    """None when SCX is off. config: with the environment merged in (environment.with_environment).

    Raises ConfigError for layers outside the model, an unknown device, an architecture that is not supported, settings
    that contradict each other, and settings without layers.
    """
    asked = parse_layers(config.scx_layers or "", "--scx-layers (or SCX_ENC_LAYERS)", spec.layers)
    layers = tuple(range(spec.layers)) if asked is None else asked
    if not layers:
        given = {"--scx-scheme": config.scx_scheme, "--scx-page-seal": config.scx_page_seal,
                 "--scx-segment-tokens": config.scx_segment_tokens, "--scx-key-file": config.scx_key_file,
                 "--scx-secure-device": config.scx_secure_device, "--scx-debug": config.scx_debug}  # fmt: skip
        alone = [flag for flag, value in given.items() if value]
        if alone:
            raise ConfigError(f"{', '.join(alone)} without layers to encode; add --scx-layers (0,{spec.layers - 1})")
        return None
    if spec.architecture not in ARCHITECTURES:
        raise ConfigError(f"--scx-layers: architecture {spec.architecture} has no encoded attention; "
                          f"it is built for {', '.join(ARCHITECTURES)}")
    seal = (config.scx_seal_tokens or DEFAULT_SEAL_TOKENS) if config.scx_page_seal else 0
    windows = [i for i in layers if spec.layer_windows and spec.layer_windows[i]]
    if windows and (seal or config.scx_segment_tokens):
        what = "--scx-page-seal" if seal else "--scx-segment-tokens"
        window = spec.layer_windows[windows[0]]
        raise ConfigError(f"{what}: layer {windows[0]} has a sliding window of {window} tokens, which would cut "
                          "through a block; leave it out, or leave that layer out of --scx-layers")
    if config.scx_key_file and (config.scx_secure_device or "").startswith(UNIX):
        raise ConfigError(f"--scx-key-file with --scx-secure-device {config.scx_secure_device}: the worker holds the "
                          "root secret; give it --key-file instead")
    return ScxConfig(
        layers=layers,
        secure_device=device_of(config.scx_secure_device or "cpu"),
        scheme=config.scx_scheme or "perm",
        seal_tokens=seal,
        segment_tokens=config.scx_segment_tokens or 0,
        key_file=config.scx_key_file,
        debug=bool(config.scx_debug),
    )


def session_bytes(config: ScxConfig, spec: ModelSpec, max_tokens: int) -> int:
    """What the maps of one session of max_tokens tokens take on the secure device [bytes]. Raises ConfigError for
    segments whose maps would take more than SEGMENTS_LIMIT_BYTES."""
    from engine.scx.schemes import map_bytes  # loads cryptography

    each = map_bytes(config.scheme, len(config.layers), spec.kv_heads, spec.head_dim)
    if not config.segment_tokens:
        return each
    count = -(-max_tokens // config.segment_tokens)
    if count * each > SEGMENTS_LIMIT_BYTES:
        raise ConfigError(
            f"--scx-segment-tokens {config.segment_tokens}: a request of {max_tokens} tokens has {count} segments, "
            f"whose maps take {each} bytes each, and {SEGMENTS_LIMIT_BYTES} is the most a request may have; encode "
            f"fewer layers, lower --max-model-len, or use --scx-scheme perm or larger segments")
    return count * each
