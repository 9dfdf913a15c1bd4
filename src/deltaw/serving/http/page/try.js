// Page to try a classifier, an embedding model or a reranker.

const KEY = "deltaw-api-key";
const MAX_ROWS = 100;
const byId = (id) => document.getElementById(id);
const problem = (text) => (byId("problem").textContent = text);
const percent = (share) => `${(100 * share).toFixed(1)} %`;

async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify({ model: byId("model").value, ...body }) };
  return (await request(path, sessionStorage.getItem(KEY) ?? "", options)).json();
}

function cosine(left, right) {
  let product = 0, leftNorm = 0, rightNorm = 0;
  for (let n = 0; n < left.length; n++) {
    product += left[n] * right[n];
    leftNorm += left[n] ** 2;
    rightNorm += right[n] ** 2;
  }
  return product / Math.sqrt(leftNorm * rightNorm || 1);
}

const lines = () => byId("candidates").value.split("\n").map((line) => line.trim()).filter(Boolean);

// By kind of model: labels, and a function that computes rows of [name, length of the bar, number].
const KINDS = {
  classes: {
    about: "Class probabilities of a text.",
    first: "Text",
    async result(text) {
      const [prediction] = (await post("v1/classify", { input: text })).data;
      const rows = Object.entries(prediction.probabilities).map(([name, share]) => [name, share, percent(share)]);
      return { title: prediction.label, rows: rows.sort((a, b) => b[1] - a[1]) };
    },
  },
  numbers: {
    about: "Number that the model predicts for a text.",
    first: "Text",
    async result(text) {
      const [{ prediction }] = (await post("v1/predict", { input: text })).data;
      return { title: [prediction].flat().map((number) => number.toPrecision(6)).join(", "), rows: [] };
    },
  },
  vectors: {
    about: "Similarity of texts: cosine of their embeddings.",
    first: "Text",
    candidates: "Texts to compare it with, one per line",
    async result(text, texts) {
      const { data } = await post("v1/embeddings", { input: [text, ...texts] });
      const rows = texts.map((candidate, n) => [candidate, cosine(data[0].embedding, data[n + 1].embedding)]);
      const sorted = rows.sort((a, b) => b[1] - a[1]).map(([name, value]) => [name, value, value.toFixed(3)]);
      return { title: "Sorted by similarity", rows: sorted };
    },
  },
  scores: {
    about: "Passages ranked by relevance to a query.",
    first: "Query",
    candidates: "Passages, one per line",
    async result(query, documents) {
      const { results } = await post("v1/rerank", { query, documents });
      const rows = results.map((result) => [result.document.text, result.relevance_score, result.relevance_score.toFixed(3)]);
      return { title: "Sorted by score", rows };
    },
  },
};
const kind = KINDS[document.body.dataset.kind];

function cell(tag, text, name = "") {
  const element = document.createElement(tag);
  if (text !== null) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function show({ title, rows }) {
  const table = document.createElement("table");
  table.append(cell("caption", title));
  rows.slice(0, MAX_ROWS).forEach(([name, share, number], index) => {
    const row = table.insertRow();
    row.className = index ? "" : "best";
    const head = cell("th", name);
    Object.assign(head, { scope: "row", dir: "auto" });
    const bar = cell("div", null, share < 0 ? "bar below" : "bar");
    bar.style.inlineSize = `${100 * Math.min(1, Math.abs(share))}%`;
    const barCell = cell("td", null);
    barCell.append(bar);
    row.append(head, barCell, cell("td", number, "number"));
  });
  byId("result").replaceChildren(table);
  if (rows.length > MAX_ROWS) byId("result").append(cell("p", `${rows.length - MAX_ROWS} more`, "quiet"));
}

function showError(error) {
  byId("result").replaceChildren();
  problem(error.message);
  if (error.status === 401) {
    byId("key-field").hidden = false;
    byId("key").focus();
  }
}

async function loadModels() {
  const models = await listModels(sessionStorage.getItem(KEY) ?? "");
  const selected = byId("model").value;
  const choices = models.map(({ id }) => new Option(id, id));
  byId("model").replaceChildren(...choices);
  if (models.some(({ id }) => id === selected)) byId("model").value = selected;
  byId("model-field").hidden = models.length < 2;
  byId("title").textContent = models.length === 1 ? `Try ${models[0].id.split("/").pop()}` : "Try a text";
  document.title = `${byId("title").textContent} · deltaw`;
}

async function submit(event) {
  event?.preventDefault();
  problem("");
  if (byId("key").value) sessionStorage.setItem(KEY, byId("key").value);
  byId("send").disabled = true;
  try {
    if (!byId("model").value) await loadModels();
    byId("key-field").hidden = true;
    const text = byId("first").value;
    if (!text.trim()) return;
    if (kind.candidates && !lines().length) return problem(`${kind.candidates}: enter at least one.`);
    show(await kind.result(text, lines()));
  } catch (error) {
    showError(error);
  } finally {
    byId("send").disabled = false;
  }
}

byId("about").textContent = kind.about;
byId("first-label").textContent = kind.first;
byId("candidates-field").hidden = !kind.candidates;
byId("candidates-label").textContent = kind.candidates ?? "";
byId("trial").addEventListener("submit", submit);
byId("first").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !kind.candidates) submit(event);
});
loadModels().catch(showError);
