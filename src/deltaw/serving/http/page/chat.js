// The page: which models, which settings, and the turns of the chat.

const KEY = "deltaw-api-key";
// Browsers open six connections to one server; a seventh answer would wait for an earlier one to end.
const MOST_COLUMNS = 6;
const TOP = 5;
const at = (id) => document.getElementById(id);
const key = () => sessionStorage.getItem(KEY) ?? "";
// Lines are added, not replaced, so that a screen reader comes to read each of several that come at once.
const say = (text) => {
  const line = document.createElement("p");
  line.textContent = text;
  at("said").append(line);
};
const problem = (text) => (at("problem").textContent = text);

// One history for each model: its own answers follow one another.
let histories = new Map();
let turns = 0;
let running = null;

const wide = window.matchMedia("(min-width: 56.01rem)");

// Models

// What a model is called on the page: of a path or reference, its last part without version and file type.
let names = new Map();
const nameOf = (model) => names.get(model) ?? model;

function shortNames(models) {
  const short = models.map(({ id }) => id.replace(/^pypi:/, "").split("/").pop().replace(/==.*$|\.gguf$/i, "") || id);
  const twice = (name) => short.indexOf(name) !== short.lastIndexOf(name);
  names = new Map(models.map(({ id }, place) => [id, twice(short[place]) ? id : short[place]]));
}

const boxes = () => [...at("model-list").querySelectorAll("input")];
const kindOf = (model) => boxes().find((box) => box.value === model)?.dataset.kind ?? "";
const chosen = () => boxes().filter((box) => box.checked).map((box) => box.value);

function modelChoice(model, checked) {
  const label = document.createElement("label");
  label.className = "choice";
  const box = document.createElement("input");
  Object.assign(box, { type: "checkbox", value: model.id, checked, name: "model" });
  box.dataset.kind = model.parent ? "adapter" : "base";
  const text = document.createElement("span");
  const kind = document.createElement("span");
  kind.className = "kind";
  kind.textContent = model.parent ? "adapter" : "base model";
  text.append(nameOf(model.id), " ", kind);
  label.title = model.id;
  label.append(box, text);
  return label;
}

function showModels(models) {
  const kept = new Set(chosen());
  const sorted = [...models.filter((model) => !model.parent), ...models.filter((model) => model.parent)];
  shortNames(sorted);
  // Base and adapter side by side; where there is room for one answer, the adapter's.
  const first = sorted.find((model) => model.parent) ?? sorted[0];
  at("model-list").replaceChildren(
    ...sorted.map((model, place) => modelChoice(model, model === first || (wide.matches && place < 2))),
  );
  if (kept.size) for (const box of boxes()) box.checked = kept.has(box.value);
  const adapters = models.filter((model) => model.parent).length;
  const many = adapters === 1 ? "an adapter" : `${adapters} adapters`;
  at("serving").textContent = adapters ? `${many} for ${nameOf(sorted[0].id)}` : "";
  if (!models.length) at("serving").textContent = "The server has no models.";
}

async function loadModels() {
  try {
    showModels(await listModels(key()));
    await showPrompting();
    at("key-field").hidden = !key();
    problem("");
    refresh();
    return true;
  } catch (error) {
    refused(error);
    return false;
  }
}

// How the run behind a model is prompted, and whose prompts the page shows at the moment.
let shownFor = null;

// The adapter that was chosen first, or the base: the page is named after it, and begins with its rows' prompts.
async function showPrompting() {
  const picked = boxes().filter((box) => box.checked);
  const model = (picked.find((box) => box.dataset.kind === "adapter") ?? picked[0])?.value;
  at("title").textContent = model ? `Chat with ${nameOf(model)}` : "Chat";
  document.title = `${at("title").textContent} · deltaw`;
  if (!model || model === shownFor?.model) return;
  const known = shownFor;
  shownFor = { model, system: known?.system ?? "" };
  const { system, examples } = await promptingOf(model, key());
  if (shownFor.model !== model) return;
  if (at("system").value === shownFor.system) at("system").value = system; // unless somebody wrote there
  shownFor.system = system;
  at("system-note").textContent = system ? `As in the rows of ${nameOf(model)}. Empty it to leave it out.` : "";
  at("example-list").replaceChildren(...examples.map(exampleElement));
  at("examples").hidden = !examples.length;
}

function exampleElement(text) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: text, dir: "auto" });
  button.addEventListener("click", () => {
    at("message").value = text;
    refresh();
    at("message").focus();
    if (!at("send").disabled) send();
  });
  item.append(button);
  return item;
}

function refused(error) {
  if (error.status === 401 || error.status === 403) {
    at("key-field").hidden = false;
    at("setup").open = true;
    at("serving").textContent = "The server asks for an API key.";
    if (key()) problem("The server does not take this API key.");
    at("key").focus();
  } else {
    at("serving").textContent = "No models.";
    problem(error.message);
  }
}

// Settings

function number(id) {
  const field = at(id);
  if (!field.checkValidity()) {
    at("setup").open = true;
    field.reportValidity();
    throw new RangeError(`${field.labels[0].textContent}: ${field.validationMessage}`);
  }
  return field.value === "" ? undefined : field.valueAsNumber;
}

function settings() {
  return {
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    logprobs: true,
    top_logprobs: TOP,
  };
}

// Turns

function newTurn(question, answers) {
  const made = at("turn").content.cloneNode(true);
  turns += 1;
  made.querySelector(".asked-title").textContent = `Message ${turns}`;
  made.querySelector(".asked").textContent = question;
  made.querySelector(".answers").append(...answers.map((answer) => answer.element));
  const element = made.querySelector(".turn");
  at("turns").append(made);
  return element;
}

function compare(answers, growing) {
  if (answers.length < 2) return;
  const marks = differences(answers.map((answer) => answer.spans.map((span) => span.textContent)), growing);
  answers.forEach((answer, place) => {
    answer.mark(marks[place]);
    if (!growing) answer.tell([...marks[place]], place ? answers[0].name : "");
  });
}

// Marks follow the text, but not more often than they can be seen.
function comparer(answers) {
  let waiting = 0;
  return () => {
    waiting ||= setTimeout(() => {
      waiting = 0;
      if (answers.some((answer) => answer.writing)) compare(answers, true);
    }, 150);
  };
}

async function write(answer, question, body, signal, onPiece) {
  const own = histories; // a new chat takes other ones
  const before = own.get(answer.model) ?? [];
  const asked = [...before, { role: "user", content: question }];
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...asked] : asked;
  try {
    await stream({ model: answer.model, messages, ...body }, key(), signal, (piece) => {
      answer.take(piece);
      onPiece();
    });
    answer.end();
  } catch (error) {
    answer.end(error);
    if (error.status === 401) refused(error);
  }
  if (answer.content) own.set(answer.model, [...asked, { role: "assistant", content: answer.content }]);
  if (own !== histories) return;
  const text = answer.content.length > 600 ? `${answer.content.slice(0, 600)} …` : answer.content;
  say(`${answer.name} ${answer.part("state").textContent}: ${text}`);
}

function follow() {
  const room = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  return room < 80;
}

async function send() {
  const question = at("message").value.trim();
  const models = chosen();
  let body;
  try {
    body = settings();
  } catch (error) {
    problem(error.message);
    return;
  }
  problem("");
  at("message").value = "";
  at("start").hidden = true;
  const answers = models.map((model) => new Answer(model, nameOf(model), kindOf(model)));
  const turn = newTurn(question, answers);
  turn.scrollIntoView({ block: "start" });
  at("said").replaceChildren();
  say(`${models.map(nameOf).join(", ")}: writing`);
  const control = new AbortController();
  running = control;
  refresh();
  const again = comparer(answers);
  const onPiece = () => {
    again();
    // Stacked answers are not followed: the adapter's is at the top, and the others would push it out of view.
    if (follow() && (wide.matches || answers.length === 1)) window.scrollTo(0, document.documentElement.scrollHeight);
  };
  await Promise.all(answers.map((answer) => write(answer, question, body, control.signal, onPiece)));
  compare(answers, false);
  if (running === control) running = null;
  refresh();
}

function refresh() {
  const models = chosen();
  const busy = running !== null;
  at("models").disabled = turns > 0;
  at("setup-chosen").textContent = models.map(nameOf).join(", ");
  at("models-note").textContent = turns
    ? "New chat lets you choose again."
    : models.length > MOST_COLUMNS
      ? `At most ${MOST_COLUMNS}: a browser opens no more connections to one server.`
      : "Two or more are compared; the first chosen one is what the others are compared with.";
  at("send").disabled = busy || !models.length || models.length > MOST_COLUMNS || !at("message").value.trim();
  const focused = document.activeElement === at("stop");
  at("stop").hidden = !busy;
  if (focused && !busy) at("message").focus();
}

function newChat() {
  running?.abort();
  running = null;
  histories = new Map();
  turns = 0;
  hideAlternatives();
  at("turns").replaceChildren();
  at("start").hidden = false;
  problem("");
  at("said").replaceChildren();
  say("New chat");
  refresh();
  at("message").focus();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!at("send").disabled) send();
});
at("message").addEventListener("input", refresh);
at("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!at("send").disabled) send();
});
at("stop").addEventListener("click", () => running?.abort());
at("new-chat").addEventListener("click", newChat);
at("models").addEventListener("change", () => {
  refresh();
  showPrompting();
});
at("settings").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("key-field").hidden || !at("key").value) return;
  sessionStorage.setItem(KEY, at("key").value.trim());
  if (await loadModels()) {
    at("key").value = "";
    at("message").focus();
  }
});
// Narrow windows begin with the settings closed; the wide ones have room beside the chat.
at("setup").open = wide.matches;
wide.addEventListener("change", () => (at("setup").open = wide.matches));
loadModels();
