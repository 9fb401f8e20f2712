"""The offline API on the real model: texts, chats, samples, stops; one call's requests do not disturb each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine import LLM, SamplingParams
from engine.core.errors import ConfigError, RequestError
from tests import models

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One engine for the module, float32 so that greedy runs are comparable."""
    with LLM(str(models.smollm2_dir()), dtype="float32", max_model_len=512, kv_pool_bytes=256 << 20) as made:
        yield made


def ask(llm: LLM, prompt: str, **params: object) -> object:
    """The first output of one prompt, greedy unless told otherwise."""
    rule = SamplingParams(**{"temperature": 0.0, **params})  # type: ignore[arg-type]
    return llm.generate([prompt], rule, use_tqdm=False)[0].outputs[0]


def test_chat_answers(llm: LLM) -> None:
    """The template, the tokenizer, the weights and the stop rule agree."""
    result = llm.chat(FRANCE, SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)[0]
    assert "Paris" in result.outputs[0].text
    assert result.outputs[0].finish_reason == "stop"


def test_batch_equals_alone(llm: LLM) -> None:
    """Prompts of one call answer as if each had been alone, in their order."""
    prompts = ["The sky is", "Once upon a time", "def add(a, b):", "Water boils at"]
    rule = SamplingParams(temperature=0.0, max_tokens=12)
    together = [result.outputs[0].text for result in llm.generate(prompts, rule, use_tqdm=False)]
    assert together == [ask(llm, prompt, max_tokens=12).text for prompt in prompts]


def test_samples_and_seeds(llm: LLM) -> None:
    """n samples differ from each other and repeat with the seed."""
    rule = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8)
    first, again = (llm.generate("My favourite animal is", rule, use_tqdm=False)[0] for _ in range(2))
    texts = [output.text for output in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [output.text for output in again.outputs]


def test_stop_string_cuts_text_and_ends_the_request(llm: LLM) -> None:
    """The stop string is not in the text, and nothing runs on behind it."""
    whole = ask(llm, "Count: one, two, three,", max_tokens=24)
    stop = whole.text[6:10]
    cut = ask(llm, "Count: one, two, three,", max_tokens=24, stop=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert not llm.engine.has_work or llm.engine.step() is not None


def test_min_tokens_and_ignore_eos(llm: LLM) -> None:
    """min_tokens keeps a chat going past its eos; ignore_eos runs to max_tokens."""
    short = llm.chat(FRANCE, SamplingParams(temperature=0.0, max_tokens=30), use_tqdm=False)[0].outputs[0]
    longer = SamplingParams(temperature=0.0, max_tokens=30, min_tokens=len(short.token_ids) + 5)
    assert len(llm.chat(FRANCE, longer, use_tqdm=False)[0].outputs[0].token_ids) > len(short.token_ids)
    on = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    assert len(llm.chat(FRANCE, on, use_tqdm=False)[0].outputs[0].token_ids) == 30


def test_bad_requests_name_the_value_and_run_nothing(llm: LLM) -> None:
    """Too long, empty, out of the vocabulary: a RequestError before anything runs."""
    steps = llm.engine.stats()["steps_total"]
    with pytest.raises(RequestError, match="600"):
        llm.generate([[5] * 600], use_tqdm=False)
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[]], use_tqdm=False)
    with pytest.raises(RequestError, match="49151"):
        llm.generate([[49152]], use_tqdm=False)
    with pytest.raises(RequestError, match="max_tokens=0"):
        SamplingParams(max_tokens=0)
    assert llm.engine.stats()["steps_total"] == steps


def test_settings_that_cannot_be_honoured_are_refused() -> None:
    """A CUDA backend on a CPU, a parallel degree that is not built, a length beyond the pool."""
    folder = str(models.smollm2_dir())
    for settings, named in (
        ({"attention_backend": "fa_vattn"}, "fa_vattn"),
        ({"tensor_parallel_size": 2}, "tensor-parallel-size"),
        ({"max_model_len": 4096, "kv_pool_bytes": 16 << 20}, "kv-pool-bytes"),
    ):
        with pytest.raises(ConfigError, match=named):
            LLM(folder, **settings)
