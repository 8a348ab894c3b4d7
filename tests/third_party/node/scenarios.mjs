// What every client of this folder is asked, and the one JSON object that it prints: an answer for each scenario.
// @ts-check

import { z } from "zod";

export const QUESTION = "What is the capital of France?";
export const SECOND_QUESTION = "And of Italy?";
export const TOOL_QUESTION = "How warm is it in Paris?";
export const TEMPERATURE = "18 degrees";

// Closed sets of values: any model finishes them within few tokens.
export const City = z.object({ name: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });
export const Place = z.object({ city: z.enum(["Paris", "Rome"]) });

/** Address and model ids of the server under test, and which of the client's ways to use. */
export const [baseURL, model, way] = process.argv.slice(2);

/**
 * Runs each scenario, whatever became of those before it.
 * @param {Record<string, () => Promise<unknown>>} scenarios
 */
export async function report(scenarios) {
  /** @type {Record<string, unknown>} */
  const answers = {};
  for (const [name, scenario] of Object.entries(scenarios)) {
    try {
      answers[name] = await scenario();
    } catch (error) {
      answers[name] = { error: String(error instanceof Error ? error.stack : error) };
    }
  }
  console.log(JSON.stringify(answers));
}
