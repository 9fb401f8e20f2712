"""`from scx.keys import scx_env_init`, as SCX-vLLM spells it; the code is engine.scx.environment's.

The name is upstream's: there are no keys here. Those are engine/scx/keys.py's, and nothing outside reads them.
"""

from __future__ import annotations

from engine.scx.environment import SCXConfig, get_scx_config, scx_env_init

__all__ = ["SCXConfig", "get_scx_config", "scx_env_init"]
