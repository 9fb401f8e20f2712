"""Text to token ids and back: encode, decode, stream, chat templates, from a model folder's own files.

It knows the `tokenizers` library and jinja2; it knows neither torch nor transformers, requests nor sampling. The
names below are loaded when first used, so that reading a JSON file does not cost the libraries' import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.tokenization.chat import ChatTemplate
    from engine.tokenization.hf import HfTokenizer
    from engine.tokenization.load import load_tokenizer
    from engine.tokenization.stream import Delta, Detokenizer
    from engine.tokenization.vocabulary import Tokenizer

_HOMES = {
    "ChatTemplate": "chat",
    "Delta": "stream",
    "Detokenizer": "stream",
    "HfTokenizer": "hf",
    "Tokenizer": "vocabulary",
    "load_tokenizer": "load",
}

__all__ = ["ChatTemplate", "Delta", "Detokenizer", "HfTokenizer", "Tokenizer", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Load a public name's module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
