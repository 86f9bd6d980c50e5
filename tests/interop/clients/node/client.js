// @ts-check
/** Runs the scenarios of one file against the servers of another: see ../../README.md. */
import { readFile } from 'node:fs/promises';
import { toJson } from './protocol.js';
import { runScenario } from './scenario.js';

const [scenarios, servers] = await Promise.all(
  process.argv.slice(2, 4).map(async (file) => JSON.parse(await readFile(file, 'utf8'))),
);
for (const scenario of scenarios) console.log(toJson(await runScenario(scenario, servers)));
