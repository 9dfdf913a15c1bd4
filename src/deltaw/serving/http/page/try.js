// A text is tried: classes with their probabilities, similarities of texts, or scores of passages.

const KEY = "deltaw-api-key";
const MOST_SHOWN = 100;
const at = (id) => document.getElementById(id);
const problem = (text) => (at("problem").textContent = text);
const percent = (share) => `${(100 * share).toFixed(1)} %`;

async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  const given = { method: "POST", headers, body: JSON.stringify({ model: at("model").value, ...body }) };
  return (await ask(path, sessionStorage.getItem(KEY) ?? "", given)).json();
}

function cosine(left, right) {
  let product = 0, one = 0, other = 0;
  for (let n = 0; n < left.length; n++) {
    product += left[n] * right[n];
    one += left[n] ** 2;
    other += right[n] ** 2;
  }
  return product / Math.sqrt(one * other || 1);
}

const lines = () => at("others").value.split("\n").map((line) => line.trim()).filter(Boolean);

// By what the server gives: its words, and the result for the two fields as [name, share of the bar, number] each.
const KINDS = {
  classes: {
    about: "Classes of a text, with their probabilities.",
    first: "Text",
    async result(text) {
      const [found] = (await post("v1/classify", { input: text })).data;
      const rows = Object.entries(found.probabilities).map(([name, share]) => [name, share, percent(share)]);
      return { title: found.label, rows: rows.sort((a, b) => b[1] - a[1]) };
    },
  },
  vectors: {
    about: "Similarity of texts: the cosine of their vectors.",
    first: "Text",
    others: "Texts to compare it with, one on each line",
    async result(text, texts) {
      const { data } = await post("v1/embeddings", { input: [text, ...texts] });
      const rows = texts.map((other, n) => [other, cosine(data[0].embedding, data[n + 1].embedding)]);
      const sorted = rows.sort((a, b) => b[1] - a[1]).map(([name, value]) => [name, value, value.toFixed(3)]);
      return { title: "The most similar first", rows: sorted };
    },
  },
  scores: {
    about: "Passages, ranked by how well they answer a query.",
    first: "Query",
    others: "Passages, one on each line",
    async result(query, documents) {
      const { results } = await post("v1/rerank", { query, documents });
      const rows = results.map((one) => [one.document.text, one.relevance_score, one.relevance_score.toFixed(3)]);
      return { title: "The best first", rows };
    },
  },
};
const kind = KINDS[document.body.dataset.kind];

function cell(tag, text, name = "") {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function show({ title, rows }) {
  const table = document.createElement("table");
  table.append(cell("caption", title));
  rows.slice(0, MOST_SHOWN).forEach(([name, share, number], place) => {
    const row = table.insertRow();
    row.className = place ? "" : "best";
    const head = cell("th", name);
    Object.assign(head, { scope: "row", dir: "auto" });
    const bar = cell("div", null, share < 0 ? "bar below" : "bar");
    bar.style.inlineSize = `${100 * Math.min(1, Math.abs(share))}%`;
    const drawn = cell("td", null);
    drawn.append(bar);
    row.append(head, drawn, cell("td", number, "number"));
  });
  at("result").replaceChildren(table);
  if (rows.length > MOST_SHOWN) at("result").append(cell("p", `${rows.length - MOST_SHOWN} more`, "quiet"));
}

function refused(error) {
  at("result").replaceChildren();
  problem(error.message);
  if (error.status === 401) {
    at("key-field").hidden = false;
    at("key").focus();
  }
}

async function loadModels() {
  const models = await listModels(sessionStorage.getItem(KEY) ?? "");
  const kept = at("model").value;
  const choices = models.map(({ id }) => new Option(id, id));
  at("model").replaceChildren(...choices);
  if (models.some(({ id }) => id === kept)) at("model").value = kept;
  at("model-field").hidden = models.length < 2;
  at("title").textContent = models.length === 1 ? `Try ${models[0].id.split("/").pop()}` : "Try a text";
  document.title = `${at("title").textContent} · deltaw`;
}

async function submit(event) {
  event?.preventDefault();
  problem("");
  if (at("key").value) sessionStorage.setItem(KEY, at("key").value);
  at("send").disabled = true;
  try {
    if (!at("model").value) await loadModels();
    at("key-field").hidden = true;
    const text = at("first").value;
    if (!text.trim()) return;
    if (kind.others && !lines().length) return problem(`${kind.others}: there is none.`);
    show(await kind.result(text, lines()));
  } catch (error) {
    refused(error);
  } finally {
    at("send").disabled = false;
  }
}

at("about").textContent = kind.about;
at("first-label").textContent = kind.first;
at("others-field").hidden = !kind.others;
at("others-label").textContent = kind.others ?? "";
at("trial").addEventListener("submit", submit);
at("first").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !kind.others) submit(event);
});
loadModels().catch(refused);
