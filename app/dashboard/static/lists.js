// A job's events and downloads.

import { artifactUrl } from "./api.js";
import { byId, el, reconcile } from "./dom.js";
import * as format from "./format.js";

const MOST_EVENTS = 300;
const LEVELS = { info: "", warn: "Warning: ", error: "Error: " };

function newEvent(event) {
  const level = Object.hasOwn(LEVELS, event.level) ? event.level : "info";
  return el(
    "li",
    { class: level },
    el("time", { datetime: event.created_at, title: format.fullTime(event.created_at) }, format.clockTime(event.created_at)),
    el("span", {}, LEVELS[level] ? el("strong", {}, LEVELS[level]) : null, event.message),
    el("code", {}, event.code),
  );
}

/** Put new events (oldest first, as the API gives them) on top of those that are there. */
export function addEvents(rows) {
  const list = byId("events");
  list.prepend(...rows.map(newEvent).reverse());
  while (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
  list.hidden = list.children.length === 0;
  byId("events-empty").hidden = !list.hidden;
}

const newDownload = (jobId) => (artifact) =>
  el(
    "tr",
    {},
    el("td", {}, el("a", { href: artifactUrl(jobId, artifact.name), download: true }, artifact.name)),
    el("td", {}, artifact.kind),
    el("td", { class: "number" }, format.bytes(artifact.size_bytes)),
    el("td", {}, el("code", { class: "hash", title: artifact.sha256 }, artifact.sha256)),
  );

/** List the files to download; the gallery's own are shown as the gallery. */
export function showDownloads(jobId, artifacts) {
  const files = artifacts.filter((artifact) => artifact.kind !== "gallery");
  const keep = () => {};
  reconcile(byId("downloads").tBodies[0], files, (artifact) => artifact.name, newDownload(jobId), keep);
  byId("downloads").hidden = files.length === 0;
  byId("downloads-empty").hidden = files.length > 0;
}
