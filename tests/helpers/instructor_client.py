"""A program: asks a running server through `instructor`, in each of its modes that decode under a schema.

    python tests/helpers/instructor_client.py http://127.0.0.1:8000/v1 MODEL

It runs in an environment that has `instructor`, which the tests' own has not. The modes of tools need a bundle whose
chat template knows them (`with_template` of tool_bundle.py makes one).
"""

import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel

MODES = ("JSON_SCHEMA", "TOOLS", "TOOLS_STRICT")


class Answer(BaseModel):
    """A form to be filled in."""

    country: Literal["Japan", "France", "Chile"]
    sure: bool


def main(url: str, model: str) -> None:
    import instructor

    wanted: dict[str, Any] = {
        "model": model,
        "response_model": Answer,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Which country is Paris in?"}],
    }
    for mode in MODES:
        plain = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        print(f"{mode}: {client.chat.completions.create(**wanted, max_retries=0)!r}")
        *_, last = client.chat.completions.create_partial(**wanted)
        print(f"{mode}, streamed: {last!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
