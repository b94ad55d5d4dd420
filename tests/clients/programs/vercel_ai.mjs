// Vercel's AI SDK: generateText and streamText, a tool in several steps, an object by a schema.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, isStepCount, Output, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "octavo", baseURL: `${url}/v1`, supportsStructuredOutputs: true, includeUsage: true });
const model = provider(name);
const short = { model, prompt: "How is the weather in Rome?", maxOutputTokens: 16, temperature: 0 };

const whole = await generateText(short);
let text = "";
const stream = streamText(short);
for await (const piece of stream.textStream) text += piece;
assert.equal(text, whole.text);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

// The first step must call; a step after it has the result, and answers.
const inputSchema = z.object({ city: z.enum(["Rome", "Paris"]) });
const weather = tool({ description: "The weather in a city.", inputSchema, execute: async ({ city }) => `Sunny in ${city}` });
const agent = {
  model,
  prompt: "How is the weather in Rome?",
  tools: { weather },
  stopWhen: isStepCount(3),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  maxOutputTokens: 100,
  providerOptions: { octavo: { parallel_tool_calls: false } },
};
const check = (steps) => {
  assert.equal(steps.length, 2);
  assert.equal(steps[0].finishReason, "tool-calls");
  assert.match(String(steps[0].toolResults[0].output), /^Sunny in (Rome|Paris)$/);
  assert.ok(steps[1].text);
};
check((await generateText(agent)).steps);
const streamed = streamText(agent);
await streamed.consumeStream();
check(await streamed.steps);

const { output } = await generateText({ model, prompt: "How is the weather in Rome?", output: Output.object({ schema: inputSchema }), maxOutputTokens: 400 });
assert.ok(["Rome", "Paris"].includes(output.city));
