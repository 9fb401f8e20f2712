"""Safetensors by name: exact values, and every kind of damage is one line that names file and reason."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.core.errors import LoadError
from engine.loading import open_weights
from engine.loading.safetensors_header import read_header, stored_dtype, write_file

INDEX = "model.safetensors.index.json"


def copy(folder: Path, to: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(folder, to / "copy")
    return to / "copy"


def test_every_tensor_is_what_safetensors_reads(llama_dir: Path, sharded_dir: Path) -> None:
    """Names, shapes, dtypes and bits, from one file and from shards."""
    for folder in (llama_dir, sharded_dir):
        wanted = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        with open_weights(folder) as weights:
            assert weights.names() == sorted(wanted)
            for name, tensor in wanted.items():
                found = weights.expect(name, tensor.shape)
                assert found.dtype == tensor.dtype and torch.equal(found, tensor) and name in weights
    assert len(list(sharded_dir.glob("*.safetensors"))) > 2
    assert stored_dtype(sharded_dir) == "bfloat16" and stored_dtype(llama_dir) == "float32"


def test_tensors_outlive_the_source(llama_dir: Path) -> None:
    """A tensor keeps its mapping; writing to it changes neither the file nor a second reading."""
    weights = open_weights(llama_dir)
    tensor = weights.get("model.norm.weight")
    before = tensor.clone()
    weights.close()
    weights.close()
    tensor.add_(1)
    with open_weights(llama_dir) as again:
        assert torch.equal(again.get("model.norm.weight"), before)


def test_missing_and_misshapen_tensors_are_named(llama_dir: Path) -> None:
    """The error has the tensor's name, and found and wanted shape."""
    with open_weights(llama_dir) as weights:
        with pytest.raises(LoadError, match=r"'model\.layers\.7\.x' is missing"):
            weights.get("model.layers.7.x")
        with pytest.raises(LoadError, match=r"'model\.norm\.weight' has shape \(64,\).*\(65,\)"):
            weights.expect("model.norm.weight", (65,))


def test_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    """R3: never torch.load; the message says how to convert."""
    with pytest.raises(LoadError, match=r"no \*\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(LoadError, match="can run code and are refused"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index, shards: shards[0].unlink(), "not in the folder"),
        (lambda index, shards: index.write_text('{"weight_map": {}}'), "weight_map"),
        (lambda index, shards: index.write_text('{"weight_map": {"a": "../x.safetensors"}}'), "not the name of"),
        (lambda index, shards: index.write_text('{"weight_map": {"a": "/etc/passwd"}}'), "not the name of"),
        (lambda index, shards: index.write_text('{"weight_map": {"a": 5}}'), "not the name of"),
        (lambda index, shards: index.write_text("{"), "not valid JSON"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, sharded_dir: Path, change: object, words: str) -> None:
    """Missing shards, paths out of the folder, tensors that are not where the index says."""
    folder = copy(sharded_dir, tmp_path)
    change(folder / INDEX, sorted(folder.glob("*.safetensors")))  # type: ignore[operator]
    with pytest.raises(LoadError, match=words):
        open_weights(folder)


def test_index_and_shard_must_agree(tmp_path: Path, sharded_dir: Path) -> None:
    """A tensor in another shard than promised, or in two, is refused by name."""
    folder = copy(sharded_dir, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, shard in index["weight_map"].items() if shard == first)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], moved: second}}))
    with pytest.raises(LoadError, match=f"{moved}.*says it is in there"):
        open_weights(folder)
    (folder / INDEX).write_text(json.dumps(index))
    save_file({**load_file(folder / second), moved: torch.zeros(1)}, folder / second)
    with pytest.raises(LoadError, match=f"{moved}.*also in"):
        open_weights(folder)


def test_truncation_is_found_before_anything_is_computed(tmp_path: Path, llama_dir: Path) -> None:
    """F17: at any length short of the whole, opening fails with the file's name and one line."""
    folder = copy(llama_dir, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(LoadError, match=r"model\.safetensors") as caught:
            open_weights(folder)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole + b"x")
    with pytest.raises(LoadError, match="header describes"):
        open_weights(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2],
                                                                            "data_offsets": [4, 12]}},
        {"a": {"dtype": "P8", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": 5},
        {"a": {}},
        [],
    ],
)  # fmt: skip
def test_sizes_that_lie(tmp_path: Path, header: object) -> None:
    """R22: products, offsets and overlaps are checked in Python integers against the file's length."""
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(LoadError):
        open_weights(tmp_path)


def test_flipped_bytes_in_the_header(tmp_path: Path, llama_dir: Path) -> None:
    """F17: 400 flips in the header: a LoadError, or another name for a tensor of the right size. Never a crash."""
    folder = copy(llama_dir, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(3)
    refused = 0
    for _ in range(400):
        raw = bytearray(whole)
        raw[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
        try:
            with open_weights(folder) as weights:
                for name in weights.names()[:3]:
                    weights.get(name)
        except LoadError as error:
            refused += 1
            assert "\n" not in str(error) and "model.safetensors" in str(error)
    assert refused > 200


def test_written_files_are_read_by_safetensors(tmp_path: Path) -> None:
    """Our streaming writer: what the library loads is what was given; a chunk of the wrong length is our error."""
    file = tmp_path / "model.safetensors"
    half = torch.randn(3, 5).to(torch.bfloat16)
    write_file(file, [("a", "F32", (2, 2)), ("b", "BF16", (3, 5)), ("empty", "F16", (0,))],
               [struct.pack("<4f", 1, 2, 3, 4), half.view(torch.int16).numpy().tobytes(), b""])  # fmt: skip
    found = load_file(file)
    assert torch.equal(found["a"], torch.tensor([[1.0, 2], [3, 4]])) and torch.equal(found["b"], half)
    assert found["empty"].shape == (0,) and set(read_header(file)) == {"a", "b", "empty"}
    with pytest.raises(ValueError, match="instead of 8"):
        write_file(file, [("a", "F32", (2,))], [b"1234"])


def test_only_get_needs_torch(llama_dir: Path) -> None:
    """Opening, names and shapes in a fresh interpreter leave torch alone (import floors)."""
    code = (
        f"import sys; from engine.loading import open_weights, read_config; read_config({str(llama_dir)!r})\n"
        f"assert open_weights({str(llama_dir)!r}).shape('model.norm.weight') == (64,)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
