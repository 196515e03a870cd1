// gRPC's interoperability cases with @grpc/grpc-js; node client.js PORT prints each case that passed.
'use strict';
const assert = require('node:assert');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const loaded = grpc.loadPackageDefinition(
  loader.loadSync(path.join(__dirname, 'testing.proto'), {keepCase: true, defaults: true})
);
const {TestService, UnimplementedService} = loaded.grpc.testing;
const address = `127.0.0.1:${process.argv[2]}`;
const client = new TestService(address, grpc.credentials.createInsecure());

const RESPONSES = [31415, 9, 2653, 58979];
const REQUESTS = [27182, 8, 1828, 45904];
const SPECIAL = '\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n';
const INITIAL = 'x-grpc-test-echo-initial';
const TRAILING = 'x-grpc-test-echo-trailing-bin';

const body = (size) => ({body: Buffer.alloc(size)});
const ask = (size, sent, interval_us = 0) => ({response_parameters: [{size, interval_us}], payload: body(sent)});

function unary(method, request, metadata = new grpc.Metadata(), options = {}, on = client) {
  return new Promise((resolve) => {
    const seen = {};
    const call = on[method](request, metadata, options, (error, response) => {
      seen.error = error;
      seen.response = response;
    });
    call.on('metadata', (initial) => (seen.initial = initial));
    call.on('status', (status) => setImmediate(() => resolve({...seen, status})));
  });
}

// Collects a stream to its end; step(call, message) acts on each message.
function collect(call, step = () => {}) {
  return new Promise((resolve) => {
    const messages = [];
    let initial;
    call.on('metadata', (metadata) => (initial = metadata));
    call.on('data', (message) => {
      messages.push(message);
      step(call, messages.length);
    });
    call.on('error', () => {});
    call.on('status', (status) => setImmediate(() => resolve({messages, status, initial})));
  });
}

const cases = {
  async empty_unary() {
    assert.deepStrictEqual((await unary('EmptyCall', {})).response, {});
  },
  async large_unary() {
    const {response} = await unary('UnaryCall', {response_size: 314159, payload: body(271828)});
    assert.strictEqual(response.payload.body.length, 314159);
  },
  async compressed_unary() {
    const gzip = new TestService(address, grpc.credentials.createInsecure(), {
      'grpc.default_compression_algorithm': grpc.compressionAlgorithms.gzip,
    });
    const {response} = await unary('UnaryCall', {response_size: 99, payload: body(271828)}, undefined, {}, gzip);
    assert.strictEqual(response.payload.body.length, 99);
    gzip.close();
  },
  async client_streaming() {
    const total = await new Promise((resolve, reject) => {
      const call = client.StreamingInputCall((error, response) =>
        error ? reject(error) : resolve(response.aggregated_payload_size)
      );
      REQUESTS.forEach((size) => call.write({payload: body(size)}));
      call.end();
    });
    assert.strictEqual(total, 74922);
  },
  async server_streaming() {
    const request = {response_parameters: RESPONSES.map((size) => ({size}))};
    const {messages} = await collect(client.StreamingOutputCall(request));
    assert.deepStrictEqual(messages.map((m) => m.payload.body.length), RESPONSES);
  },
  async ping_pong() {
    const call = client.FullDuplexCall();
    const done = collect(call, (_, n) => (n < 4 ? call.write(ask(RESPONSES[n], REQUESTS[n])) : call.end()));
    call.write(ask(RESPONSES[0], REQUESTS[0]));
    const {messages, status} = await done;
    assert.deepStrictEqual(messages.map((m) => m.payload.body.length), RESPONSES);
    assert.strictEqual(status.code, grpc.status.OK);
  },
  async empty_stream() {
    const call = client.FullDuplexCall();
    const done = collect(call);
    call.end();
    const {messages, status} = await done;
    assert.strictEqual(messages.length, 0);
    assert.strictEqual(status.code, grpc.status.OK);
  },
  async cancel_after_begin() {
    const status = await new Promise((resolve) => {
      const call = client.StreamingInputCall(() => {});
      call.on('status', resolve);
      call.cancel();
    });
    assert.strictEqual(status.code, grpc.status.CANCELLED);
  },
  async cancel_after_first_response() {
    const call = client.FullDuplexCall();
    const done = collect(call, () => call.cancel());
    call.write(ask(RESPONSES[0], REQUESTS[0]));
    const {messages, status} = await done;
    assert.strictEqual(messages.length, 1);
    assert.strictEqual(status.code, grpc.status.CANCELLED);
  },
  async timeout_on_sleeping_server() {
    const call = client.FullDuplexCall({deadline: Date.now() + 50});
    const done = collect(call);
    call.write(ask(RESPONSES[0], REQUESTS[0], 20000000));
    assert.strictEqual((await done).status.code, grpc.status.DEADLINE_EXCEEDED);
  },
  async status_code_and_message() {
    for (const message of ['test status message', SPECIAL]) {
      const response_status = {code: 2, message};
      const {status} = await unary('UnaryCall', {response_status});
      assert.deepStrictEqual([status.code, status.details], [2, message]);
      const call = client.FullDuplexCall();
      const done = collect(call);
      call.write({response_status});
      call.end();
      const streamed = (await done).status;
      assert.deepStrictEqual([streamed.code, streamed.details], [2, message]);
    }
  },
  async custom_metadata() {
    const metadata = new grpc.Metadata();
    metadata.set(INITIAL, 'test_initial_metadata_value');
    metadata.set(TRAILING, Buffer.from([0xab, 0xab, 0xab]));
    const one = await unary('UnaryCall', {response_size: 10}, metadata);
    const call = client.FullDuplexCall(metadata);
    const done = collect(call);
    call.write(ask(10, 10));
    call.end();
    for (const seen of [one, await done]) {
      assert.deepStrictEqual(seen.initial.get(INITIAL), ['test_initial_metadata_value']);
      assert.deepStrictEqual(seen.status.metadata.get(TRAILING), [Buffer.from([0xab, 0xab, 0xab])]);
    }
  },
  async unimplemented_method_and_service() {
    assert.strictEqual((await unary('UnimplementedCall', {})).status.code, grpc.status.UNIMPLEMENTED);
    const other = new UnimplementedService(address, grpc.credentials.createInsecure());
    const {status} = await unary('UnimplementedCall', {}, undefined, {}, other);
    assert.strictEqual(status.code, grpc.status.UNIMPLEMENTED);
    other.close();
  },
};

(async () => {
  for (const [name, run] of Object.entries(cases)) {
    await run();
    console.log(name);
  }
  client.close();
  // grpc-js keeps the connection of a call that was cancelled before it began, whatever the server.
  process.exit(0);
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
