// What is asked of the server.

// Server-sent events of a POST, parsed from JSON; throws what the server said was wrong, with its status.
export async function* stream(url, body, headers, signal) {
  let response;
  try {
    const sent = { method: "POST", headers: { "Content-Type": "application/json", ...headers } };
    response = await fetch(url, { ...sent, body: JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (!response.ok) throw await complaint(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer was broken off.");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (!data.length) continue;
      if (data[0] === "[DONE]") return;
      const chunk = JSON.parse(data.join("\n"));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

export async function get(url, headers) {
  const response = await fetch(url, { headers, signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw await complaint(response);
  return response.json();
}

async function complaint(response) {
  let message = `The server answers ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not in the API's form: something stands before the server
  }
  return Object.assign(new Error(message), { status: response.status });
}
