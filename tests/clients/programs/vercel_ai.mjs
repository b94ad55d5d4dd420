// Vercel's AI SDK: generateText and streamText, a tool, an object by a schema.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
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

const inputSchema = z.object({ city: z.enum(["Rome", "Paris"]) });
const weather = tool({ description: "The weather in a city.", inputSchema, execute: async ({ city }) => `Sunny in ${city}` });
const asked = { model, prompt: "How is the weather in Rome?", maxOutputTokens: 400 };
const called = await generateText({ ...asked, tools: { weather }, toolChoice: "required" });
assert.ok(called.toolResults.length);
const streamed = streamText({ ...asked, tools: { weather }, toolChoice: "required" });
await streamed.consumeStream();
assert.ok((await streamed.toolCalls).every((call) => call.toolName === "weather"));

const { output } = await generateText({ ...asked, output: Output.object({ schema: inputSchema }) });
assert.ok(["Rome", "Paris"].includes(output.city));
