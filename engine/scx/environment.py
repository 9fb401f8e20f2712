"""SCX-vLLM's environment variables: the one file that reads and writes SCX_ENC_LAYERS and its two companions.

It knows texts, not models: which layer numbers exist is decided where the model is known (engine/scx/config.py).
A variable is read when an engine is built; `check_unchanged` says so to whoever sets one later.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass

from engine.core.config import EngineConfig
from engine.core.errors import ConfigError

log = logging.getLogger(__name__)

LAYERS, DEVICE, DEBUG = "SCX_ENC_LAYERS", "SCX_SECURE_DEVICE", "SCX_ENABLE_DEBUG"
VARIABLES = (LAYERS, DEVICE, DEBUG)
ALL = "all"
_TRUTH = {"true": True, "1": True, "false": False, "0": False, "": False}


@dataclass(frozen=True, slots=True)
class SCXConfig:
    """The environment's settings. enc_layers: sorted, without duplicates."""

    enc_layers: tuple[int, ...]
    secure_device: str
    enable_debug: bool


def parse_layers(text: str, source: str, layers: int | None = None) -> tuple[int, ...] | None:
    """Layer numbers of "0,27", () of "", None of "all". source: the flag or variable that the text came from.

    layers: of the model, where it is known; numbers beyond it are refused. Raises ConfigError naming the bad part and
    what is allowed.
    """
    allowed = f"0..{'layers-1' if layers is None else layers - 1}"
    words = text.strip()
    if words.lower() == ALL:
        return None
    if not words:
        return ()
    found = set()
    for word in words.split(","):
        number = word.strip()
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise ConfigError(f"{source} {text!r}: {number!r} is not a layer number; use numbers of {allowed} "
                              f"separated by commas, {ALL}, or nothing for off")
        if layers is not None and int(number) >= layers:
            raise ConfigError(f"{source} {text!r}: layer {number} is outside {allowed} of this model")
        found.add(int(number))
    return tuple(sorted(found))


def parse_debug(text: str) -> bool:
    """true, false, 1 or 0 in any case. Raises ConfigError."""
    value = _TRUTH.get(text.strip().lower())
    if value is None:
        raise ConfigError(f"{DEBUG}={text!r} is not true, false, 1 or 0")
    return value


def scx_env_init(SCX_ENC_LAYERS: str | None = "", SCX_SECURE_DEVICE: str | None = "cpu",
                 SCX_ENABLE_DEBUG: bool | None = False, **lowercase: object) -> None:
    """Set the three variables for engines built after this call; each is overwritten.

    SCX_ENC_LAYERS: "0,27", "all", or "" for off. SCX_SECURE_DEVICE: cpu or cuda:N. The same may be given as
    enc_layers, secure_device and enable_debug, and None is a default. Raises ConfigError for a text that means
    nothing, TypeError for an unknown name.
    """
    given: dict[str, object] = {
        "enc_layers": SCX_ENC_LAYERS, "secure_device": SCX_SECURE_DEVICE, "enable_debug": SCX_ENABLE_DEBUG,
    }  # fmt: skip
    if unknown := set(lowercase) - set(given):
        raise TypeError(f"scx_env_init() has no argument {sorted(unknown)[0]!r}; it has {', '.join(given)}")
    given = {name: value for name, value in (given | lowercase).items() if value is not None}
    layers = str(given.get("enc_layers", ""))
    parse_layers(layers, LAYERS)
    debug = parse_debug(str(given.get("enable_debug", False)))
    device = str(given.get("secure_device", "cpu"))
    os.environ[LAYERS], os.environ[DEVICE], os.environ[DEBUG] = layers, device, str(debug)


def get_scx_config(layers: int | None = None) -> SCXConfig:
    """What the environment says now. layers: of the model, which "all" needs and which other numbers must be below.
    Raises ConfigError for a text that means nothing, and for "all" without layers."""
    found = parse_layers(os.environ.get(LAYERS, ""), LAYERS, layers)
    if found is None:
        if layers is None:
            raise ConfigError(f"{LAYERS}={ALL} means every layer of a model that is not known here; call "
                              "get_scx_config(layers=N) with its number of layers")
        found = tuple(range(layers))
    return SCXConfig(found, os.environ.get(DEVICE, "").strip() or "cpu", parse_debug(os.environ.get(DEBUG, "")))


def snapshot() -> tuple[str | None, ...]:
    """The three variables' texts, to compare with later ones."""
    return tuple(os.environ.get(name) for name in VARIABLES)


def check_unchanged(seen: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Warn of each variable that differs from an earlier snapshot of an engine's; returns the newer one."""
    now = snapshot()
    for name, before, after in zip(VARIABLES, seen, now, strict=True):
        if before != after:
            log.warning("%s changed after the engine was built and has no effect on it; build another", name)
    return now


def with_environment(config: EngineConfig) -> EngineConfig:
    """The configuration with every SCX flag that was not given taken from its variable.

    A flag beats its variable. Variables without SCX_ENC_LAYERS (or a flag for it) have no effect, as in SCX-vLLM.
    """
    layers = config.scx_layers if config.scx_layers is not None else os.environ.get(LAYERS)
    if config.scx_layers is not None and os.environ.get(LAYERS, config.scx_layers) != config.scx_layers:
        log.info("--scx-layers is given and beats %s", LAYERS)
    if not (layers or "").strip():
        return config
    device = config.scx_secure_device or os.environ.get(DEVICE, "").strip() or "cpu"
    debug = parse_debug(os.environ.get(DEBUG, "")) if config.scx_debug is None else config.scx_debug
    return dataclasses.replace(config, scx_layers=layers, scx_secure_device=device, scx_debug=debug)
