// Tokens on the page: their spans, moving over them, and the alternatives of the one that is looked at.

const alternatives = document.getElementById("alternatives");
let shownToken = null;
let hiding = 0;

// A token's text with its white space made visible.
function visible(text) {
  return text === "" ? "(empty)" : text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 && share < 100 ? ">99.9 %" : share < 0.05 ? "<0.1 %" : `${share.toFixed(1)} %`;
}

// The log-probabilities as rows: the likeliest tokens, and the chosen one where it is not among them.
function rowsOf(entries) {
  const last = entries[entries.length - 1];
  const rows = (last.top_logprobs ?? []).map((row) => ({ ...row, chosen: row.token === last.token }));
  if (!rows.some((row) => row.chosen)) rows.push({ ...last, chosen: true });
  return rows.sort((one, other) => other.logprob - one.logprob);
}

function rowElement({ token, logprob, chosen }) {
  const row = document.createElement("tr");
  row.className = chosen ? "chosen" : "";
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = visible(token) + (chosen ? " ✓" : "");
  const share = document.createElement("td");
  share.textContent = percent(logprob);
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.width = `${100 * Math.exp(Math.min(0, logprob))}%`;
  share.append(bar);
  const value = document.createElement("td");
  value.textContent = logprob <= -100 ? "−∞" : logprob.toFixed(2).replace("-", "−");
  row.append(name, share, value);
  return row;
}

function showAlternatives(span) {
  clearTimeout(hiding);
  if (shownToken === span) return;
  hideAlternatives();
  const entries = span.entries;
  const about = alternatives.querySelector(".about");
  about.textContent = `Token ${span.place + 1} of ${span.column}`;
  if (entries.length > 1) about.textContent += `, one character of ${entries.length} tokens: the last of them`;
  if (span.classList.contains("differs")) about.textContent += ". Not the same in all answers.";
  alternatives.querySelector("tbody").replaceChildren(...rowsOf(entries).map(rowElement));
  alternatives.hidden = false;
  shownToken = span;
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "alternatives");
  placeAlternatives(span);
}

// Below the token, or above it where there is no room; always inside the window.
function placeAlternatives(span) {
  const token = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const box = alternatives.getBoundingClientRect();
  const left = Math.min(Math.max(12, token.left - 12), window.innerWidth - box.width - 12);
  const below = token.bottom + 8;
  const top = below + box.height > window.innerHeight - 8 ? Math.max(8, token.top - box.height - 8) : below;
  alternatives.style.left = `${left}px`;
  alternatives.style.top = `${top}px`;
}

function hideAlternatives() {
  clearTimeout(hiding);
  alternatives.hidden = true;
  shownToken?.classList.remove("shown");
  shownToken?.removeAttribute("aria-describedby");
  shownToken = null;
}

// The pointer may go over to the alternatives without their closing.
function hideSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    const focused = document.activeElement;
    if (focused?.entries && focused !== shownToken) showAlternatives(focused);
    else if (focused !== shownToken) hideAlternatives();
  }, 200);
}

alternatives.addEventListener("pointerenter", () => clearTimeout(hiding));
alternatives.addEventListener("pointerleave", hideSoon);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideAlternatives();
});
window.addEventListener("scroll", () => shownToken && placeAlternatives(shownToken), { passive: true });
window.addEventListener("resize", hideAlternatives);

function tokenElement(text, entries, place, column) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = text;
  if (/^\s*\n\s*$/.test(text)) span.classList.add("blank");
  if (entries) {
    span.classList.add("looked");
    Object.assign(span, { entries, place, column, tabIndex: place ? -1 : 0 });
  }
  return span;
}

// One stop for Tab in each answer; arrows, Home and End move over its tokens.
function moveByKeys(text) {
  const lookedAt = (event) => (event.target.entries ? event.target : null);
  text.addEventListener("pointerover", (event) => lookedAt(event) && showAlternatives(event.target));
  text.addEventListener("pointerout", (event) => lookedAt(event) && hideSoon());
  text.addEventListener("focusin", (event) => {
    if (!lookedAt(event)) return;
    for (const other of text.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    event.target.tabIndex = 0;
    showAlternatives(event.target);
  });
  text.addEventListener("focusout", hideSoon);
  text.addEventListener("keydown", (event) => {
    const spans = [...text.querySelectorAll(".looked")];
    const here = spans.indexOf(event.target);
    if (here < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const differing = (step) => {
      for (let at = here + step; spans[at]; at += step) if (spans[at].classList.contains("differs")) return at;
      return here;
    };
    const places = {
      ArrowRight: here + 1,
      ArrowLeft: here - 1,
      ArrowDown: differing(1),
      ArrowUp: differing(-1),
      Home: 0,
      End: spans.length - 1,
    };
    if (!(event.key in places)) return;
    event.preventDefault();
    const next = spans[Math.min(Math.max(places[event.key], 0), spans.length - 1)];
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
    placeAlternatives(next);
  });
}
