// Runs scenarios with Ollama's own package, and prints one line of JSON for each.
//
//     node run.mjs SCENARIOS HOST

import { readFileSync } from "node:fs";
import { Ollama } from "ollama";

async function perform(client, { method, request }) {
  try {
    const answer = await client[method](request);
    if (!request.stream) return { answer };
    const parts = [];
    for await (const part of answer) parts.push(part);
    return { parts };
  } catch (error) {
    return { error: { status: error.status_code ?? null, text: error.message } };
  }
}

const [file, host] = process.argv.slice(2);
const client = new Ollama({ host });
for (const scenario of JSON.parse(readFileSync(file, "utf8"))) {
  const result = await perform(client, scenario);
  console.log(JSON.stringify({ name: scenario.name, ...result }));
}
