// OpenAI's client for JavaScript: chat and completions, whole and streamed, several prompts and choices, a refusal.
import assert from "node:assert/strict";
import OpenAI from "openai";

const facts = JSON.parse(process.env.STARLING_CLIENT);
const client = new OpenAI({ baseURL: `${facts.url}/v1`, apiKey: "none", maxRetries: 0 });
const common = { model: facts.model, temperature: 0, max_tokens: facts.max_tokens };
const { messages, prompts, texts } = facts;

const chat = await client.chat.completions.create({ ...common, messages, n: 2 });
assert.deepEqual(chat.choices.map((choice) => choice.message.content), [facts.chat, facts.chat]);
assert.ok(chat.usage.completion_tokens > 0);

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...common, messages, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, facts.chat);

const completion = await client.completions.create({ ...common, prompt: prompts });
assert.deepEqual(completion.choices.map((choice) => choice.text), texts);

// The connection ends before the answer does.
const stream = await client.completions.create({ ...common, prompt: prompts[0], max_tokens: 900, stream: true });
for await (const chunk of stream) {
  assert.equal(chunk.choices[0].index, 0);
  break;
}
await assert.rejects(
  () => client.chat.completions.create({ ...common, messages, temperature: -1 }),
  (error) => error.status === 400 && error.param === "temperature",
);
assert.deepEqual((await client.models.list()).data.map((model) => model.id), [facts.model]);
console.log("chat with n 2, stream, two prompts, an ended stream, a refusal, models");
