"""LiteLLM as a client of an OpenAI-compatible server: chat and text completions, whole and streamed."""

import json
import os

import litellm

FACTS = json.loads(os.environ["STARLING_CLIENT"])
COMMON = {"api_base": f"{FACTS['url']}/v1", "api_key": "none", "temperature": 0, "max_tokens": FACTS["max_tokens"]}

model = f"openai/{FACTS['model']}"
reply = litellm.completion(model=model, messages=FACTS["messages"], **COMMON)
assert reply.choices[0].message.content == FACTS["chat"], reply
assert reply.usage.completion_tokens > 0
pieces = litellm.completion(model=model, messages=FACTS["messages"], stream=True, **COMMON)
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == FACTS["chat"]
choices = litellm.completion(model=model, messages=FACTS["messages"], n=2, **COMMON).choices
assert [choice.message.content for choice in choices] == [FACTS["chat"]] * 2

text_model = f"text-completion-openai/{FACTS['model']}"
result = litellm.text_completion(model=text_model, prompt=FACTS["prompts"], **COMMON)
assert [choice.text for choice in result.choices] == FACTS["texts"], result
refusal = ""
try:
    litellm.completion(model=model, messages=FACTS["messages"], **COMMON | {"temperature": -1})
except litellm.BadRequestError as error:
    refusal = str(error)
assert "temperature" in refusal, refusal
print("chat, stream, n 2; two prompts; a refusal")
