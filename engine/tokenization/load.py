"""Which tokenizer a folder gets: the plain one, or a patched one where there is a patch."""

from __future__ import annotations

from pathlib import Path

from engine.tokenization.hf import load_base_tokenizer
from engine.tokenization.vocabulary import Tokenizer


def load_tokenizer(path_or_name: str | Path, patch: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model folder (or of the folder that holds the given tokenizer.json).

    patch: the folder of a patched vocabulary (docs/vocabularies.md) for that tokenizer, or one that has it in
    `patch/`; None = the one inside the model folder, if there is one. Raises LoadError, one line, naming file and
    reason.
    """
    path = Path(path_or_name).expanduser()
    own = (path.parent if path.is_file() else path) / "patch"
    if patch is None and not (own / "patch.json").is_file():
        return load_base_tokenizer(path)[0]
    from engine.tokenization.patched import load_patched  # numpy is imported only where it is needed

    return load_patched(path, own if patch is None else Path(patch).expanduser())
