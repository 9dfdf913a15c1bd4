// What goes to the server and what comes back. Knows nothing of the page.

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function withKey(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// The reason that an answer gives for its status, or the status.
async function reasonOf(response) {
  const text = await response.text();
  try {
    const told = JSON.parse(text);
    return told.error?.message ?? told.detail ?? `status ${response.status}`;
  } catch {
    return text.slice(0, 300) || `status ${response.status}`;
  }
}

async function ask(path, key, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...withKey(key) } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.", 0);
  }
  if (!response.ok) throw new Refused(await reasonOf(response), response.status);
  return response;
}

async function listModels(key) {
  return (await (await ask("v1/models", key)).json()).data;
}

// How the rows of a model's run are prompted: {system, examples}; nothing where the server does not know.
async function promptingOf(model, key) {
  try {
    return await (await ask(`prompting/${encodeURIComponent(model)}`, key)).json();
  } catch {
    return { system: "", examples: [] };
  }
}

// The events of a stream as they come: each `data:` line's JSON, until "[DONE]".
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split(/\r\n|\n|\r/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") ended = true;
      else if (data) yield JSON.parse(data);
    }
  }
  if (!ended) throw new Refused("The server ended the answer before its end.", 0);
}

// One answer, streamed: `onPiece({text, tokens, finish, usage})` for each event.
async function stream(body, key, signal, onPiece) {
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Refused(event.error.message ?? "The server failed.", 0);
    const choice = event.choices?.[0];
    onPiece({
      text: choice?.delta?.content ?? "",
      tokens: choice?.logprobs?.content ?? null,
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    });
  }
}
