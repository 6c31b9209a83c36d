"""A chat template is a stranger's code: whatever it does ends in its text or in one line, and in bounded time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from text_fixtures import SMOLLM2, tokenizer

from starling.engine.errors import BundleError, PromptError
from starling.engine.text.chat_template import ChatTemplates
from starling.engine.text.template_renderer import TemplateRefused, TemplateRenderer

SECONDS, MEMORY = 1.0, 2**28
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
USER = HELLO["messages"]
#: Each loops, or takes memory, in another way: by statements, one operation, a filter, a recursion, at compile time.
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 3**(10**9) }}",
    "{{ messages[0].content and 3**(10**9) }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'a\n'|indent(10**10) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ range(99999)|map('string')|map('center', 99999)|join|length }}",
    "{{ lipsum(n=10**7) }}",
    "{% macro a(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}{{ a(1) }}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "{{ ('a' * 9999)|replace('', 'b' * 9999)|replace('', 'b' * 9999) }}",
]


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(seconds=SECONDS, memory=MEMORY)
    yield made
    made.close()


@pytest.mark.parametrize("source", ENDLESS, ids=lambda source: source[:40])
def test_a_template_without_end_is_refused_and_the_next_one_runs(renderer: TemplateRenderer, source: str) -> None:
    with pytest.raises(TemplateRefused) as caught:
        renderer.render(source, HELLO, most=1000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1100
    assert renderer.render("{{ messages[0].content }}!", HELLO, most=1000) == "Hello!"


def test_a_template_without_end_to_its_compilation_is_refused(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateRefused, match=r"takes more than 1 s or 0\.25 GiB"):
        renderer.compile("{{ 3**(10**9) }}")
    for source, words in (("{{ (" + "(" * 99999, "default"), ("{% if %}", "line 1"), ("{{ x|none }}", "No filter")):
        with pytest.raises(BundleError, match=words):
            ChatTemplates({"default": source})


def test_a_text_that_is_too_long_is_not_handed_over(renderer: TemplateRenderer) -> None:
    assert renderer.render("{{ 'a' * 500 }}", HELLO, most=500) == "a" * 500
    with pytest.raises(TemplateRefused, match="501 characters, more than the 500"):
        renderer.render("{{ 'a' * 501 }}", HELLO, most=500)


def test_texts_come_back_as_they_were(renderer: TemplateRenderer) -> None:
    odd = "\x00\ud800 \n\u2028\U0001f600\r"
    assert renderer.render("{{ messages }}", {"messages": odd}, most=100) == odd
    value = {"a": [1, 1.5, None, True, {"b": "c"}]}
    assert renderer.render("{{ v|tojson }}", {"v": value}, most=100) == '{"a": [1, 1.5, null, true, {"b": "c"}]}'


def test_a_template_cannot_reach_the_pipes_nor_files(renderer: TemplateRenderer, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for source in (
        f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}",
        f"{{{{ lipsum.__globals__['os'].popen('touch {mark}').read() }}}}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as x %}",
    ):
        with pytest.raises(TemplateRefused):
            renderer.render(source, HELLO, most=10_000)
    assert not mark.exists()


def test_a_process_that_was_ended_is_started_again(renderer: TemplateRenderer) -> None:
    assert renderer.render("a", HELLO, most=9) == "a"
    process = renderer._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(TemplateRefused, match="ends the process"):
        renderer.render("b", HELLO, most=9)
    assert renderer.render("c", HELLO, most=9) == "c"


def test_a_forked_child_has_a_process_of_its_own(renderer: TemplateRenderer) -> None:
    assert renderer.render("a", HELLO, most=9) == "a"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, renderer.render("child", HELLO, most=9).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 9) == b"child"
    assert renderer.render("parent", HELLO, most=9) == "parent"
    os.close(read)
    os.close(write)


def test_threads_get_their_own_answers(renderer: TemplateRenderer) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for _ in range(20):
            text = renderer.render("{{ n }}", {"n": number}, most=9)
            if text != str(number):
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_messages_that_cannot_fit_are_refused_before_anything_is_made_of_them() -> None:
    known = tokenizer(SMOLLM2)
    # Were it rendered, the template would say so.
    templates = ChatTemplates({"default": "{{ raise_exception('rendered') }}"})
    most = 10 * known.longest_token
    with pytest.raises(PromptError, match="rendered"):
        templates.encode([{"role": "user", "content": "a" * (most - 4)}], known, limit=10)
    with pytest.raises(PromptError, match="more than 10 tokens can hold") as caught:
        templates.encode([{"role": "user", "content": "a" * most}], known, limit=10)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(PromptError, match="more than the"):
        ChatTemplates({"default": "{{ 'a' * 10000 }}"}).encode(USER, known, limit=10)
