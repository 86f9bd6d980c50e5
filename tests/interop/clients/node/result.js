// @ts-check
/** How a call that has ended is told to the judge. */
import grpc from '@grpc/grpc-js';
import { durationSeconds, parseStatus } from './protocol.js';

/**
 * @typedef {{reason?: string, domain?: string, metadata?: Record<string, string>,
 *   violations?: {field: string, description: string}[], retry_seconds?: number}} Details
 * @typedef {{code: string, message?: string, messages: any[], details?: Details,
 *   statuses?: any[]}} Result
 */

/**
 * @param {any[]} messages
 * @returns {Result}
 */
export function success(messages) {
  return { code: 'OK', messages };
}

/**
 * @param {any} error what the call ended with
 * @param {any[]} messages what it had before
 * @returns {Result}
 */
export function failure(error, messages) {
  if (!(error?.metadata instanceof grpc.Metadata)) throw error; // no gRPC status: a defect
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  const result = { code: grpc.status[error.code], message: error.details, messages };
  return bytes ? { ...result, details: readDetails(bytes) } : result;
}

/**
 * @param {Buffer} bytes
 * @returns {Details | undefined}
 */
function readDetails(bytes) {
  /** @type {Details} */
  const found = {};
  for (const detail of parseStatus(bytes).details) {
    switch (detail['@type']) {
      case 'type.googleapis.com/google.rpc.ErrorInfo':
        found.reason = detail.reason;
        found.domain = detail.domain;
        found.metadata = detail.metadata;
        break;
      case 'type.googleapis.com/google.rpc.BadRequest':
        found.violations = detail.field_violations;
        break;
      case 'type.googleapis.com/google.rpc.RetryInfo':
        found.retry_seconds = durationSeconds(detail.retry_delay);
        break;
    }
  }
  return Object.keys(found).length > 0 ? found : undefined;
}
