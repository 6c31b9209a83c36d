"""Chat templates put together by chance are rendered or refused, within their time and memory."""

from __future__ import annotations

import random
import time
from collections import Counter

from starling.engine.text.template_renderer import TemplateRefused, TemplateRenderer

SECONDS, MEMORY, MOST = 1.0, 2**28, 100_000
SCOPE = {"messages": [{"role": "user", "content": "Hello"}] * 3, "bos_token": "<s>", "tools": None, "n": 3}
_ATOMS = (
    *(
        "messages",
        "messages[0]",
        "messages[0].content",
        "bos_token",
        "tools",
        "n",
        "undefined",
        "loop",
        "self",
        "1",
        "0",
    ),
    *(
        "'a'",
        "'\\ud800'",
        "99999",
        "10**9",
        "-1",
        "1.5",
        "none",
        "true",
        "[]",
        "{}",
        "[1, 2]",
        "range(99999)",
        "namespace()",
    ),
    *("cycler('a')", "joiner()", "lipsum(n=99)", "dict(a=1)", "raise_exception", "strftime_now('%Y')", "''.__class__"),
)
_OPERATORS = ("+", "-", "*", "**", "/", "//", "%", "~", "in", "and", "or", "==", "<", "is")
_FILTERS = (
    *(
        "length",
        "list",
        "string",
        "upper",
        "tojson",
        "join",
        "join('x')",
        "center(99999)",
        "indent(999)",
        "first",
        "last",
    ),
    *(
        "replace('a', 'b' * 999)",
        "map(attribute='content')",
        "selectattr('role')",
        "sort",
        "unique",
        "reverse",
        "sum",
        "int",
    ),
    *(
        "batch(2)",
        "groupby('role')",
        "wordwrap(1)",
        "truncate(3)",
        "urlize",
        "format(1)",
        "attr('__class__')",
        "pprint",
    ),
    *(
        "trim",
        "default('x')",
        "items",
        "float",
        "abs",
        "random",
        "max",
        "xmlattr",
        "striptags",
        "filesizeformat",
        "escape",
    ),
)


def test_templates(rounds: int) -> None:
    renderer = TemplateRenderer(seconds=SECONDS, memory=MEMORY)
    counts: Counter[str] = Counter()
    longest, message = 0.0, 0
    try:
        for number in range(500 * rounds):
            source = _template(random.Random(number), 3)
            begin = time.monotonic()
            try:
                counts["rendered"] += len(renderer.render(source, SCOPE, most=MOST)) <= MOST
            except TemplateRefused as error:
                counts["ended" if "takes more than" in str(error) else "refused"] += 1
                message = max(message, len(str(error)))
            longest = max(longest, time.monotonic() - begin)
        assert renderer.render("{{ n }}", SCOPE, most=MOST) == "3"
    finally:
        renderer.close()
    print(f"\ntemplates: {sum(counts.values())} inputs, longest {longest:.1f} s, {dict(counts)}")
    assert sum(counts.values()) == 500 * rounds
    assert counts["rendered"] > 50 * rounds
    assert counts["refused"] > 50 * rounds
    assert longest < 10
    assert message < 2000


def _template(draw: random.Random, depth: int) -> str:
    choice = draw.randrange(8) if depth else 7
    inner = _template(draw, depth - 1) if choice < 7 else ""
    parts = {
        0: f"{{% for i in {_expression(draw, 2)} %}}{inner}{{% endfor %}}",
        1: f"{{% if {_expression(draw, 2)} %}}{inner}{{% else %}}x{{% endif %}}",
        2: f"{{% set x = {_expression(draw, 2)} %}}{inner}{{{{ x }}}}",
        3: f"{{% set x %}}{inner}{{% endset %}}{{{{ x ~ x ~ x }}}}",
        4: f"{{% macro m(a) %}}{inner}{{% endmacro %}}{{{{ m({_expression(draw, 1)}) }}}}",
        5: f"{{% filter {draw.choice(_FILTERS)} %}}{inner}{{% endfilter %}}",
        6: f"{inner}{inner}{{# c #}}{{% generation %}}{inner}{{% endgeneration %}}",
        7: f"{{{{ {_expression(draw, 3)} }}}}",
    }
    text = parts[choice]
    if draw.random() < 0.05:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(("{{", "%}", "{%", "'", "\x00", "\ud800", "{% raw %}")) + text[at:]
    return text


def _expression(draw: random.Random, depth: int) -> str:
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(_ATOMS)
    left = _expression(draw, depth - 1)
    if draw.random() < 0.5:
        return f"({left})|{draw.choice(_FILTERS)}"
    return f"({left} {draw.choice(_OPERATORS)} {_expression(draw, depth - 1)})"
