"""LangChain's chat model and completion model: whole, streamed, several prompts, and several choices."""

import json
import os

from langchain_openai import ChatOpenAI, OpenAI

FACTS = json.loads(os.environ["STARLING_CLIENT"])
COMMON = {"base_url": f"{FACTS['url']}/v1", "api_key": "none", "model": FACTS["model"], "max_retries": 0}
LIMIT = FACTS["max_tokens"]

chat = ChatOpenAI(temperature=0, max_tokens=LIMIT, **COMMON)
question = FACTS["messages"][0]["content"]
answer = chat.invoke(question)
assert answer.content == FACTS["chat"], answer
assert answer.usage_metadata["output_tokens"] > 0, answer
assert "".join(piece.content for piece in chat.stream(question)) == FACTS["chat"]
assert [one.content for one in chat.batch([question] * 3)] == [FACTS["chat"]] * 3

# One request with all prompts, as LangChain sends them.
completion = OpenAI(temperature=0, max_tokens=LIMIT, **COMMON)
result = completion.generate(FACTS["prompts"])
assert [one[0].text for one in result.generations] == FACTS["texts"], result
assert "".join(completion.stream(FACTS["prompts"][0])) == FACTS["texts"][0]

several = OpenAI(temperature=1, max_tokens=LIMIT, n=2, best_of=2, seed=3, **COMMON).generate(FACTS["prompts"])
assert [len(one) for one in several.generations] == [2, 2], several
assert len({choice.text for one in several.generations for choice in one}) == 4
print("chat, stream, batch; two prompts, n 2")
