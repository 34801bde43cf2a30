// Calls with OpenAI's SDK for Node, as it is by default: with two retries of its own.
import OpenAI from "openai";
import { serve } from "./serving.mjs";

const asked = (prompt) => [{ role: "user", content: prompt }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", description: "Tell the weather.", parameters } }];
const schema = {
  type: "object",
  properties: { name: { type: "string" } },
  required: ["name"],
  additionalProperties: false,
};
const sdk = (url) => new OpenAI({ baseURL: url, apiKey: "none" });
const called = (message) => message.tool_calls.map((call) => [call.function.name, call.function.arguments]);

await serve({
  async chat(url, prompt) {
    const { choices } = await sdk(url).chat.completions.create({ model: "tiny", messages: asked(prompt) });
    return [choices[0].message.content, choices[0].finish_reason];
  },
  async stream(url, prompt) {
    let text = "";
    for await (const event of await sdk(url).chat.completions.create({ model: "tiny", messages: asked(prompt), stream: true }))
      for (const choice of event.choices) text += choice.delta.content ?? "";
    return text;
  },
  async tools(url, prompt) {
    const ask = { model: "tiny", messages: asked(prompt), tools, tool_choice: "required" };
    return called((await sdk(url).chat.completions.create(ask)).choices[0].message);
  },
  async streamed_tools(url, prompt) {
    const events = sdk(url).chat.completions.stream({ model: "tiny", messages: asked(prompt), tools });
    return called((await events.finalChatCompletion()).choices[0].message);
  },
  async structured(url, prompt) {
    const response_format = { type: "json_schema", json_schema: { name: "city", schema, strict: true } };
    const answer = await sdk(url).chat.completions.parse({ model: "tiny", messages: asked(prompt), response_format });
    return answer.choices[0].message.parsed ?? JSON.parse(answer.choices[0].message.content);
  },
  async embeddings(url, prompt) {
    return (await sdk(url).embeddings.create({ model: "tiny", input: [prompt, "Again."] })).data;
  },
  async responses(url, prompt) {
    return (await sdk(url).responses.create({ model: "tiny", input: prompt })).output_text;
  },
  async streamed_responses(url, prompt) {
    let text = "";
    for await (const event of await sdk(url).responses.create({ model: "tiny", input: prompt, stream: true }))
      if (event.type === "response.output_text.delta") text += event.delta;
    return text;
  },
  async leave(url, prompt) {
    for await (const event of await sdk(url).chat.completions.create({ model: "tiny", messages: asked(prompt), stream: true }))
      if (event.choices[0]?.delta.content) return event.choices[0].delta.content;
    return null;
  },
});
