// Behavior of the pages by attribute: data-src, data-every, data-autosave, data-reload, data-submit, data-upload,
// data-into, data-copy and data-confirm. All forms also work without this script, except for uploads.
"use strict";

const POLL_MS = 1000;  // between requests for a part that is not finished
const RETRY_MS = 3000;  // until the next request if the studio does not answer
const SAVE_DELAY_MS = 400;  // from a change to its transmission

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const HTML_OPTIONS = { headers: { Accept: "text/html" }, credentials: "same-origin" };

function announce(text) {
  const region = document.getElementById("announcement");
  if (region.textContent !== text) region.textContent = text;
}

function showOffline(offline) {
  document.getElementById("offline").hidden = !offline;
}

// Return the response of the studio, or null if it does not answer. On status 401, the page that explains it is shown.
async function fetchOrNull(url, options) {
  try {
    const response = await fetch(url, options);
    showOffline(false);
    if (response.status === 401) location.reload();
    return response;
  } catch (error) {
    if (error.name !== "AbortError") showOffline(true);
    return null;
  }
}

function showJobs(number) {
  const badge = document.getElementById("num-jobs");
  badge.hidden = number === "0";
  badge.firstChild.data = number;
}

// Id in the address. Parts that are loaded later move it, so the page scrolls to it again until the user acts.
let target = location.hash.slice(1);
for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
  addEventListener(kind, () => { target = ""; }, { once: true, passive: true });
}

// Fields that the user has changed.
const changed = new WeakSet();
document.addEventListener("input", (event) => changed.add(event.target));

// Return elements with their keys, which also find the elements of a new version of the content.
function withKeys(element, selector) {
  const counts = {};
  return [...element.querySelectorAll(selector)].map((item) => {
    const name = item.id || item.getAttribute("href") || item.ariaLabel || item.querySelector("summary")?.textContent || item.textContent;
    counts[item.tagName + name] = (counts[item.tagName + name] ?? 0) + 1;
    return [`${item.tagName} ${name} ${counts[item.tagName + name]}`, item];
  });
}

// Replace the content of an element. Keep the focus, open details and the values of changed fields.
function replaceContent(element, html) {
  if (element.lastHTML === html) return;
  element.lastHTML = html;
  const [focusable, fields] = ["a, button, input, select, summary, textarea, [tabindex]", "input, select, textarea"];
  const focused = withKeys(element, focusable).find(([, item]) => item === document.activeElement)?.[0];
  const open = new Set(withKeys(element, "details").filter(([, item]) => item.open).map(([key]) => key));
  const values = new Map(withKeys(element, fields).filter(([, item]) => changed.has(item)));
  element.innerHTML = html;
  for (const [key, item] of withKeys(element, "details")) item.open ||= open.has(key);
  for (const [key, item] of withKeys(element, fields)) {
    const { value, checked } = values.get(key) ?? {};
    if (value !== undefined) changed.add(Object.assign(item, { value, checked }));
  }
  if (focused) {
    const target = withKeys(element, focusable).find(([key]) => key === focused)?.[1] ?? element;
    if (target === element) element.tabIndex = -1;  // the focused control no longer exists
    target.focus({ preventScroll: true });
  }
  const announcement = element.querySelector("[data-announce]");
  if (announcement) announce(announcement.dataset.announce);
  connect(element);
  if (target) document.getElementById(target)?.scrollIntoView();
}

// Load a part of the page: again while it is not finished (status 202), and regularly if it has data-every.
async function loadPart(element) {
  element.request?.abort();
  const request = element.request = new AbortController();
  element.setAttribute("aria-busy", "true");
  while (element.isConnected && !request.signal.aborted) {
    if (document.hidden && element.dataset.every) { await sleep(POLL_MS); continue; }
    const response = await fetchOrNull(element.dataset.src, { ...HTML_OPTIONS, signal: request.signal });
    if (request.signal.aborted) return;
    if (response === null) { await sleep(RETRY_MS); continue; }
    const html = await response.text().catch(() => null);
    if (html === null || request.signal.aborted) continue;
    if (response.headers.has("X-Jobs")) showJobs(response.headers.get("X-Jobs"));
    const isPending = response.status === 202;
    // While a new version is computed, keep the old one, unless that is only a progress message.
    if (!isPending || !element.lastHTML || element.querySelector(".busy")) replaceContent(element, html);
    if (isPending) { element.classList.add("updating"); await sleep(POLL_MS); continue; }
    element.classList.remove("updating");
    element.setAttribute("aria-busy", "false");
    if (!element.dataset.every || response.headers.has("X-Done")) break;
    await sleep(Number(element.dataset.every));
  }
}

// Functions that save a form with changes, by form. Each returns true if the changes are valid.
const unsaved = new Map();

// Save changes before a link or a form leaves the page. Stay if they have errors.
async function leaveAfterSaving(event, leave) {
  if (event.defaultPrevented || unsaved.size === 0) return;
  event.preventDefault();
  const results = await Promise.all([...unsaved.values()].map((save) => save()));
  if (results.every(Boolean)) leave();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  const opensTab = event.ctrlKey || event.metaKey || event.shiftKey || link?.target;
  if (link && !opensTab) leaveAfterSaving(event, () => { location.href = link.href; });
});
document.addEventListener("submit", (event) => {
  leaveAfterSaving(event, () => event.target.requestSubmit(event.submitter));
});

// Send a form after a change, show the errors at their fields, and reload the parts whose ids are in data-reload.
function connectAutosave(form) {
  let timer = 0;
  let latest = 0;
  const save = async () => {
    clearTimeout(timer);
    const number = ++latest;
    const body = new URLSearchParams(new FormData(form));
    const response = await fetchOrNull(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
    if (response === null) { timer = setTimeout(save, RETRY_MS); return false; }
    const answer = await response.json().catch(() => null);
    if (answer === null || number !== latest) return false;
    unsaved.delete(form);
    const errors = answer.errors ?? (answer.error ? { "": answer.error.message } : {});
    showErrors(form, errors);
    for (const [id, text] of Object.entries(answer)) {
      const target = document.getElementById(id);
      if (target && typeof text === "string") target.textContent = text;
    }
    if (Object.keys(errors).length === 0) {
      announce("Saved");
      for (const field of form.elements) changed.delete(field);  // a reloaded part shows the saved values
    }
    for (const id of (form.dataset.reload ?? "").split(" ").filter(Boolean)) loadPart(document.getElementById(id));
    return Object.keys(errors).length === 0;
  };
  form.addEventListener("input", () => {
    unsaved.set(form, save);
    clearTimeout(timer);
    timer = setTimeout(save, SAVE_DELAY_MS);
  });
  form.addEventListener("submit", (event) => {
    if (event.submitter?.name || event.submitter?.hasAttribute("formaction")) return;
    event.preventDefault();
    save();
  });
}

function showErrors(form, errors) {
  for (const field of form.querySelectorAll(".field")) {
    const input = field.querySelector("input, select, textarea");
    const line = field.querySelector(".error");
    if (!input || !line) continue;
    const text = errors[input.name] ?? "";
    line.textContent = text;
    line.hidden = !text;
    field.classList.toggle("wrong", Boolean(text));
    if (!text) { input.removeAttribute("aria-invalid"); continue; }
    input.setAttribute("aria-invalid", "true");
    const described = new Set((input.getAttribute("aria-describedby") ?? "").split(" ").filter(Boolean));
    input.setAttribute("aria-describedby", [...described.add(line.id)].join(" "));
  }
  const named = [...form.elements].map((input) => input.name);
  const others = Object.entries(errors).filter(([name]) => !named.includes(name)).map(([, text]) => text);
  announce(Object.values(errors).join(" "));
  const box = form.querySelector(".form-error");
  if (box) { box.textContent = others.join(" "); box.hidden = others.length === 0; }
}

// Upload a file from the file input or by drag and drop, then go to the address in the answer, or
// select the file in the list whose id is in data-into.
function connectUpload(form) {
  const input = form.querySelector("input[type=file]");
  const status = form.querySelector("[role=status]");
  const send = (file) => {
    if (!file) return;
    const fail = (text) => { status.replaceChildren(text); status.className = "error"; input.value = ""; };
    if (file.size > Number(form.dataset.max)) { fail(form.dataset.tooLarge); return; }
    const request = new XMLHttpRequest();
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = 0;
    bar.setAttribute("aria-label", "Upload of " + file.name);
    status.replaceChildren("Uploading " + file.name + " …", bar);
    request.upload.onprogress = (event) => { if (event.lengthComputable) bar.value = event.loaded / event.total; };
    request.upload.onload = () => { status.replaceChildren("Reading " + file.name + " …"); };
    request.onerror = () => fail("The upload was interrupted. Choose the file again.");
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* an answer without JSON is an error */ }
      if (request.status === 200 && answer.url) { location.href = answer.url; return; }
      if (request.status === 200) {
        const list = document.getElementById(form.dataset.into);
        list.add(new Option(answer.file, answer.file));
        list.value = answer.file;
        status.replaceChildren(answer.file + " is selected below. " + answer.note);
        input.value = "";
        return;
      }
      const { message, hint } = answer.error ?? { message: "the upload failed" };
      fail([message, hint].filter(Boolean).map((text) => text[0].toUpperCase() + text.slice(1) + ".").join(" "));
    };
    status.className = "";
    request.open("PUT", form.dataset.upload + encodeURIComponent(file.name));
    request.setRequestHeader("Accept", "application/json");
    request.send(file);
  };
  input.addEventListener("change", () => send(input.files[0]));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    form.addEventListener(kind, (event) => {
      event.preventDefault();
      form.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") send(event.dataTransfer.files[0]);
    });
  }
}

function connectCopy(button) {
  const text = button.textContent;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source);
    try { await navigator.clipboard.writeText(source.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "Copied";
    announce("Copied");
    setTimeout(() => { button.textContent = text; }, 2000);
  });
}

// Ask before a form is sent.
function connectConfirm(form) {
  form.addEventListener("submit", (event) => {
    if (form.confirmed) return;
    event.preventDefault();
    const dialog = document.createElement("dialog");
    const question = document.createElement("p");
    question.textContent = form.dataset.confirm;
    question.id = "question";
    dialog.setAttribute("aria-labelledby", "question");
    const button = (label, kind) => Object.assign(document.createElement("button"), { textContent: label, className: kind });
    const actions = Object.assign(document.createElement("form"), { method: "dialog", className: "actions" });
    const cancel = button("Cancel", "plain");
    const confirm = button(event.submitter?.textContent ?? "Continue", "danger");
    confirm.value = "yes";
    actions.append(cancel, confirm);
    dialog.append(question, actions);
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (dialog.returnValue !== "yes") return;
      form.confirmed = true;
      form.requestSubmit(event.submitter);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

function connect(root) {
  root.querySelectorAll("[data-src]").forEach(loadPart);
  root.querySelectorAll("form[data-autosave]").forEach(connectAutosave);
  root.querySelectorAll("form[data-submit]").forEach((form) => form.addEventListener("change", () => form.requestSubmit()));
  root.querySelectorAll("form[data-upload]").forEach(connectUpload);
  root.querySelectorAll("[data-copy]").forEach(connectCopy);
  root.querySelectorAll("form[data-confirm]").forEach(connectConfirm);
}

connect(document);
