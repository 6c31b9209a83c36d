"""A bundle with another chat template, one that knows tools."""

import hashlib
import json
import os
import shutil
from pathlib import Path

#: In the manner of Hermes and Qwen, in words of its own.
HERMES_TEMPLATE = """\
{%- if tools %}<|im_start|>system
You may call these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}A call is written so:
<tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.name }}: {{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def with_template(bundle: Path, target: Path, template: str = HERMES_TEMPLATE) -> Path:
    """The bundle at `target`, its files those of the other one but for the template."""
    shutil.copytree(bundle, target, copy_function=os.link)
    for name, content in (("chat_template.jinja", template.encode()), ("bundle.json", b"")):
        (target / name).unlink(missing_ok=True)
        (target / name).write_bytes(content)
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    size, digest = len(template.encode()), hashlib.sha256(template.encode()).hexdigest()
    manifest["files"]["chat_template.jinja"] |= {"bytes": size, "sha256": digest}
    (target / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return target
