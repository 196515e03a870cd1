// Keeps calls under way with grpc-js alone until its input ends: node client.js TARGET SERVICE_CONFIG PROTO_FOLDER CALLS TOKENS
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [target, serviceConfig, protos, calls, tokens] = process.argv.slice(2);
const definition = loader.loadSync("twinjet/v1/service.proto", {includeDirs: [protos]});
const {InferenceService} = grpc.loadPackageDefinition(definition).twinjet.v1;
const client = new InferenceService(target, grpc.credentials.createInsecure(), {
  "grpc.service_config": serviceConfig,
  "grpc.enable_retries": 0,
});

function call() {
  const stream = client.Generate({text: "x", sampling: {maxTokens: Number(tokens), ignoreEos: true}});
  stream.on("data", () => {});
  stream.on("error", (error) => {
    console.error(error.message);
    process.exit(1);
  });
  stream.on("end", () => setImmediate(call));
}
for (let i = 0; i < Number(calls); i++) call();
process.stdin.on("end", () => process.exit(0)).resume();
