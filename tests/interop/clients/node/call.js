// @ts-check
/** A call that runs, whether it answers with a stream or with one message. */
import { EventEmitter } from 'node:events';
import { failure, success } from './result.js';

/** @typedef {import('./result.js').Result} Result */

export class Call {
  /** @type {any[]} What it has been answered so far. */
  messages = [];
  /** @type {Promise<Result>} How it ended. Rejects for a defect of this client only. */
  result;
  /** @type {any} */
  #call;
  #arrivals = new EventEmitter();

  /**
   * @param {any} stub
   * @param {string} rpc
   * @param {object} request
   * @param {import('@grpc/grpc-js').Metadata} metadata
   * @param {import('@grpc/grpc-js').CallOptions} options
   */
  constructor(stub, rpc, request, metadata, options) {
    const ended = stub[rpc].responseStream
      ? this.#readStream(stub[rpc](request, metadata, options))
      : this.#readOne((done) => stub[rpc](request, metadata, options, done));
    this.result = ended.then(
      () => success(this.messages),
      (error) => failure(error, this.messages),
    );
    this.result.catch(() => {}); // the step that awaits it tells of it
  }

  cancel() {
    this.#call.cancel();
  }

  /**
   * Waits until it has that many messages or has ended.
   * @param {number} count
   */
  async untilMessages(count) {
    const arrived = new Promise((resolve) => {
      const check = () => this.messages.length >= count && resolve(undefined);
      this.#arrivals.on('message', check);
      check();
    });
    await Promise.race([arrived, this.result]);
  }

  /** @param {AsyncIterable<any>} stream */
  async #readStream(stream) {
    this.#call = stream;
    for await (const message of stream) this.#take(message);
  }

  /** @param {(done: (error: unknown, message: any) => void) => unknown} begin */
  async #readOne(begin) {
    const message = await new Promise((resolve, reject) => {
      this.#call = begin((error, answer) => (error ? reject(error) : resolve(answer)));
    });
    this.#take(message);
  }

  /** @param {any} message */
  #take(message) {
    this.messages.push(message);
    this.#arrivals.emit('message');
  }
}
