// Starts a pool, completes with each MODEL, lists the models, and stops the pool.
// Usage: node host.js MODEL...
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const files = ['mlxrunner/v1/pool.proto', 'mlxrunner/v1/runner.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'];
const protocol = loadSync(files, {
  keepCase: true, defaults: true, enums: String, longs: Number, json: true,
  includeDirs: [here('../../proto'), here('../../third_party')],
});
const { RunnerService, PoolService } = grpc.loadPackageDefinition(protocol).mlxrunner.v1;

/** Returns the `google.rpc.ErrorInfo` of a failed call; its `reason` identifies the error. */
function errorInfo(error) {
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  const details = bytes ? protocol['google.rpc.Status'].deserialize(bytes).details : [];
  return details.find((detail) => detail['@type'].endsWith('/google.rpc.ErrorInfo'));
}

const token = randomBytes(16).toString('hex');
// The pool's stdin is a pipe that closes when this process ends in any way; the pool and its runners then exit.
const child = spawn('mlx-runner', ['pool', '--budget', '4GiB', '--exit-with-parent'], {
  stdio: ['pipe', 'pipe', 'inherit'], env: { ...process.env, MLX_RUNNER_TOKEN: token },
});
const exited = once(child, 'exit');
const [line] = await Promise.race([once(createInterface(child.stdout), 'line'), exited.then(() => ['(it ended)'])]);
const address = /^1\|1\|tcp\|(.+)\|grpc$/.exec(line)?.[1]; // 1|1|tcp|127.0.0.1:41234|grpc
if (!address) throw new Error(`the pool is not ready: ${line}`);

const metadata = new grpc.Metadata();
metadata.set('authorization', `Bearer ${token}`);
const connect = (Service) => new Service(address, grpc.credentials.createInsecure(), { 'grpc.enable_http_proxy': 0 });
const [runner, pool] = [connect(RunnerService), connect(PoolService)];
const deadline = Date.now() + 300_000; // The pool sets no deadline itself.
try {
  for (const model of process.argv.slice(2)) { // Loaded by the first request, evicted if memory is short.
    const request = { model, prompt: 'def fibonacci(n):', options: { temperature: 0, num_predict: 64 } };
    for await (const { content } of runner.Completion(request, metadata, { deadline })) process.stdout.write(content);
    process.stdout.write('\n');
  }
  const { models } = await promisify(pool.ListModels.bind(pool))({}, metadata, { deadline });
  for (const { name, state, held_bytes } of models) console.error(`${name}: ${state}, ${held_bytes} bytes`);
} catch (error) {
  console.error(`${errorInfo(error)?.reason ?? 'no reason given'}: ${error.details ?? error}`);
  process.exitCode = 1;
} finally {
  runner.close(); pool.close(); child.kill('SIGTERM');
  await exited;
}
