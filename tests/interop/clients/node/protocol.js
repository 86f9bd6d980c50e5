// @ts-check
/** What goes over the wire, read from the repository's own `runner.proto`. */
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const includeDirs = ['proto', 'third_party'].map((path) =>
  fileURLToPath(new URL(`../../../../${path}`, import.meta.url)),
);

const files = ['mlxrunner/v1/runner.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'];

/** Messages become objects close to proto3 JSON; an `Any` is opened, its type is `@type`. */
const definition = loadSync(files, {
  keepCase: true,
  defaults: true,
  enums: String,
  longs: String,
  bytes: String,
  json: true,
  includeDirs,
});

/** The stub's class. */
export const Runner = grpc.makeClientConstructor(
  /** @type {grpc.ServiceDefinition} */ (definition['mlxrunner.v1.RunnerService']),
  'RunnerService',
);

/**
 * Reads the trailer `grpc-status-details-bin`.
 * @param {Buffer} bytes
 * @returns {any} `google.rpc.Status`
 */
export function parseStatus(bytes) {
  const type = /** @type {import('@grpc/proto-loader').MessageTypeDefinition<object, object>} */ (
    definition['google.rpc.Status']
  );
  return type.deserialize(bytes);
}

/**
 * Writes one line of JSON. A Duration, which is left as its two fields, becomes the
 * `"1.5s"` of proto3 JSON.
 * @param {unknown} value
 */
export function toJson(value) {
  return JSON.stringify(value, (_key, part) =>
    isDuration(part) ? `${durationSeconds(part).toFixed(9)}s` : part,
  );
}

/** @param {{seconds: string, nanos: number}} duration */
export function durationSeconds({ seconds, nanos }) {
  return Number(seconds) + nanos / 1e9;
}

/** @param {any} part */
function isDuration(part) {
  return typeof part?.seconds === 'string' && typeof part.nanos === 'number';
}
