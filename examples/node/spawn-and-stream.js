// Starts a runner, loads MODEL into it, streams a completion of PROMPT, and stops it.
// Usage: node spawn-and-stream.js MODEL [PROMPT]
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const protocol = loadSync(['mlxrunner/v1/runner.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'], {
  keepCase: true, defaults: true, enums: String, longs: Number, json: true,
  includeDirs: [here('../../proto'), here('../../third_party')],
});
const { RunnerService } = grpc.loadPackageDefinition(protocol).mlxrunner.v1;

/** Returns the `google.rpc.ErrorInfo` of a failed call; its `reason` identifies the error. */
function errorInfo(error) {
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  const details = bytes ? protocol['google.rpc.Status'].deserialize(bytes).details : [];
  return details.find((detail) => detail['@type'].endsWith('/google.rpc.ErrorInfo'));
}

const [model, prompt = 'def fibonacci(n):'] = process.argv.slice(2);
const token = randomBytes(16).toString('hex');
const child = spawn(
  process.env.MLX_RUNNER_PYTHON ?? 'python3',
  // The runner's stdin is a pipe that closes when this process ends in any way; the runner then exits.
  ['-m', 'runner_server', '--listen', '127.0.0.1:0', '--exit-with-parent'],
  { stdio: ['pipe', 'pipe', 'inherit'], env: { ...process.env, MLX_RUNNER_TOKEN: token } },
);
const exited = once(child, 'exit');
const ready = once(createInterface(child.stdout), 'line');
const [line] = await Promise.race([ready, exited.then(() => ['(it ended)'])]);
const address = /^1\|1\|tcp\|(.+)\|grpc$/.exec(line)?.[1]; // 1|1|tcp|127.0.0.1:41234|grpc
if (!address) throw new Error(`the runner is not ready: ${line}`);

const metadata = new grpc.Metadata();
metadata.set('authorization', `Bearer ${token}`);
const options = { 'grpc.enable_http_proxy': 0 };
const runner = new RunnerService(address, grpc.credentials.createInsecure(), options);
const deadline = Date.now() + 300_000; // The runner sets no deadline itself.
try {
  await promisify(runner.Load.bind(runner))({ model }, metadata, { deadline });
  const request = { prompt, options: { temperature: 0, num_predict: 64 } };
  for await (const { content } of runner.Completion(request, metadata, { deadline })) {
    process.stdout.write(content);
  }
  process.stdout.write('\n');
} catch (error) {
  console.error(`${errorInfo(error)?.reason ?? 'no reason given'}: ${error.details ?? error}`);
  process.exitCode = 1;
} finally {
  runner.close();
  child.kill('SIGTERM');
  await exited;
}
