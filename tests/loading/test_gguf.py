"""GGUF in, Hugging Face folder out: the same numbers, names and ids, and damage is a LoadError."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.core.errors import LoadError
from engine.loading import open_weights, read_config
from engine.loading.gguf import GgufModel, convert, llama3_factors, to_bfloat16, unpermute
from engine.loading.gguf_file import GgufFile
from engine.loading.gguf_tokenizer import PRE_TOKENIZERS, rebuild_tokenizer
from engine.tokenization import load_tokenizer
from tests.loading.ggufs import permute, tokenizer_metadata, write_gguf
from tests.models import npm_tokenizer_dir, smollm2_dir, smollm2_gguf, tiny_llama_dir, tiny_qwen2_dir
from tests.text.test_tokenizer import TEXTS


def converted(path: Path, to: Path) -> Path:
    """convert() into a new folder."""
    folder = to / f"{path.stem}-converted"
    folder.mkdir()
    convert(path, folder)
    return folder


def assert_same_model(folder: Path, original: Path, tolerance: float) -> None:
    """Same tensors by name and shape; values within tolerance times the largest value of the tensor."""
    with open_weights(folder) as ours, open_weights(original) as theirs:
        assert ours.names() == theirs.names()
        for name in ours.names():
            found, wanted = ours.get(name).float(), theirs.get(name).float()
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), name


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), [
    ("F32", "float32", 0), ("F16", "float16", 1e-3), ("BF16", "bfloat16", 4e-3), ("Q8_0", "bfloat16", 1e-2),
    ("Q4_0", "bfloat16", 0.15), ("Q4_1", "bfloat16", 0.15), ("Q5_1", "bfloat16", 0.08),
])  # fmt: skip
def test_llama_comes_back(tmp_path: Path, llama_dir: Path, kind: str, dtype: str, tolerance: float) -> None:
    """Every stored type: q and k rows are put back in order, norms stay exact, config and tokenizer are complete."""
    folder = converted(write_gguf(tmp_path / "m.gguf", llama_dir, "llama", kind), tmp_path)
    spec, wanted = read_config(folder), read_config(llama_dir)
    for field in ("architecture", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "eps", "rope",
                  "tie", "max_positions", "qkv_bias", "eos_ids", "bos_id"):  # fmt: skip
        assert getattr(spec, field) == getattr(wanted, field), field
    assert spec.dtype == dtype
    assert_same_model(folder, llama_dir, tolerance)
    with open_weights(folder) as ours, open_weights(llama_dir) as theirs:
        assert torch.equal(ours.get("model.norm.weight"), theirs.get("model.norm.weight"))
    ours_text, theirs_text = load_tokenizer(folder), load_tokenizer(llama_dir)
    for text in (*TEXTS, "<|im_start|>user<|im_end|>"):
        assert ours_text.encode(text) == theirs_text.encode(text)
    assert ours_text.chat_template == "{{ messages[0].content }}"
    assert ours_text.special_ids == theirs_text.special_ids


def test_qwen2_and_tied_and_biased_variants(tmp_path: Path, qwen2_dir: Path) -> None:
    """qwen2 rows are not permuted; a missing output.weight means tied; Llama's biases are permuted like its rows."""
    assert_same_model(converted(write_gguf(tmp_path / "q.gguf", qwen2_dir, "qwen2"), tmp_path), qwen2_dir, 0)
    tied = tiny_qwen2_dir(tmp_path, seed=9, tie_word_embeddings=True)
    folder = converted(write_gguf(tmp_path / "t.gguf", tied, "qwen2"), tmp_path)
    assert read_config(folder).tie and "lm_head.weight" not in open_weights(folder)
    biased = tiny_llama_dir(tmp_path, seed=10, attention_bias=True, head_dim=32)
    folder = converted(
        write_gguf(tmp_path / "b.gguf", biased, "llama", llama__attention__key_length=32,
                   llama__rope__dimension_count=32), tmp_path)  # fmt: skip
    assert read_config(folder).qkv_bias and read_config(folder).head_dim == 32
    assert_same_model(folder, biased, 0)


def test_rope_scaling_of_every_kind(tmp_path: Path, llama_dir: Path) -> None:
    """linear (both spellings), yarn, and llama3 recovered from its factor tensor; other factors are refused."""
    def rope_of(name: str, **extra: Any) -> Any:
        return read_config(converted(write_gguf(tmp_path / f"{name}.gguf", llama_dir, "llama", **extra), tmp_path)).rope

    linear = rope_of("linear", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    old = rope_of("old", llama__rope__scale_linear=2.0)
    assert (old.kind, old.factor) == ("linear", 2.0)
    yarn = rope_of("yarn", llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0,
                   llama__rope__scaling__original_context_length=256)  # fmt: skip
    assert (yarn.kind, yarn.factor, yarn.original_positions) == ("yarn", 4.0, 256)
    parameters = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192}  # fmt: skip
    factors = llama3_factors(10000.0, 16, parameters)
    llama3 = rope_of("llama3", rope_freqs=factors)
    assert (llama3.kind, llama3.factor, llama3.original_positions) == ("llama3", 32.0, 8192)
    with pytest.raises(LoadError, match="rope_freqs"):
        rope_of("strange", rope_freqs=np.linspace(1, 32, 8))
    with pytest.raises(LoadError, match="'longrope' is not supported"):
        rope_of("long", llama__rope__scaling__type="longrope", llama__rope__scaling__factor=4.0)


def test_llama3_factors_are_those_of_transformers() -> None:
    """The factors divide the plain frequencies exactly as transformers' llama3 rope does."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(head_dim=128, hidden_size=4096, num_attention_heads=32, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_factors(500000.0, 128, parameters), theirs.numpy(), rtol=2e-6)


def test_bfloat16_rounds_as_torch_does() -> None:
    """Nearest even for every pattern of dropped bits, signs, subnormals, overflow to infinity; NaN stays NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([bits, [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x00000001, 0x80000000, 0x7F800000]])
    values = bits.astype(np.uint32).view(np.float32)
    wanted = torch.from_numpy(values.copy()).to(torch.bfloat16)
    found = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])


def test_unpermute_inverts_the_converter() -> None:
    """Rows of matrices and of biases come back for any number of heads."""
    for heads, width in ((1, 2), (3, 64), (9, 16)):
        rows = np.arange(heads * width * 5).reshape(heads * width, 5)
        assert np.array_equal(unpermute(permute(rows, heads), heads), rows)
        assert np.array_equal(unpermute(permute(rows[:, 0], heads), heads), rows[:, 0])


@pytest.mark.parametrize(
    ("name", "pre"),
    [("gpt2", "gpt-2"), ("llama3_2", "llama-bpe"), ("qwen2_5", "qwen2"),
     pytest.param("mistral_nemo", "tekken", marks=pytest.mark.slow)],
)  # fmt: skip
def test_byte_level_vocabularies_are_rebuilt(tmp_path: Path, name: str, pre: str) -> None:
    """A real vocabulary through GGUF metadata encodes as its own tokenizer.json, bos included."""
    source = npm_tokenizer_dir(name)
    original = load_tokenizer(source)
    metadata = tokenizer_metadata(json.loads((source / "tokenizer.json").read_text()), "gpt2", pre)
    if original.bos_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = original.bos_id
    rebuilt = rebuild(tmp_path, metadata, original.vocab_size)
    for text in TEXTS:
        for special in (True, False):
            assert rebuilt.encode(text, special) == original.encode(text, special), text
    for token in range(0, original.vocab_size, 37):
        assert rebuilt.token_bytes(token) == original.token_bytes(token)


def test_sentencepiece_vocabularies_are_rebuilt_from_scores(tmp_path: Path) -> None:
    """Merges made from the scores alone tokenise as the original merges (Mistral v1, 32,000 pieces)."""
    source = npm_tokenizer_dir("llama2")
    original = load_tokenizer(source)
    metadata = tokenizer_metadata(json.loads((source / "tokenizer.json").read_text()), "llama")
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    rebuilt = rebuild(tmp_path, metadata, original.vocab_size)
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
    for sample in (*TEXTS, text, text[::-1], "aaaa aaa  aaaaa" * 20):
        ids = original.encode(sample)
        assert rebuilt.encode(sample) == ids and rebuilt.decode(ids) == original.decode(ids)
    assert rebuilt.encode("x")[0] == 1 and rebuilt.eos_ids == (2,)


def rebuild(folder: Path, metadata: dict[str, Any], vocab: int) -> Any:
    """load_tokenizer over the rebuilt files."""
    files = rebuild_tokenizer(metadata, Path("test.gguf"), vocab, "llama")
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(files.tokenizer_config))
    (folder / "generation_config.json").write_text(json.dumps(files.generation_config))
    return load_tokenizer(folder)


def test_several_ends_of_text(tmp_path: Path, llama_dir: Path) -> None:
    """eos, eot and eom become the eos list."""
    path = write_gguf(tmp_path / "e.gguf", llama_dir, "llama", tokenizer__ggml__eot_token_id=3)
    assert read_config(converted(path, tmp_path)).eos_ids == (1, 3)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__dimension_count": 8}, "partial rotary"),
        ({"llama__attention__key_length": 32}, "partial rotary|has shape"),
        ({"llama__attention__head_count_kv": 4}, "already|twice|has shape|Duplicated"),
    ],
)
def test_models_that_are_not_supported(tmp_path: Path, llama_dir: Path, extra: dict[str, Any], words: str) -> None:
    """Refused by name, before anything is written."""
    try:
        path = write_gguf(tmp_path / "x.gguf", llama_dir, "llama", **extra)
    except ValueError:
        pytest.skip("the writer refuses the same key twice")
    with pytest.raises(LoadError, match=words):
        converted(path, tmp_path)
    assert not list((tmp_path / "x-converted").iterdir())


def test_an_unknown_pre_tokenizer_or_architecture_is_named(tmp_path: Path, llama_dir: Path) -> None:
    """The list of known ones is in the message."""
    metadata = GgufFile(write_gguf(tmp_path / "m.gguf", llama_dir, "llama")).metadata
    metadata["tokenizer.ggml.pre"] = "superbpe"
    with pytest.raises(LoadError, match=r"superbpe.*known: gpt-2.*Use this model's Hugging Face folder"):
        rebuild_tokenizer(metadata, Path("m.gguf"), 512, "llama")
    assert "smollm" in PRE_TOKENIZERS
    with pytest.raises(LoadError, match="'falcon' is not supported; supported: llama, qwen2"):
        GgufModel(write_gguf(tmp_path / "f.gguf", llama_dir, "falcon"))


def test_damaged_files_are_load_errors(tmp_path: Path, llama_gguf: Path) -> None:
    """R22: 500 flips in the header and cuts anywhere: converted or LoadError, in bounded time and memory."""
    whole = llama_gguf.read_bytes()
    header_end = min(tensor.begin for tensor in GgufFile(llama_gguf).tensors.values())
    rng = random.Random(1)
    file = tmp_path / "m.gguf"
    refused = 0
    for number in range(500):
        raw = bytearray(whole)
        if number % 5 == 0:
            raw = raw[: rng.choice((rng.randrange(64), rng.randrange(header_end), rng.randrange(len(raw))))]
        else:
            early = rng.random() < 0.5  # half of the flips in the first keys and the tensor table, where sizes are
            place = rng.randrange(700) if early else rng.randrange(header_end - 1600, header_end)
            raw[place] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
        folder = tmp_path / "out"
        folder.mkdir()
        try:
            convert(file, folder)
            read_config(folder)
            load_tokenizer(folder)
        except LoadError as error:
            refused += 1
            assert "\n" not in str(error)
        shutil.rmtree(folder)
    assert refused > 200


def test_declared_sizes_cannot_take_memory(tmp_path: Path) -> None:
    """Counts of 2**60 in a file of 100 bytes: refused at once, by name."""
    for body in (
        np.array([1 << 60, 0], np.uint64).tobytes(),
        np.array([0, 1 << 60], np.uint64).tobytes(),
        np.array([0, 1], np.uint64).tobytes() + np.array([1 << 60], np.uint64).tobytes(),
        np.array([0, 1, 1], np.uint64).tobytes() + b"k" + np.array([9, 4], np.uint32).tobytes()
        + np.array([1 << 50], np.uint64).tobytes(),
        np.array([0, 1, 1], np.uint64).tobytes() + b"k" + np.array([9, 8], np.uint32).tobytes()
        + np.array([1 << 20], np.uint64).tobytes(),
    ):  # fmt: skip
        file = tmp_path / "m.gguf"
        file.write_bytes(b"GGUF" + np.array([3], np.uint32).tobytes() + body + bytes(64))
        with pytest.raises(LoadError, match=r"m\.gguf"):
            GgufFile(file)
    file.write_bytes(b"GGUF" + np.array([1], np.uint32).tobytes() + bytes(64))
    with pytest.raises(LoadError, match="version 1"):
        GgufFile(file)


def test_smollm2_is_what_the_gguf_package_reads() -> None:
    """Names, metadata and every value before rounding against GGUFReader, and the folder on disk after rounding."""
    path = smollm2_gguf()
    reader = gguf.GGUFReader(path)
    model = GgufModel(path)
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(model.file.metadata)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert set(theirs) == set(model.file.tensors)
    with open_weights(smollm2_dir()) as weights:
        assert len(weights.names()) == len(theirs) == 272
        for tensor in model.tensors[::9]:
            source = theirs[tensor.source]
            values = gguf.dequantize(source.data, source.tensor_type)
            assert np.array_equal(model.values(tensor), unpermute(values, tensor.heads)), tensor.name
            rounded = torch.from_numpy(np.ascontiguousarray(model.values(tensor)))
            kind = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
            assert torch.equal(weights.get(tensor.name), rounded.to(kind))


@pytest.mark.slow
def test_smollm2_is_what_transformers_loads() -> None:
    """All 272 tensors before rounding are bitwise those of transformers' own GGUF loader (12 s), and text without
    digits has the same ids. (That loader leaves out the cut into single digits that SmolLM2's tokenizer makes.)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_gguf()
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = reference.state_dict()
    model = GgufModel(path)
    for tensor in model.tensors:
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(model.values(tensor))), state[tensor.name])
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(smollm2_dir())
    for text in TEXTS:
        if not any(char.isdigit() for char in text):
            assert ours.encode(text) == theirs(text).input_ids
