// Answer of one model: a column of a turn. Displays streamed chunks and measures their speed.

// Decodes tokens to text. If a character is spread over several tokens, only the last one has text.
class TokenDecoder {
  constructor() {
    this.decoder = new TextDecoder();
    this.pending = [];
  }

  // Return the text and the entries of the next span, or null if its character is incomplete.
  next(entry) {
    this.pending.push(entry);
    const text = entry.bytes ? this.decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token;
    if (!text && entry.bytes?.length) return null;
    const entries = this.pending;
    this.pending = [];
    return { text, entries };
  }
}

class Answer {
  constructor(model, name, kind = "") {
    const fragment = document.getElementById("answer").content.cloneNode(true);
    this.element = fragment.querySelector("article");
    Object.assign(this, { model, name });
    this.element.classList.toggle("adapter", kind === "adapter");
    this.content = "";
    this.spans = [];
    this.count = 0;
    this.texts = new TokenDecoder();
    this.startTime = performance.now();
    this.state = "waiting";
    this.part("name").textContent = name;
    this.element.setAttribute("aria-label", `Answer of ${name}`);
    this.text = this.part("text");
    this.text.setAttribute("aria-label", `Text of ${name}; arrow keys move between tokens`);
    this.text.classList.add("writing-now");
    this.show("waiting …");
    enableKeyboard(this.text);
  }

  part(name) {
    return this.element.querySelector(`.${name}`);
  }

  show(state) {
    this.part("state").textContent = state;
  }

  get writing() {
    return this.state === "waiting" || this.state === "writing";
  }

  addChunk({ text, tokens, finish, usage }) {
    const now = performance.now();
    this.content += text;
    const decoded = tokens ? tokens.map((entry) => this.texts.next(entry)) : text ? [{ text, entries: null }] : [];
    for (const item of decoded) {
      this.count += 1;
      if (!item) continue;
      const span = tokenElement(item.text, item.entries, this.spans.length, this.name);
      this.spans.push(span);
      this.text.append(span);
    }
    if (decoded.length) this.measure(now);
    if (usage?.completion_tokens) this.part("count").textContent = usage.completion_tokens;
    if (finish) this.finishReason = finish;
  }

  measure(now) {
    if (this.first === undefined) {
      this.first = now;
      this.firstCount = this.count;
      this.state = "writing";
      this.show("writing …");
      this.part("first").textContent = `${Math.round(now - this.startTime)} ms`;
    }
    this.part("count").textContent = this.count;
    // The rate excludes the tokens of the first chunk, because it starts with that chunk.
    const seconds = (now - this.first) / 1000;
    if (seconds > 0 && this.count > this.firstCount) {
      this.part("rate").textContent = ((this.count - this.firstCount) / seconds).toFixed(1);
    }
  }

  // Shorten the displayed text if the server removed stop strings or spaces.
  trim() {
    const shown = this.spans.map((span) => span.textContent).join("");
    if (shown === this.content || !shown.startsWith(this.content)) return;
    let remaining = this.content.length;
    for (const span of this.spans) {
      span.textContent = span.textContent.slice(0, remaining);
      remaining -= span.textContent.length;
    }
    for (let last; (last = this.spans.at(-1)) && !last.textContent; ) this.spans.pop().remove();
  }

  finish(error) {
    this.text.classList.remove("writing-now");
    const reasons = { stop: "finished", length: "token limit reached", timeout: "timed out", cancelled: "stopped" };
    if (!error) {
      this.state = "done";
      this.trim();
      this.show(reasons[this.finishReason] ?? this.finishReason ?? "finished");
    } else if (error.name === "AbortError") {
      this.state = "done";
      this.show("stopped");
    } else {
      this.state = "failed";
      this.show("failed");
      const line = document.createElement("p");
      line.className = "text wrong";
      line.textContent = error.message;
      this.text.after(line);
      if (!this.spans.length) this.text.hidden = true;
    }
    if (this.state === "done" && !this.spans.length) {
      this.text.textContent = "(no text)";
      this.text.classList.add("quiet");
    }
  }

  // If nearly all tokens differ, only the summary is shown, because marks would be useless.
  mark(differs) {
    const count = differs.reduce((sum, mark) => sum + mark, 0);
    this.text.classList.toggle("all-differ", count > 0.7 * differs.length);
    this.spans.forEach((span, index) => span.classList.toggle("differs", Boolean(differs[index])));
  }

  // Summarize the marks in words.
  summarize(differs, reference) {
    const count = differs.reduce((sum, mark) => sum + mark, 0);
    const all = differs.length;
    this.part("difference").textContent = !all
      ? ""
      : !count
        ? `All ${all} tokens are the same${reference ? ` as in ${reference}` : ""}.`
        : `${count} of ${all} tokens ${reference ? `differ from ${reference}` : "differ from other answers"}, the first is token ${differs.indexOf(1) + 1}.`;
  }
}
