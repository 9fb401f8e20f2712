"""Tessera: an LLM serving engine. `from engine import LLM, SamplingParams` is the offline API.

Names load lazily, so that importing `engine.core` never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.core.request import SamplingParams
    from engine.serve.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "engine.serve.llm", "SamplingParams": "engine.core.request"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
