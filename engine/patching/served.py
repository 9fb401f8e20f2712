"""A patched vocabulary and the model it is served with: which folder it is, and whether the two fit.

It encodes nothing and loads no weights. Whoever serves a model (the engine, the server, LLM) asks here, so that all
of them take the same artefact and the same ids.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.errors import LoadError
from engine.loading.spec import ModelSpec
from engine.patching.artefact import CONFIG_MARK, Artefact
from engine.patching.artefact_files import read
from engine.patching.config_ids import IdMap
from engine.patching.errors import BaseMismatch, MissingFile
from engine.patching.invariants import check_rows
from engine.patching.place import FOLDER_NAME, JSON_NAME, find
from engine.tokenization.jsonfile import read_optional_object

if TYPE_CHECKING:
    from engine.loading.weights import WeightSource

log = logging.getLogger(__name__)

MATRICES = ("embed_tokens.weight", "lm_head.weight")


def patch_folder(model: str | Path, asked: str | None = None, tokenizer: str | None = None) -> Path | None:
    """The artefact's folder for a model: the one asked for, or the model's own `patch/`, or the tokenizer's; None =
    a plain model.

    Raises LoadError (MissingFile) for a folder without an artefact, for one that contradicts the model's own, and for
    a model whose config.json says that it is patched when there is none.
    """
    own = find(Path(model) / FOLDER_NAME)
    if asked is not None:
        found = find(Path(asked).expanduser())
        if found is None:
            raise MissingFile(f"--patch {asked}: holds neither {JSON_NAME} nor {FOLDER_NAME}/{JSON_NAME}; give a "
                              "folder that `python -m scripts.patch` wrote")
        if own is not None and read(own).sha256 != read(found).sha256:
            raise LoadError(f"--patch {asked}: is another vocabulary than the one in {own}, which the model was made "
                            "for; leave --patch out")
        return found
    if own is None and tokenizer is not None:
        own = find(Path(tokenizer).expanduser() / FOLDER_NAME)
    if own is None and _mark(model) is not None:
        raise MissingFile(f"{Path(model) / 'config.json'}: says that the model has a patched vocabulary, but there is "
                          f"no {FOLDER_NAME}/ beside it; give its folder with --patch")
    return own


def fit(model: str | Path, folder: Path, spec: ModelSpec) -> tuple[Artefact, ModelSpec]:
    """The artefact, and the specification with the patched vocabulary's eos, bos and pad ids.

    config.json's ids are base ids unless it says otherwise (key tessera_patch). Raises WrongRows when it promises
    another number of rows, BaseMismatch when the model was made for another base, LoadError for an end id that the
    patch removed.
    """
    artefact, mark = read(folder), _mark(model)
    origin = str(Path(model) / "config.json")
    check_rows(artefact, spec.vocab, f"{origin}: vocab_size")
    if mark is not None:
        made_for = mark.get("base_sha256") if isinstance(mark, dict) else None
        if made_for not in (None, artefact.base_sha256):
            raise BaseMismatch(f"{origin}: the model was patched from the base tokenizer {str(made_for)[:12]}, "
                               f"{folder} is for {artefact.base_sha256[:12]}")
        return artefact, spec
    ids = IdMap(artefact.new_id_of, artefact.removed, artefact.base_vocab_size)

    def new_id(token: int | None, key: str) -> int | None:
        return None if token is None else ids(token, f"{origin}: {key}")

    ends = tuple(found for token in spec.eos_ids if (found := new_id(token, "eos_token_id")) is not None)
    return artefact, dataclasses.replace(spec, eos_ids=ends, bos_id=new_id(spec.bos_id, "bos_token_id"),
                                         pad_id=new_id(spec.pad_id, "pad_token_id"))


def check_weights(artefact: Artefact, weights: WeightSource) -> None:
    """Raise WrongRows, naming file and matrix, unless embedding and head have a row for each id."""
    for name in weights.names():
        if name.endswith(MATRICES):
            check_rows(artefact, weights.shape(name)[0], f"{weights.file_of(name)}: {name}")


def announce(artefact: Artefact, folder: Path, model: str | Path) -> None:
    """Log which artefact serves, once, and warn where nothing says that the model was made for one."""
    log.info("patched vocabulary %s (%s) from %s: %d ids, %d n-grams, %d removed; rho %s", artefact.sha256[:12],
             artefact.kind, folder, artefact.vocab_size, len(artefact.ngrams), len(artefact.removed),
             _ratios(artefact.meta))
    if _mark(model) is None:
        log.warning("%s does not say that this model was made for a patched vocabulary; its ids are taken for the "
                    "base's, and a model that was not made for this one talks nonsense", Path(model) / "config.json")


def _mark(model: str | Path) -> Any:
    """What config.json says of a patch; None = nothing."""
    return read_optional_object(Path(model) / "config.json").get(CONFIG_MARK)


def _ratios(meta: dict[str, Any]) -> str:
    """The recorded ratios of patched to base tokens, by domain."""
    domains = meta.get("statistics")
    found = {name: stats["rho"] for name, stats in domains.items()
             if isinstance(stats, dict) and isinstance(stats.get("rho"), float)} \
        if isinstance(domains, dict) else {}
    return ", ".join(f"{name[:80]} {ratio}" for name, ratio in found.items()) or "not recorded"
