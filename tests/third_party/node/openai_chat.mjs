// OpenAI's own package for Node, chat completions.
// @ts-check

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { City, Place, QUESTION, SECOND_QUESTION, TEMPERATURE, TOOL_QUESTION, baseURL, model, report } from "./scenarios.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const weather = zodFunction({ name: "weather", parameters: Place, description: "How warm it is in a city." });
/** @typedef {OpenAI.Chat.Completions.ChatCompletionMessageParam} Message */

/** @param {Message[]} messages */
const chat = async (messages) => {
  const completion = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 16 });
  return { text: completion.choices[0].message.content, prompt_tokens: completion.usage?.prompt_tokens };
};

/**
 * The tool's result goes back with the message that called it.
 * @param {OpenAI.Chat.Completions.ChatCompletion} completion
 */
const answered = async (completion) => {
  const { message } = completion.choices[0];
  const [call] = message.tool_calls ?? [];
  if (call?.type !== "function") throw new Error(`no call in ${JSON.stringify(completion)}`);
  const final = await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: TOOL_QUESTION }, message, { role: "tool", tool_call_id: call.id, content: TEMPERATURE }],
    tools: [weather],
    tool_choice: "none",
    temperature: 0,
    max_tokens: 16,
  });
  return {
    name: call.function.name,
    arguments: JSON.parse(call.function.arguments),
    finish_reason: completion.choices[0].finish_reason,
    text: final.choices[0].message.content,
    prompt_tokens: [completion.usage?.prompt_tokens, final.usage?.prompt_tokens],
  };
};

/** @type {OpenAI.Chat.Completions.ChatCompletionCreateParams} */
const toolRequest = {
  model,
  messages: [{ role: "user", content: TOOL_QUESTION }],
  tools: [weather],
  tool_choice: { type: "function", function: { name: "weather" } },
  temperature: 0,
  max_tokens: 64,
};

await report({
  chat: () => chat([{ role: "user", content: QUESTION }]),

  stream: async () => {
    const stream = await client.chat.completions.create({
      model,
      messages: [{ role: "user", content: QUESTION }],
      temperature: 0,
      max_tokens: 16,
      stream: true,
    });
    const pieces = [];
    for await (const chunk of stream) pieces.push(chunk.choices[0]?.delta.content ?? "");
    return { pieces: pieces.filter(Boolean) };
  },

  structured: async () => {
    const completion = await client.chat.completions.parse({
      model,
      messages: [{ role: "user", content: QUESTION }],
      response_format: zodResponseFormat(City, "city"),
      temperature: 0,
      max_tokens: 64,
    });
    return { value: completion.choices[0].message.parsed };
  },

  tool: async () => answered(await client.chat.completions.create({ ...toolRequest, stream: false })),

  streamed_tool: async () => {
    const stream = client.chat.completions.stream({ ...toolRequest, stream: true, stream_options: { include_usage: true } });
    return answered(await stream.finalChatCompletion());
  },

  second_turn: async () => {
    const { text } = await chat([{ role: "user", content: QUESTION }]);
    return chat([
      { role: "user", content: QUESTION },
      { role: "assistant", content: text },
      { role: "user", content: SECOND_QUESTION },
    ]);
  },
});
