// Asks a running server for a record: a JSON schema constrains the answer, which is then parsed.
// Usage: node record.js ADDRESS
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const protocol = loadSync(['mlxrunner/v1/runner.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'], {
  keepCase: true, defaults: true, enums: String, longs: Number, json: true,
  includeDirs: [here('../../proto'), here('../../third_party')],
});
const { RunnerService } = grpc.loadPackageDefinition(protocol).mlxrunner.v1;

/** The record. Its parts are bounded, so that the answer ends within `num_predict`. */
const person = {
  type: 'object',
  properties: {
    name: { type: 'string', minLength: 1, maxLength: 20 },
    age: { type: 'integer', minimum: 0, maximum: 150 },
    pets: { type: 'array', items: { enum: ['cat', 'dog'] }, maxItems: 2 },
  },
  required: ['name', 'age', 'pets'],
  additionalProperties: false,
};

/** Returns the `google.rpc.ErrorInfo` of a failed call; its `reason` identifies the error. */
function errorInfo(error) {
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  const details = bytes ? protocol['google.rpc.Status'].deserialize(bytes).details : [];
  return details.find((detail) => detail['@type'].endsWith('/google.rpc.ErrorInfo'));
}

const runner = new RunnerService(process.argv[2], grpc.credentials.createInsecure(), { 'grpc.enable_http_proxy': 0 });
const request = {
  messages: [{ role: 'ROLE_USER', content: 'Ada is 36 years old and has a cat.' }],
  options: { temperature: 0, num_predict: 400 },
  constraint: { json_schema: JSON.stringify(person) },
};
try {
  let text = '';
  let last = {};
  // The server sets no deadline itself.
  for await (last of runner.Chat(request, { deadline: Date.now() + 300_000 })) text += last.content;
  // False if `num_predict` or the context ended the answer.
  if (!last.constraint_satisfied) throw new Error(`the answer ended too early (${last.done_reason}): ${text}`);
  const { name, age, pets } = JSON.parse(text);
  console.log(`name ${JSON.stringify(name)}, age ${age}, pets [${pets.map((pet) => JSON.stringify(pet)).join(' ')}]`);
} catch (error) {
  console.error(`${errorInfo(error)?.reason ?? 'no reason given'}: ${error.details ?? error}`);
  process.exitCode = 1;
} finally {
  runner.close();
}
