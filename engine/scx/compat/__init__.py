"""The package that users of SCX-vLLM import as `scx`; everything is engine.scx.environment's."""

from __future__ import annotations

from engine.scx.environment import SCXConfig, get_scx_config, scx_env_init

__all__ = ["SCXConfig", "get_scx_config", "scx_env_init"]
