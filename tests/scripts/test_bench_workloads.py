"""The benchmarks' workloads are the ones the peer's figures were measured with, and stay so."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest

from engine.loading.spec import read_config
from engine.models import models
from engine.tokenization import load_tokenizer
from scripts.benching import shapes, workloads

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT.parent / "shared/reference/workloads.py"
PUBLISHED = {
    "offline_chat": (workloads.find("offline_chat"), "a8b9ce58011503aa"),
    "offline_long": (workloads.find("offline_long"), "d4e0782cae01a0db"),
    "decode_heavy": (workloads.find("decode_heavy"), "4e92742b45c7c1ba"),
    "online_mixed(8, 20)": (workloads.find("online_mixed", rate=8, seconds=20), "4174008c891e4671"),
    "online_mixed(12, 20)": (workloads.find("online_mixed", rate=12, seconds=20), "b343fceba0e183c7"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_and_arrivals_are_recorded(name: str) -> None:
    """Digests of ours: another numpy, or a hasty edit, must not change what is measured."""
    workload, digest = PUBLISHED[name]
    text = ";".join(f"{arrival!r},{prompt},{output}" for arrival, prompt, output in workload.items)
    assert workload.name == name and hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the published workloads are not beside this checkout")
@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_and_arrivals_are_the_published_ones(name: str) -> None:
    """Request by request."""
    spec = importlib.util.spec_from_file_location("reference_workloads", REFERENCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function, _, arguments = name.partition("(")
    numbers = [float(part) for part in arguments.rstrip(")").split(",") if part]
    assert list(PUBLISHED[name][0].items) == getattr(module, function)(*numbers)


def test_names_say_what_was_cut() -> None:
    """A record of a part can never be taken for the whole."""
    small = workloads.find("offline_chat", requests=3, shrink=4)
    assert small.name == "offline_chat[:3]/4" and len(small.items) == 3
    assert workloads.find("2x5+7").items == (workloads.Item(0.0, 5, 7),) * 2
    assert workloads.find("2x1+1", shrink=100).items[0] == (0.0, 1, 1)
    assert workloads.find("2x5+7", requests=9).name == "2x5+7"
    single = workloads.find("single_stream")
    assert (single.prompt_tokens, single.output_tokens, single.longest_tokens) == (512, 256, 768)


@pytest.mark.parametrize(
    ("name", "options"),
    [("chat", {}), ("0x5+7", {}), ("5x7", {}), ("online_mixed", {"rate": 0.0}), ("2x5+7", {"shrink": 0}),
     ("online_mixed", {"rate": 0.001, "seconds": 0.001})],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(name: str, options: dict[str, float]) -> None:
    """With what is known."""
    with pytest.raises(ValueError, match=r"known|above 0|no request"):
        workloads.find(name, **options)  # type: ignore[arg-type]


def test_prompts_are_random_seeded_and_inside_the_vocabulary() -> None:
    """No benchmark of zeros."""
    workload = workloads.find("4x300+1")
    prompts = workloads.random_prompts(workload, 512)
    assert prompts == workloads.random_prompts(workload, 512) != workloads.random_prompts(workload, 512, seed=1)
    ids = [token for prompt in prompts for token in prompt]
    assert len(set(ids)) > 400 and 0 <= min(ids) and max(ids) < 512 and prompts[0] != prompts[1]


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_is_one_the_engine_can_build(name: str, tmp_path: Path) -> None:
    """Its config.json is accepted, its architecture known."""
    spec = read_config(shapes.write_folder(name, tmp_path), known=models.names())
    assert spec.vocab == shapes.SHAPES[name]["vocab_size"] and spec.heads % spec.kv_heads == 0


def test_a_shape_s_tokenizer_has_one_word_an_id(tmp_path: Path) -> None:
    """So that a streamed answer has an event for each token."""
    tokenizer = load_tokenizer(shapes.write_folder("tiny", tmp_path))
    texts = [tokenizer.decode([token]) for token in range(512)]
    assert len(set(texts)) == 512 and all(text.strip().isascii() and text.strip() for text in texts)
    with pytest.raises(ValueError, match="llama3-8b"):
        shapes.write_folder("llama3-9b", tmp_path)
