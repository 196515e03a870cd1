// Checks Kubernetes objects, a JSON list on the input, against the schemas and the types of kubernetes-models: wrong values
// by the first, unknown fields by the second. Prints a complaint a line; exits with 1 if there are any.
import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const folder = process.argv[2];
const require = createRequire(join(folder, "package.json"));
const ts = require("typescript");
const objects = JSON.parse(readFileSync(0, "utf8"));
const complaints = [];
let program = "";

for (const [index, object] of objects.entries()) {
  const {apiVersion, kind} = object;
  const where = `${kind} ${object.metadata?.name}`;
  const home = apiVersion.startsWith("gateway.networking.k8s.io/") ? "@kubernetes-models/gateway-api" : "kubernetes-models";
  const module = `${home}/${apiVersion}`;
  const path = join(folder, "node_modules", module, "index.js");
  const Model = (await import(pathToFileURL(path).href))[kind];
  if (Model === undefined) {
    complaints.push(`${where}: ${apiVersion} has no such kind`);
    continue;
  }
  try {
    new Model(object).validate();
  } catch (error) {
    complaints.push(`${where}: ${error.message}`);
  }
  program += `import type {I${kind} as T${index}} from "${module}";\nexport const o${index}: T${index} = ${JSON.stringify(object)};\n`;
}

const file = join(folder, "objects.ts");
writeFileSync(file, program);
const options = {
  noEmit: true, strict: true, skipLibCheck: true, types: [],
  module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext, target: ts.ScriptTarget.ES2022,
};
for (const found of ts.getPreEmitDiagnostics(ts.createProgram([file], options)))
  complaints.push(ts.flattenDiagnosticMessageText(found.messageText, " ").slice(0, 300));
for (const complaint of complaints) console.log(complaint);
process.exit(complaints.length > 0 ? 1 : 0);
