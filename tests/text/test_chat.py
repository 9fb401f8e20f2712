"""Chat templates: the same text as transformers, and a sandbox that refuses instead of doing harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import LoadError, RequestError
from engine.tokenization import ChatTemplate, HfTokenizer, load_tokenizer
from tests.models import write_tiny_tokenizer
from tests.text.conftest import of_transformers, real

USER = {"role": "user", "content": "What is the capital of France? <b>&'\"</b> {{ 1 }} {% raw %}"}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Paris. 🙂"}, {"role": "user", "content": "  And Spain?\n"}],
)


@pytest.mark.parametrize("name", ["smollm2", "llama3", "llama3_2", "qwen2_5", "mistral_nemo", "deepseek_v3"])
def test_rendered_text_is_that_of_transformers(name: str) -> None:
    """Every conversation, with and without the generation prompt, equals apply_chat_template on the same folder."""
    ours, theirs = real(name), of_transformers(name)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render_chat(messages, prompt) == wanted
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert ours.encode(ours.render_chat(messages, prompt), add_special_tokens=False) == ids


def test_helpers_of_hugging_face_templates() -> None:
    """tojson without HTML escapes, strftime_now, loop controls, generation blocks, namespaces, block trimming."""
    source = (
        "{% set ns = namespace(n=0) %}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'skip' %}\n{% continue %}\n    {% endif %}\n"
        "    {% set ns.n = ns.n + 1 %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ ns.n }} {{ strftime_now('%Y') | length }} {{ tools is none }} {{ bos_token }}"
    )
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "<é>"}]
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(messages)
    assert rendered.split() == ['"<é>"1', "4", "True", "<s>"]  # the line end after a block belongs to the block
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([messages], chat_template=source, bos_token="<s>")
    assert theirs == [rendered]


def test_a_refusal_of_the_template_reaches_the_client() -> None:
    """raise_exception becomes a RequestError about `messages` with the template's words."""
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ ('%s' | attr('format')).__globals__.os }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__dict__ = 1 %}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as p %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' * 2000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ undefined_name.attribute }}",
        "{{ messages | nothing }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_harmful_or_failing_templates_are_refused(source: str) -> None:
    """Internals, mutation, loading, huge repetitions, endless recursion: an error of ours, quickly, and no effect."""
    messages = [dict(USER)]
    with pytest.raises((RequestError, LoadError)):
        ChatTemplate(source, {}).render(messages)
    assert messages == [USER]


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes without end is stopped by the number of characters."""
    monkeypatch.setattr("engine.tokenization.chat.MAX_RENDERED_CHARS", 10_000)
    template = ChatTemplate("{% for i in range(99999) %}{{ i }} {% endfor %}", {})
    with pytest.raises(RequestError, match="more than 10000 characters"):
        template.render([USER])


def test_messages_are_checked_and_never_changed(tiny: HfTokenizer) -> None:
    """Empty lists, non-objects, foreign objects and bottomless nesting are refused; None counts as absent."""
    deep: Any = "x"
    for _ in range(50):
        deep = [deep]
    for bad in ([], ["text"], [{"role": "user", "content": object()}], [{"role": "user", "content": deep}]):
        with pytest.raises(RequestError):
            tiny.render_chat(bad)  # type: ignore[arg-type]
    template = ChatTemplate("{{ messages[0].name is defined }}", {})
    assert template.render([{"role": "user", "name": None}]) == "False"


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    """chat_template.jinja wins over tokenizer_config.json; of a list, `default`; too long or broken is a LoadError."""
    write_tiny_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def put(value: object) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))

    put([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert load_tokenizer(tmp_path).render_chat([USER]) == "d"
    put("x" * 65537)
    with pytest.raises(LoadError, match="65536"):
        load_tokenizer(tmp_path)
    put("{% for %}")
    with pytest.raises(LoadError, match="cannot be compiled"):
        load_tokenizer(tmp_path)
    put(None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.render_chat([USER])
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).render_chat([USER]) == "from the file"
