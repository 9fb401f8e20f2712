"""Where an artefact lies: its own folder, or `patch/` in a model's. What is in it is artefact_files.py's, which needs
numpy; who only wants to know whether there is one, or what its JSON says, does not.
"""

from __future__ import annotations

from pathlib import Path

JSON_NAME, ARRAYS_NAME = "patch.json", "patch.safetensors"
FOLDER_NAME = "patch"
"""The subfolder of a model folder that holds its artefact."""

MAX_JSON_BYTES = 16 << 20


def find(folder: str | Path) -> Path | None:
    """Where a folder keeps an artefact: itself or its subfolder `patch`; None = neither."""
    for place in (Path(folder), Path(folder) / FOLDER_NAME):
        if (place / JSON_NAME).is_file():
            return place
    return None
