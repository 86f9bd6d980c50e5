// @ts-check
/** Runs the steps of a scenario. */
import { setTimeout as sleep } from 'node:timers/promises';
import { Session } from './session.js';

/**
 * @typedef {import('./result.js').Result} Result
 * @typedef {Record<string, any>} Step
 * @typedef {{name: string, server: string, token?: string, keepalive_seconds?: number,
 *   steps: Step[]}} Scenario
 */

const STATUS_INTERVAL_MS = 20;
const UNTIL_STATUS_MS = 20_000;

/** @type {Record<string, (session: Session, step: Step) => Promise<Result | {}>>} */
const operations = {
  async call(session, step) {
    const { result } = begin(session, step);
    return step.watch_status ? watchStatus(session, result) : result;
  },

  async start(session, step) {
    const call = begin(session, step);
    session.started[step.as] = call;
    await call.untilMessages(step.until_messages ?? 0);
    return {};
  },

  async cancel({ started }, step) {
    started[step.of].cancel();
    return started[step.of].result;
  },

  async finish({ started }, step) {
    return started[step.of].result;
  },

  async until_status(session, { fields }) {
    const giveUp = performance.now() + UNTIL_STATUS_MS;
    for (;;) {
      const result = await session.status();
      const isOver = result.code !== 'OK' || performance.now() >= giveUp;
      if (isOver || hasFields(result.messages[0], fields)) return result;
      await sleep(STATUS_INTERVAL_MS);
    }
  },
};

/**
 * Runs the steps in order, on a channel of their own.
 * @param {Scenario} scenario
 * @param {Record<string, import('./session.js').Server>} servers
 */
export async function runScenario({ name, server, token, steps, ...options }, servers) {
  const session = new Session(servers[server], token, options.keepalive_seconds);
  const results = [];
  for (const step of steps) results.push(await runStep(session, step));
  session.close();
  return { scenario: name, results };
}

/**
 * @param {Session} session
 * @param {Step} step
 */
async function runStep(session, step) {
  try {
    return await operations[step.op](session, step);
  } catch (error) {
    return { broken: String(error) };
  }
}

/**
 * @param {Session} session
 * @param {Step} step
 */
function begin(session, step) {
  return session.begin(step.rpc, expand(step.request), step.timeout_seconds);
}

/**
 * Asks for `Status` until the call has ended, and once more.
 * @param {Session} session
 * @param {Promise<Result>} result
 */
async function watchStatus(session, result) {
  let ended = false;
  result.finally(() => (ended = true)).catch(() => {}); // awaited below
  const statuses = [];
  for (let isLast = false; !isLast; ) {
    isLast = ended;
    const { code, message, messages } = await session.status();
    if (code !== 'OK') throw new Error(`Status answered ${code}: ${message}`);
    statuses.push(...messages);
    if (!isLast) await Promise.race([sleep(STATUS_INTERVAL_MS), result]);
  }
  return { ...(await result), statuses };
}

/**
 * @param {any} status
 * @param {Record<string, unknown>} fields
 */
function hasFields(status, fields) {
  return Object.entries(fields).every(([name, value]) => String(status[name]) === String(value));
}

/**
 * Replaces each `{"$repeat": "ab", "count": 3}` in a request by `"ababab"`.
 * @param {any} value
 * @returns {any}
 */
function expand(value) {
  if (Array.isArray(value)) return value.map(expand);
  if (value === null || typeof value !== 'object') return value;
  if ('$repeat' in value) return value.$repeat.repeat(value.count);
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, expand(part)]));
}
