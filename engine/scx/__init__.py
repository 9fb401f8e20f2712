"""SCX: attention layers whose queries, keys and values reach the compute device only under secret, invertible maps.

`scx_env_init` and `get_scx_config` are the interface of SCX-vLLM; names load lazily, so that asking costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.scx.environment import SCXConfig, get_scx_config, scx_env_init

__all__ = ["SCXConfig", "get_scx_config", "scx_env_init"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("engine.scx.environment"), name)
    raise AttributeError(f"module 'engine.scx' has no attribute {name!r}")
