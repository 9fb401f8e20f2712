"""A name or a path becomes a folder of weights, a typed description and tensors.

`resolve` finds or makes a Hugging Face folder, `spec` reads what the model is, `weights` hands out its tensors,
`gguf` turns the other file format into such a folder. Nothing here knows how a model computes, and nothing of a
checkpoint is ever executed: no pickle, no remote code (rules R3 and R5). Torch is imported by `weights` alone,
inside its functions; the names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.loading.resolve import resolve_model
    from engine.loading.spec import GenerationDefaults, ModelSpec, RopeSpec, read_config
    from engine.loading.weights import WeightSource, open_weights

_HOMES = {
    "GenerationDefaults": "spec",
    "ModelSpec": "spec",
    "RopeSpec": "spec",
    "WeightSource": "weights",
    "open_weights": "weights",
    "read_config": "spec",
    "resolve_model": "resolve",
}

__all__ = [
    "GenerationDefaults",
    "ModelSpec",
    "RopeSpec",
    "WeightSource",
    "open_weights",
    "read_config",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    """Load a public name's module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
