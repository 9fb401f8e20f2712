"""scripts.vocabulary_*: which prompts are served, how scores are compared, which trials a sweep makes."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from engine.core.errors import ConfigError
from scripts.vocabulary_figures import PROMPT_CHARS, compare, means_of_passes, prompts_of
from scripts.vocabulary_sweep import Trial, table, trials_of

DOCUMENTS = [" ".join(f"{name}{index}" for index in range(400)) for name in ("one", "two", "three")] + ["short text"]


def test_prompts_are_pieces_of_documents_between_words() -> None:
    """Openings first, then pieces from further in that do not overlap; short documents give none."""
    prompts = prompts_of(DOCUMENTS, 6)
    assert len(set(prompts)) == 6 and [prompt.split()[0] for prompt in prompts[:3]] == ["one0", "two0", "three0"]
    for prompt, document in zip(prompts, DOCUMENTS[:3] * 2):
        assert f" {prompt} " in f" {document} " and PROMPT_CHARS - 20 < len(prompt) <= PROMPT_CHARS
    with pytest.raises(ConfigError, match="1000 requests are wanted"):
        prompts_of(DOCUMENTS, 1000)


def test_models_are_compared_on_the_same_documents() -> None:
    """A model that needs a tenth more bits of each document is a tenth worse, however documents differ."""
    plain = [100.0, 300.0, 500.0, 40.0]
    scores = {"plain, tuned": plain, "patched, tuned": [bits * 1.1 for bits in plain]}
    found = compare(scores, DOCUMENTS)
    assert list(found["patched over plain"].values()) == pytest.approx([1.1] * 3)
    assert found["plain, tuned"]["low"] < found["plain, tuned"]["value"] == sum(plain) / sum(map(len, DOCUMENTS))


def test_losses_are_averaged_by_pass() -> None:
    """A pass that was cut is the mean of what there is of it."""
    assert means_of_passes([3.0, 1.0, 2.0, 4.0, 7.0], 2.5) == [2.0, 3.0, 7.0]
    assert means_of_passes([3.0, 1.0], 0.5) == [2.0]


def test_a_sweep_tries_both_models() -> None:
    """With every setting, and shows them side by side; a failed one stays in the table."""
    trials = list(trials_of(["1:5e-4:1", "15:3e-4:4"]))
    assert trials[2:] == [Trial("patched", 15, 3e-4, 4.0), Trial("plain", 15, 3e-4, 4.0)]
    bits = (1.1, 1.0, None, 1.0)
    rows = [{**asdict(trial), "bits_per_byte": each, "tokens_per_s": 7} for trial, each in zip(trials, bits)]
    lines = table(rows).splitlines()
    assert len(lines) == 3 and "1.1000   1.0000   1.1000" in lines[1] and "None" in lines[2]
    with pytest.raises(ConfigError, match="'1:2' is not of the form"):
        list(trials_of(["1:2"]))
