// Chat page: models, settings and turns.

const KEY = "deltaw-api-key";
// Browsers open at most six connections to a server, so a seventh answer would have to wait.
const MAX_COLUMNS = 6;
const TOP = 5;
// Pixels above a turn after scrolling to it.
const TURN_MARGIN = 16;
const byId = (id) => document.getElementById(id);
const key = () => sessionStorage.getItem(KEY) ?? "";
// Lines are appended, not replaced, so that screen readers read all of them.
const announce = (text) => {
  const line = document.createElement("p");
  line.textContent = text;
  byId("log").append(line);
};
const problem = (text) => (byId("problem").textContent = text);

// Conversation by model. Each model continues from its own answers.
let histories = new Map();
let turns = 0;
let running = null;

const wide = window.matchMedia("(min-width: 56.01rem)");

// Models

// Display names: last part of a path or reference, without version and file type.
let names = new Map();
const nameOf = (model) => names.get(model) ?? model;

function shortNames(models) {
  const short = models.map(({ id }) => id.replace(/^(pypi|ollama|lmstudio):/, "").split("/").pop().replace(/==.*$|\.gguf$/i, "") || id);
  const isDuplicate = (name) => short.indexOf(name) !== short.lastIndexOf(name);
  names = new Map(models.map(({ id }, index) => [id, isDuplicate(short[index]) ? id : short[index]]));
}

const boxes = () => [...byId("model-list").querySelectorAll("input")];
const kindOf = (model) => boxes().find((box) => box.value === model)?.dataset.kind ?? "";
const selectedModels = () => boxes().filter((box) => box.checked).map((box) => box.value);

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
  const previous = new Set(selectedModels());
  const sorted = [...models.filter((model) => !model.parent), ...models.filter((model) => model.parent)];
  shortNames(sorted);
  // Select base model and adapter, or only the adapter if the window is narrow and not a frame of the studio.
  const both = wide.matches || window.parent !== window;
  const first = sorted.find((model) => model.parent) ?? sorted[0];
  byId("model-list").replaceChildren(
    ...sorted.map((model, index) => modelChoice(model, model === first || (both && index < 2))),
  );
  if (previous.size) for (const box of boxes()) box.checked = previous.has(box.value);
  const adapters = models.filter((model) => model.parent).length;
  const adaptersText = adapters === 1 ? "an adapter" : `${adapters} adapters`;
  byId("serving").textContent = adapters ? `${adaptersText} for ${nameOf(sorted[0].id)}` : "";
  if (!models.length) byId("serving").textContent = "The server has no models.";
}

async function loadModels() {
  try {
    showModels(await listModels(key()));
    await showPrompting();
    byId("key-field").hidden = !key();
    problem("");
    refresh();
    return true;
  } catch (error) {
    showError(error);
    return false;
  }
}

// Model whose training prompts the page shows, with its system prompt.
let currentPrompting = null;

// Show the title and the training prompts of the first selected adapter, or of the base model.
async function showPrompting() {
  const checked = boxes().filter((box) => box.checked);
  const model = (checked.find((box) => box.dataset.kind === "adapter") ?? checked[0])?.value;
  byId("title").textContent = model ? `Chat with ${nameOf(model)}` : "Chat";
  document.title = `${byId("title").textContent} · deltaw`;
  if (!model || model === currentPrompting?.model) return;
  const earlier = currentPrompting;
  currentPrompting = { model, system: earlier?.system ?? "" };
  const { system, examples, images } = await fetchPrompting(model, key());
  if (currentPrompting.model !== model) return;
  if (byId("system").value === currentPrompting.system) byId("system").value = system; // keep the user's text
  currentPrompting.system = system;
  byId("system-note").textContent = system ? `From the training rows of ${nameOf(model)}. Clear it to use no system prompt.` : "";
  byId("example-list").replaceChildren(...examples.map(exampleElement));
  byId("examples").hidden = !examples.length;
  byId("images").hidden = !images;
}

function exampleElement(text) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: text, dir: "auto" });
  button.addEventListener("click", () => {
    byId("message").value = text;
    refresh();
    byId("message").focus();
    if (!byId("send").disabled) send();
  });
  item.append(button);
  return item;
}

function showError(error) {
  if (error.status === 401 || error.status === 403) {
    byId("key-field").hidden = false;
    byId("setup").open = true;
    byId("serving").textContent = "The server requires an API key.";
    if (key()) problem("The server does not accept this API key.");
    byId("key").focus();
  } else {
    byId("serving").textContent = "No models.";
    problem(error.message);
  }
}

// Settings

function number(id) {
  const field = byId(id);
  if (!field.checkValidity()) {
    byId("setup").open = true;
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

// Images

// Larger images are reduced, because each request contains all images of the conversation.
const MAX_SIDE = 1280;
const MAX_BYTES = 300_000;
// Images of the next message: {name, url}.
let attached = [];

// Data URL of an image file. Throws an error if the browser cannot decode it.
async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MAX_BYTES) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * bitmap.width));
  canvas.height = Math.max(1, Math.round(scale * bitmap.height));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function pictureElement({ name, url }) {
  const picture = document.createElement("img");
  Object.assign(picture, { src: url, alt: name });
  return picture;
}

function showAttached() {
  const items = attached.map((image) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: "×", ariaLabel: `Remove ${image.name}` });
    button.addEventListener("click", () => {
      attached = attached.filter((other) => other !== image);
      showAttached();
      announce(`${image.name} removed`);
      byId("add-image").focus();
    });
    item.append(pictureElement(image), button);
    return item;
  });
  byId("image-list").replaceChildren(...items);
}

async function attach(files) {
  problem("");
  for (const file of files) {
    try {
      attached.push({ name: file.name, url: await readImage(file) });
      announce(`${file.name} added`);
    } catch {
      problem(`${file.name} is not an image that this browser can read.`);
    }
  }
  showAttached();
  byId("message").focus();
}

const withImages = (text, images) =>
  images.length ? [...images.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }] : text;

// Turns

function newTurn(question, images, answers) {
  const fragment = byId("turn").content.cloneNode(true);
  turns += 1;
  fragment.querySelector(".question-title").textContent = `Message ${turns}`;
  fragment.querySelector(".question-text").textContent = question;
  fragment.querySelector(".pictures").append(...images.map(pictureElement));
  fragment.querySelector(".answers").append(...answers.map((answer) => answer.element));
  const element = fragment.querySelector(".turn");
  byId("turns").append(fragment);
  return element;
}

function compare(answers, growing) {
  if (answers.length < 2) return;
  const marks = differences(answers.map((answer) => answer.spans.map((span) => span.textContent)), growing);
  answers.forEach((answer, index) => {
    answer.mark(marks[index]);
    if (!growing) answer.summarize([...marks[index]], index ? answers[0].name : "");
  });
}

// Compare growing answers at most every 150 ms.
function comparer(answers) {
  let waiting = 0;
  return () => {
    waiting ||= setTimeout(() => {
      waiting = 0;
      if (answers.some((answer) => answer.writing)) compare(answers, true);
    }, 150);
  };
}

async function write(answer, content, body, signal, onChunk) {
  const conversations = histories; // a new chat replaces the map
  const pastMessages = conversations.get(answer.model) ?? [];
  const conversation = [...pastMessages, { role: "user", content }];
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  try {
    await stream({ model: answer.model, messages, add_system_prompt: false, ...body }, key(), signal, (chunk) => {
      answer.addChunk(chunk);
      onChunk();
    });
    answer.finish();
  } catch (error) {
    answer.finish(error);
    if (error.status === 401) showError(error);
  }
  if (answer.content) conversations.set(answer.model, [...conversation, { role: "assistant", content: answer.content }]);
  if (conversations !== histories) return;
  const text = answer.content.length > 600 ? `${answer.content.slice(0, 600)} …` : answer.content;
  announce(`${answer.name} ${answer.part("state").textContent}: ${text}`);
}

function isNearBottom() {
  const distance = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  return distance < 80;
}

async function send() {
  const question = byId("message").value.trim();
  const models = selectedModels();
  let body;
  try {
    body = settings();
  } catch (error) {
    problem(error.message);
    return;
  }
  problem("");
  byId("message").value = "";
  byId("start").hidden = true;
  const answers = models.map((model) => new Answer(model, nameOf(model), kindOf(model)));
  const images = attached;
  attached = [];
  showAttached();
  const turn = newTurn(question, images, answers);
  turn.scrollIntoView({ block: "start" });
  byId("log").replaceChildren();
  announce(`${models.map(nameOf).join(", ")}: writing`);
  const control = new AbortController();
  running = control;
  refresh();
  const scheduleComparison = comparer(answers);
  const onChunk = () => {
    scheduleComparison();
    if (!isNearBottom()) return;
    // The beginning of several answers stays visible, because a short one would leave the view before a long one ends.
    const beginning = turn.getBoundingClientRect().top - TURN_MARGIN;
    if (answers.length === 1) window.scrollTo(0, document.documentElement.scrollHeight);
    else if (beginning > 0) window.scrollBy(0, beginning);
  };
  await Promise.all(answers.map((answer) => write(answer, withImages(question, images), body, control.signal, onChunk)));
  compare(answers, false);
  if (running === control) running = null;
  refresh();
}

function refresh() {
  const models = selectedModels();
  const busy = running !== null;
  byId("models").disabled = turns > 0;
  byId("setup-selected").textContent = models.map(nameOf).join(", ");
  byId("models-note").textContent = turns
    ? "Start a new chat to change the models."
    : models.length > MAX_COLUMNS
      ? `At most ${MAX_COLUMNS} models: browsers limit the connections to a server.`
      : "Select two or more models to compare them with the first.";
  byId("send").disabled = busy || !models.length || models.length > MAX_COLUMNS || !byId("message").value.trim();
  const focused = document.activeElement === byId("stop");
  byId("stop").hidden = !busy;
  if (focused && !busy) byId("message").focus();
}

function newChat() {
  running?.abort();
  running = null;
  histories = new Map();
  turns = 0;
  attached = [];
  showAttached();
  hideAlternatives();
  byId("turns").replaceChildren();
  byId("start").hidden = false;
  problem("");
  byId("log").replaceChildren();
  announce("New chat");
  refresh();
  byId("message").focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("send").disabled) send();
});
byId("message").addEventListener("input", refresh);
byId("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!byId("send").disabled) send();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("add-image").addEventListener("click", () => byId("image-files").click());
byId("image-files").addEventListener("change", async () => {
  await attach([...byId("image-files").files]);
  byId("image-files").value = "";
});
byId("new-chat").addEventListener("click", newChat);
byId("models").addEventListener("change", () => {
  refresh();
  showPrompting();
});
byId("settings").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (byId("key-field").hidden || !byId("key").value) return;
  sessionStorage.setItem(KEY, byId("key").value.trim());
  if (await loadModels()) {
    byId("key").value = "";
    byId("message").focus();
  }
});
// In narrow windows the settings are initially closed.
byId("setup").open = wide.matches;
wide.addEventListener("change", () => (byId("setup").open = wide.matches));
loadModels();
