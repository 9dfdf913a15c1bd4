// One answer: a column of one turn. Grows as its pieces come, and measures them.

// The text of each token, where a character may be spread over several: those before its last one have none.
class TokenTexts {
  constructor() {
    this.decoder = new TextDecoder();
    this.waiting = [];
  }

  // The text and the entries of the next span, or null while its character is not whole.
  next(entry) {
    this.waiting.push(entry);
    const text = entry.bytes ? this.decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token;
    if (!text && entry.bytes?.length) return null;
    const entries = this.waiting;
    this.waiting = [];
    return { text, entries };
  }
}

class Answer {
  constructor(model, name, kind = "") {
    const made = document.getElementById("answer").content.cloneNode(true);
    this.element = made.querySelector("article");
    Object.assign(this, { model, name });
    this.element.classList.toggle("adapter", kind === "adapter");
    this.content = "";
    this.spans = [];
    this.count = 0;
    this.texts = new TokenTexts();
    this.begun = performance.now();
    this.state = "waiting";
    this.part("name").textContent = name;
    this.element.setAttribute("aria-label", `Answer of ${name}`);
    this.text = this.part("text");
    this.text.setAttribute("aria-label", `Text of ${name}; arrow keys go from token to token`);
    this.text.classList.add("writing-now");
    this.show("waiting …");
    moveByKeys(this.text);
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

  take({ text, tokens, finish, usage }) {
    const now = performance.now();
    this.content += text;
    const got = tokens ? tokens.map((entry) => this.texts.next(entry)) : text ? [{ text, entries: null }] : [];
    for (const one of got) {
      this.count += 1;
      if (!one) continue;
      const span = tokenElement(one.text, one.entries, this.spans.length, this.name);
      this.spans.push(span);
      this.text.append(span);
    }
    if (got.length) this.measure(now);
    if (usage?.completion_tokens) this.part("count").textContent = usage.completion_tokens;
    if (finish) this.finish = finish;
  }

  measure(now) {
    if (this.first === undefined) {
      this.first = now;
      this.before = this.count;
      this.state = "writing";
      this.show("writing …");
      this.part("first").textContent = `${Math.round(now - this.begun)} ms`;
    }
    this.part("count").textContent = this.count;
    // The tokens of the first piece came with it, so the rate counts those after them.
    const seconds = (now - this.first) / 1000;
    if (seconds > 0 && this.count > this.before) {
      this.part("rate").textContent = ((this.count - this.before) / seconds).toFixed(1);
    }
  }

  // Where stop strings or spaces were taken off, the text shown ends where the answer does.
  trim() {
    const shown = this.spans.map((span) => span.textContent).join("");
    if (shown === this.content || !shown.startsWith(this.content)) return;
    let left = this.content.length;
    for (const span of this.spans) {
      span.textContent = span.textContent.slice(0, left);
      left -= span.textContent.length;
    }
    for (let last; (last = this.spans.at(-1)) && !last.textContent; ) this.spans.pop().remove();
  }

  end(error) {
    this.text.classList.remove("writing-now");
    const reasons = { stop: "finished", length: "at the limit", timeout: "out of time", cancelled: "stopped" };
    if (!error) {
      this.state = "ended";
      this.trim();
      this.show(reasons[this.finish] ?? this.finish ?? "finished");
    } else if (error.name === "AbortError") {
      this.state = "ended";
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
    if (this.state === "ended" && !this.spans.length) {
      this.text.textContent = "(no text)";
      this.text.classList.add("quiet");
    }
  }

  // Marks on nearly everything would show nothing: the line below says it then.
  mark(differs) {
    const count = differs.reduce((sum, one) => sum + one, 0);
    this.text.classList.toggle("another", count > 0.7 * differs.length);
    this.spans.forEach((span, place) => span.classList.toggle("differs", Boolean(differs[place])));
  }

  // A line that says in words what the marks show.
  tell(differs, reference) {
    const count = differs.reduce((sum, one) => sum + one, 0);
    const all = differs.length;
    this.part("difference").textContent = !all
      ? ""
      : !count
        ? `All ${all} tokens are the same${reference ? ` as those of ${reference}` : ""}.`
        : `${count} of ${all} tokens ${reference ? `differ from ${reference}` : "are not in every answer"}, the first is token ${differs.indexOf(1) + 1}.`;
  }
}
