// The JSON API with the browser's session cookie, and polling that survives a server that is away.

import { byId, setText } from "./dom.js";
import { clockTime } from "./format.js";

const TIMEOUT_MS = 15000;
const LONGEST_RETRY_MS = 10000;

/** The API's answer was a problem document. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? `The server returned status ${status}.`);
    this.status = status;
  }
}

/** No answer came: the network or the server is away. */
export class Unreachable extends Error {}

async function answer(method, path, content) {
  try {
    const response = await fetch(path, {
      method,
      body: content === undefined ? undefined : JSON.stringify(content),
      headers: { Accept: "application/json", ...(content !== undefined && { "Content-Type": "application/json" }) },
      credentials: "same-origin",
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    const isJson = response.headers.get("content-type")?.includes("json");
    return { ok: response.ok, status: response.status, body: isJson ? await response.json() : null };
  } catch (error) {
    throw new Unreachable(`Cannot reach the server (${error.message}); try again.`, { cause: error });
  }
}

async function request(method, path, content) {
  const { ok, status, body } = await answer(method, path, content);
  if (ok) return body;
  if (status === 401) location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
  throw new ApiError(status, body);
}

export const get = (path) => request("GET", path);
export const post = (path) => request("POST", path);
export const patch = (path, content) => request("PATCH", path, content);

/** The download address of an artifact; its name may hold slashes. */
export const artifactUrl = (jobId, name) =>
  `/v1/jobs/${jobId}/artifacts/${name.split("/").map(encodeURIComponent).join("/")}`;

/** Read a list to its end, a page at a time: `address(cursor)` is a page's path, `cursorOf(page)` leads to the next. */
export async function getAll(address, cursorOf, cursor) {
  const rows = [];
  for (;;) {
    const page = await get(address(cursor));
    rows.push(...page.data);
    if (!page.has_more || page.data.length === 0) return rows;
    cursor = cursorOf(page);
  }
}

let lastContact = Date.now();

function showBanner(text) {
  setText(byId("connection"), text);
  byId("connection").hidden = false;
}

function showContact() {
  lastContact = Date.now();
  byId("connection").hidden = true;
}

const passes = (error) =>
  error instanceof Unreachable || (error instanceof ApiError && (error.status >= 500 || error.status === 429));

/** Show why a poll failed; return how long to wait before the next (milliseconds), or null to stop. */
function afterFailure(error, failures) {
  if (passes(error)) {
    const reason = error instanceof Unreachable ? "Cannot reach the server" : `The server returned status ${error.status}`;
    showBanner(`${reason}; retrying. This page shows data from ${clockTime(lastContact)}.`);
    return Math.min(LONGEST_RETRY_MS, 1000 * 2 ** failures);
  }
  if (error.status !== 401) showBanner(error.message);
  if (!(error instanceof ApiError)) reportError(error);
  return null;
}

/**
 * Run `task` now and again. It returns how long to wait in milliseconds, or null to stop. A hidden tab waits ten times
 * longer and catches up when it is shown. While the server does not answer, a banner reports it and the polls go on.
 * Returns `{wake}`, which runs the task at once (or right after the run in progress), also after it had stopped.
 */
export function poll(task) {
  let timer = 0;
  let running = false;
  let again = false;
  let failures = 0;
  let wait = 0;

  async function run() {
    clearTimeout(timer);
    again = running;
    if (running) return;
    running = true;
    try {
      wait = await task();
      failures = 0;
      showContact();
    } catch (error) {
      wait = afterFailure(error, failures);
      failures += 1;
    }
    running = false;
    if (again) run();
    else if (wait !== null) timer = setTimeout(run, document.hidden ? 10 * wait : wait);
  }

  document.addEventListener("visibilitychange", () => !document.hidden && wait !== null && run());
  window.addEventListener("online", () => wait !== null && run());
  run();
  return { wake: run };
}
