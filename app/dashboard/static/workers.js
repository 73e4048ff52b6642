// The list of workers, updated in place.

import { get, poll } from "./api.js";
import { byId, el, initialData, reconcile, setAttribute, setBadge, setText } from "./dom.js";
import * as format from "./format.js";

const LIVE_MS = 3000;

function newRow(worker) {
  return el(
    "tr",
    {},
    el("td", { class: "name" }, el("b", {}, worker.name)),
    el("td", { "data-label": "Status" }, el("span", { class: "badge" })),
    el("td", { "data-label": "Works on" }, el("a")),
    el("td", { "data-label": "Takes" }, worker.queues.join(", ")),
    el("td", { "data-label": "Labels" }, worker.labels.join(", ") || format.NONE),
    el("td", { class: "number", "data-label": "GPUs" }, format.count(worker.gpus)),
    el(
      "td",
      { class: "number", "data-label": "GPU memory" },
      worker.gpu_memory_gb === null ? format.NONE : `${worker.gpu_memory_gb} GB`,
    ),
    el("td", { class: "number", "data-label": "Up since" }, el("time", { datetime: worker.started_at })),
  );
}

// The rows that have a page of their own; a checkpoint has none.
const PAGES = { job: "jobs", ds: "datasets" };

function fillWork(link, work) {
  setText(link, work?.name ?? format.NONE);
  const page = PAGES[work?.id.split("_")[0]];
  if (page) setAttribute(link, "href", `/${page}/${work.id}`);
  else link.removeAttribute("href");
}

function fillRow(row, worker) {
  setBadge(row.children[1].firstElementChild, worker.status, format.words(worker.status));
  fillWork(row.children[2].firstElementChild, worker.working_on);
  const since = row.children[7].firstElementChild;
  setText(since, format.ago(worker.started_at));
  setAttribute(since, "title", format.fullTime(worker.started_at));
}

function show({ data }) {
  reconcile(byId("workers").tBodies[0], data, (worker) => worker.id, newRow, fillRow);
  byId("workers").hidden = data.length === 0;
  byId("no-workers").hidden = data.length > 0;
}

show(initialData());
poll(async () => {
  show(await get("/v1/workers"));
  return LIVE_MS;
});
