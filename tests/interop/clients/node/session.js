// @ts-check
/** A channel of its own to one server, and the calls made on it. */
import grpc from '@grpc/grpc-js';
import { Call } from './call.js';
import { Runner } from './protocol.js';

/** @typedef {{address: string, token?: string}} Server */

const DEFAULT_TIMEOUT_SECONDS = 120;

export class Session {
  /** @type {Record<string, Call>} Calls that go on while other steps run, by name. */
  started = {};
  #stub;
  #metadata = new grpc.Metadata();

  /**
   * @param {Server} server
   * @param {string} [token]
   * @param {number} [keepaliveSeconds]
   */
  constructor(server, token = server.token, keepaliveSeconds) {
    this.#stub = new Runner(server.address, grpc.credentials.createInsecure(), {
      'grpc.enable_http_proxy': 0,
      'grpc.use_local_subchannel_pool': 1, // else channels to one address share a connection
      ...(keepaliveSeconds && {
        'grpc.keepalive_time_ms': keepaliveSeconds * 1000,
        'grpc.keepalive_permit_without_calls': 1,
      }),
    });
    if (token) this.#metadata.set('authorization', `Bearer ${token}`);
  }

  /**
   * Begins a call.
   * @param {string} rpc
   * @param {object} request
   * @param {number} [timeoutSeconds]
   */
  begin(rpc, request, timeoutSeconds = DEFAULT_TIMEOUT_SECONDS) {
    const deadline = Date.now() + timeoutSeconds * 1000;
    return new Call(this.#stub, rpc, request, this.#metadata, { deadline });
  }

  /** Asks for `Status`. */
  status() {
    return this.begin('Status', {}).result;
  }

  /** Cancels what still runs and closes the channel. */
  close() {
    for (const call of Object.values(this.started)) call.cancel();
    this.#stub.close();
  }
}
