// Client of the HTTP API.

class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function withKey(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Error message of a response, or its status.
async function errorMessage(response) {
  const text = await response.text();
  try {
    const details = JSON.parse(text);
    return details.error?.message ?? details.detail ?? `status ${response.status}`;
  } catch {
    return text.slice(0, 300) || `status ${response.status}`;
  }
}

async function request(path, key, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...withKey(key) } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server cannot be reached.", 0);
  }
  if (!response.ok) throw new RequestError(await errorMessage(response), response.status);
  return response;
}

async function listModels(key) {
  return (await (await request("v1/models", key)).json()).data;
}

// Prompting of a model's training rows, and true if it reads images: {system, examples, images}. Empty if the server
// does not know it.
async function fetchPrompting(model, key) {
  try {
    return await (await request(`prompting/${encodeURIComponent(model)}`, key)).json();
  } catch {
    return { system: "", examples: [], images: false };
  }
}

// Server-sent events of a response: the JSON of each `data:` line until "[DONE]".
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split(/\r\n|\n|\r/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") complete = true;
      else if (data) yield JSON.parse(data);
    }
  }
  if (!complete) throw new RequestError("The connection was closed before the answer was complete.", 0);
}

// Stream a completion. Calls `onChunk({text, tokens, finish, usage})` for each event.
async function stream(body, key, signal, onChunk) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const event of readEvents(response)) {
    if (event.error) throw new RequestError(event.error.message ?? "The server failed.", 0);
    const choice = event.choices?.[0];
    onChunk({
      text: choice?.delta?.content ?? "",
      tokens: choice?.logprobs?.content ?? null,
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    });
  }
}
