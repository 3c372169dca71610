// Bundles src/ into static files, and writes down the licences of what is bundled.
// node build.mjs [DIRECTORY]; the directory is build/dashboard of the checkout otherwise.
import { copyFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "..", "..", "build", "dashboard");

function licences(inputs) {
  const names = new Set();
  for (const input of inputs) {
    const found = /(?:^|\/)node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(input);
    if (found) names.add(found[1]);
  }
  const parts = [...names].sort().map((name) => {
    const directory = join(here, "node_modules", name);
    const { version, license } = JSON.parse(readFileSync(join(directory, "package.json"), "utf8"));
    const files = readdirSync(directory).filter((file) => /^(licen[cs]e|notice|unlicense)/i.test(file));
    if (!license || !files.length) throw new Error(`${name} has no licence`);
    const texts = files.sort().map((file) => readFileSync(join(directory, file), "utf8").trim());
    return [`${name} ${version} (${license})`, ...texts].join("\n\n");
  });
  return `What app.js contains of others.\n\n${parts.join(`\n\n${"-".repeat(80)}\n\n`)}\n`;
}

mkdirSync(out, { recursive: true });
const { metafile } = await build({
  absWorkingDir: here,
  entryPoints: ["src/main.ts"],
  outfile: join(out, "app.js"),
  bundle: true,
  minify: true,
  legalComments: "none",
  format: "esm",
  target: "es2022",
  metafile: true,
  logLevel: "warning",
});
for (const name of ["index.html", "style.css"]) copyFileSync(join(here, name), join(out, name));
writeFileSync(join(out, "THIRD_PARTY_LICENSES"), licences(Object.keys(metafile.inputs)));
