// Vercel's AI SDK with one of its providers: OpenAI's (which asks /v1/responses, or chat completions), or any compatible API.
// @ts-check

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import {
  City,
  Place,
  QUESTION,
  SECOND_QUESTION,
  TEMPERATURE,
  TOOL_QUESTION,
  baseURL,
  model as id,
  report,
  way,
} from "./scenarios.mjs";

const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = { name: "corral", baseURL, apiKey: "none", includeUsage: true };
/** @type {Record<string, () => import("ai").LanguageModel>} */
const models = {
  "openai": () => openai(id),
  "openai.chat": () => openai.chat(id),
  "openai-compatible": () => createOpenAICompatible(compatible)(id),
  "openai-compatible with schemas": () => createOpenAICompatible({ ...compatible, supportsStructuredOutputs: true })(id),
};
const brief = { model: models[way](), temperature: 0, maxOutputTokens: 16, maxRetries: 0 };

const quiet = { onError: () => {} };

// Without schemas, a provider only asks for a JSON object, and the model decides which.
const structured =
  way === "openai-compatible"
    ? { prompt: 'Answer with {"capital": "Paris"}', output: Output.object({ schema: z.looseObject({}) }) }
    : { prompt: QUESTION, output: Output.object({ schema: City }) };

const weather = tool({ description: "How warm it is in a city.", inputSchema: Place, execute: async () => TEMPERATURE });
/** @type {Parameters<typeof generateText>[0] & Parameters<typeof streamText>[0]} */
const toolRequest = {
  ...brief,
  maxOutputTokens: 64,
  prompt: TOOL_QUESTION,
  tools: { weather },
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "weather" } : "none" }),
};

/** @param {import("ai").StepResult<any>[]} steps */
const called = ([first, second]) => ({
  name: first.toolCalls[0].toolName,
  arguments: first.toolCalls[0].input,
  finish_reason: first.finishReason,
  text: second.text,
  prompt_tokens: [first.usage.inputTokens, second.usage.inputTokens],
});

/**
 * Every part of a stream, which of itself would not throw an error.
 * @param {ReturnType<typeof streamText>} result
 */
async function* parts(result) {
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    yield part;
  }
}

await report({
  chat: async () => {
    const { text, usage } = await generateText({ ...brief, prompt: QUESTION });
    return { text, prompt_tokens: usage.inputTokens };
  },

  stream: async () => {
    const pieces = [];
    for await (const part of parts(streamText({ ...brief, ...quiet, prompt: QUESTION })))
      if (part.type === "text-delta") pieces.push(part.text);
    return { pieces };
  },

  structured: async () => {
    const { output } = await generateText({ ...brief, maxOutputTokens: 64, ...structured });
    return { value: output };
  },

  tool: async () => called((await generateText(toolRequest)).steps),

  streamed_tool: async () => {
    const result = streamText({ ...toolRequest, ...quiet });
    for await (const _ of parts(result));
    return called(await result.steps);
  },

  second_turn: async () => {
    const first = await generateText({ ...brief, prompt: QUESTION });
    const { text, usage } = await generateText({
      ...brief,
      messages: [
        { role: "user", content: QUESTION },
        ...first.response.messages,
        { role: "user", content: SECOND_QUESTION },
      ],
    });
    return { text, prompt_tokens: usage.inputTokens };
  },
});
