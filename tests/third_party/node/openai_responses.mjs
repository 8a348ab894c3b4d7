// OpenAI's own package for Node, the Responses API.
// @ts-check

import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { City, Place, QUESTION, SECOND_QUESTION, TEMPERATURE, TOOL_QUESTION, baseURL, model, report } from "./scenarios.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const weather = zodResponsesFunction({ name: "weather", parameters: Place, description: "How warm it is in a city." });
const brief = { model, temperature: 0, max_output_tokens: 16 };

/**
 * The tool's result continues the stored response that called it.
 * @param {OpenAI.Responses.Response} response
 */
const answered = async (response) => {
  const call = response.output.find((item) => item.type === "function_call");
  if (call?.type !== "function_call") throw new Error(`no call in ${JSON.stringify(response)}`);
  const final = await client.responses.create({
    ...brief,
    previous_response_id: response.id,
    input: [{ type: "function_call_output", call_id: call.call_id, output: TEMPERATURE }],
    tools: [weather],
    tool_choice: "none",
  });
  return {
    name: call.name,
    arguments: JSON.parse(call.arguments),
    finish_reason: response.status,
    text: final.output_text,
    prompt_tokens: [response.usage?.input_tokens, final.usage?.input_tokens],
  };
};

/** @type {OpenAI.Responses.ResponseCreateParams} */
const toolRequest = {
  model,
  input: TOOL_QUESTION,
  tools: [weather],
  tool_choice: { type: "function", name: "weather" },
  temperature: 0,
  max_output_tokens: 64,
};

await report({
  chat: async () => {
    const response = await client.responses.create({ ...brief, input: QUESTION });
    return { text: response.output_text, prompt_tokens: response.usage?.input_tokens };
  },

  stream: async () => {
    const pieces = [];
    for await (const event of await client.responses.create({ ...brief, input: QUESTION, stream: true }))
      if (event.type === "response.output_text.delta") pieces.push(event.delta);
    return { pieces };
  },

  structured: async () => {
    const response = await client.responses.parse({
      model,
      input: QUESTION,
      text: { format: zodTextFormat(City, "city") },
      temperature: 0,
      max_output_tokens: 64,
    });
    return { value: response.output_parsed };
  },

  tool: async () => answered(await client.responses.create({ ...toolRequest, stream: false })),

  streamed_tool: async () => answered(await client.responses.stream({ ...toolRequest, stream: true }).finalResponse()),

  second_turn: async () => {
    const first = await client.responses.create({ ...brief, input: QUESTION });
    const second = await client.responses.create({ ...brief, previous_response_id: first.id, input: SECOND_QUESTION });
    return { text: second.output_text, prompt_tokens: second.usage?.input_tokens };
  },
});
