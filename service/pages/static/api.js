// The service's API, with the session's cookie and its CSRF token.

export class ApiError extends Error {
  /** `status` 0: the service could not be reached, or its answer did not arrive. */
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }

  /** Whether the same request may succeed later. */
  get passing() {
    const signInHelps = this.status === 401 || this.code === "bad_csrf_token";
    return this.status === 0 || this.status === 429 || this.status >= 500 || signInHelps;
  }
}

let csrf = "";

/** Who is signed in; needed before anything that changes something. */
export async function openSession() {
  const session = await call("GET", "/v1/session");
  csrf = session.csrf ?? "";
  return session;
}

/** One request; its JSON, or null where the answer is empty. Throws ApiError. */
export async function call(method, path, body) {
  const response = await send(method, path, body);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    // The connection broke within it, or what answered is not the service: a hotel's sign-in page, say.
    throw new ApiError("The service's answer could not be read. See that you are online, then try again.");
  }
}

/** The chunks of a streamed chat, up to its end. Throws ApiError, and AbortError when `signal` says so. */
export async function* streamChat(body, signal) {
  const response = await send("POST", "/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      read = { done: true };
    }
    if (read.done) throw new ApiError("The connection broke before the answer was complete. Try again.");
    const events = (rest + read.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new ApiError(chunk.error.message, 502, chunk.error.code);
      yield chunk;
    }
  }
}

async function send(method, path, body, signal) {
  const headers = { "X-CSRF-Token": csrf };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? body : JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The service cannot be reached. See that it runs and that you are online, then try again.");
  }
  if (response.ok) return response;
  const problem = (await response.json().catch(() => ({}))).error ?? {};
  throw new ApiError(problem.message ?? `The service answered ${response.status}.`, response.status, problem.code);
}
