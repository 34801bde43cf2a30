// Calls with Vercel's AI SDK, as it is by default: with two retries of its own, which do not know `x-should-retry`.
import { createOpenAI } from "@ai-sdk/openai";
import { embedMany, generateText, jsonSchema, Output, streamText, tool } from "ai";
import { serve } from "./serving.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = (url) => createOpenAI({ baseURL: url, apiKey: "none" });
const model = (url) => provider(url).chat("tiny");
const city = (name) =>
  jsonSchema({
    type: "object",
    properties: { [name]: { type: "string" } },
    required: [name],
    additionalProperties: false,
  });
const tools = { weather: tool({ description: "Tell the weather.", inputSchema: city("city") }) };
const called = (calls) => calls.map((call) => [call.toolName, call.input]);

// The text of a stream; its failure is thrown, as a careful program does.
async function textOf(stream) {
  let text = "";
  for await (const part of stream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "error") throw part.error;
  }
  return text;
}

await serve({
  async chat(url, prompt) {
    const { text, finishReason } = await generateText({ model: model(url), prompt });
    return [text, finishReason];
  },
  stream: (url, prompt) => textOf(streamText({ model: model(url), prompt, onError() {} }).fullStream),
  async tools(url, prompt) {
    return called((await generateText({ model: model(url), prompt, tools, toolChoice: "required" })).toolCalls);
  },
  async streamed_tools(url, prompt) {
    const answer = streamText({ model: model(url), prompt, tools, onError() {} });
    await textOf(answer.fullStream);
    return called(await answer.toolCalls);
  },
  async structured(url, prompt) {
    const output = Output.object({ schema: city("name") });
    return (await generateText({ model: model(url), prompt, output })).output;
  },
  async embeddings(url, prompt) {
    return (await embedMany({ model: provider(url).embedding("tiny"), values: [prompt, "Again."] })).embeddings;
  },
  async responses(url, prompt) {
    return (await generateText({ model: provider(url)("tiny"), prompt })).text;
  },
  streamed_responses: (url, prompt) => textOf(streamText({ model: provider(url)("tiny"), prompt, onError() {} }).fullStream),
  async leave(url, prompt) {
    const leaving = new AbortController();
    const answer = streamText({ model: model(url), prompt, abortSignal: leaving.signal, onError() {} });
    for await (const part of answer.fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "text-delta" && part.text) {
        leaving.abort();
        return part.text;
      }
    }
    return null;
  },
});
