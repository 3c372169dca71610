// Holds AsyncAPI documents against the specification, with AsyncAPI's own parser; prints one line per
// document and per fault. Payloads of JSON Schema 2020-12 are resolved, and judged elsewhere.

import { Parser, fromFile } from "@asyncapi/parser";

const FORMAT = "application/schema+json;version=draft-2020-12";
const NEWER = "asyncapi-latest-version"; // of the specification

const parser = new Parser();
parser.registerSchemaParser({
    validate: () => [],
    parse: (input) => input.data,
    getMimeTypes: () => [FORMAT],
});

for (const file of process.argv.slice(2)) {
    const { document, diagnostics } = await fromFile(parser, file).parse();
    const faults = diagnostics.filter((each) => each.code !== NEWER);
    for (const each of faults) {
        console.log(`${file}: ${each.code} ${each.path.join(".")}: ${each.message}`);
    }
    if (faults.length > 0 || document === undefined) {
        process.exitCode = 1;
    } else {
        console.log(`${file}: ${document.operations().length} operations`);
    }
}
