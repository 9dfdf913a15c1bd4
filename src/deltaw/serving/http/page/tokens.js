// Token elements, keyboard navigation between them, and the popup with a token's alternatives.

const alternatives = document.getElementById("alternatives");
let shownToken = null;
let hideTimer = 0;

// Replace whitespace in a token's text by visible symbols.
function showWhitespace(text) {
  return text === "" ? "(empty)" : text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 && share < 100 ? ">99.9 %" : share < 0.05 ? "<0.1 %" : `${share.toFixed(1)} %`;
}

// Table rows: the most likely tokens, and the chosen token if it is not one of them.
function rowsOf(entries) {
  const last = entries[entries.length - 1];
  const rows = (last.top_logprobs ?? []).map((row) => ({ ...row, chosen: row.token === last.token }));
  if (!rows.some((row) => row.chosen)) rows.push({ ...last, chosen: true });
  return rows.sort((a, b) => b.logprob - a.logprob);
}

function rowElement({ token, logprob, chosen }) {
  const row = document.createElement("tr");
  row.className = chosen ? "chosen" : "";
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = showWhitespace(token) + (chosen ? " ✓" : "");
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
  clearTimeout(hideTimer);
  if (shownToken === span) return;
  hideAlternatives();
  const entries = span.entries;
  const about = alternatives.querySelector(".about");
  about.textContent = `Token ${span.index + 1} of ${span.column}`;
  if (entries.length > 1) about.textContent += `, one character of ${entries.length} tokens, the last is shown`;
  if (span.classList.contains("differs")) about.textContent += ". Differs between answers.";
  alternatives.querySelector("tbody").replaceChildren(...rowsOf(entries).map(rowElement));
  alternatives.hidden = false;
  shownToken = span;
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "alternatives");
  positionAlternatives(span);
}

// Position the popup below the token, or above it if there is no room, and inside the window.
function positionAlternatives(span) {
  const token = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const box = alternatives.getBoundingClientRect();
  const left = Math.min(Math.max(12, token.left - 12), window.innerWidth - box.width - 12);
  const below = token.bottom + 8;
  const top = below + box.height > window.innerHeight - 8 ? Math.max(8, token.top - box.height - 8) : below;
  alternatives.style.left = `${left}px`;
  alternatives.style.top = `${top}px`;
}

function hideAlternatives() {
  clearTimeout(hideTimer);
  alternatives.hidden = true;
  shownToken?.classList.remove("shown");
  shownToken?.removeAttribute("aria-describedby");
  shownToken = null;
}

// Delayed, so that the pointer can move to the popup.
function hideSoon() {
  clearTimeout(hideTimer);
  hideTimer = setTimeout(() => {
    const focused = document.activeElement;
    if (focused?.entries && focused !== shownToken) showAlternatives(focused);
    else if (focused !== shownToken) hideAlternatives();
  }, 200);
}

alternatives.addEventListener("pointerenter", () => clearTimeout(hideTimer));
alternatives.addEventListener("pointerleave", hideSoon);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideAlternatives();
});
window.addEventListener("scroll", () => shownToken && positionAlternatives(shownToken), { passive: true });
window.addEventListener("resize", hideAlternatives);

function tokenElement(text, entries, index, column) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = text;
  if (/^\s*\n\s*$/.test(text)) span.classList.add("blank");
  if (entries) {
    span.classList.add("inspectable");
    Object.assign(span, { entries, index, column, tabIndex: index ? -1 : 0 });
  }
  return span;
}

// Each answer is one tab stop. Arrow keys, Home and End move between its tokens.
function enableKeyboard(text) {
  const isInspectable = (event) => (event.target.entries ? event.target : null);
  text.addEventListener("pointerover", (event) => isInspectable(event) && showAlternatives(event.target));
  text.addEventListener("pointerout", (event) => isInspectable(event) && hideSoon());
  text.addEventListener("focusin", (event) => {
    if (!isInspectable(event)) return;
    for (const other of text.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    event.target.tabIndex = 0;
    showAlternatives(event.target);
  });
  text.addEventListener("focusout", hideSoon);
  text.addEventListener("keydown", (event) => {
    const spans = [...text.querySelectorAll(".inspectable")];
    const current = spans.indexOf(event.target);
    if (current < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const differing = (step) => {
      for (let i = current + step; spans[i]; i += step) if (spans[i].classList.contains("differs")) return i;
      return current;
    };
    const targets = {
      ArrowRight: current + 1,
      ArrowLeft: current - 1,
      ArrowDown: differing(1),
      ArrowUp: differing(-1),
      Home: 0,
      End: spans.length - 1,
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    const next = spans[Math.min(Math.max(targets[event.key], 0), spans.length - 1)];
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
    positionAlternatives(next);
  });
}
