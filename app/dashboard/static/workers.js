// The list of workers, updated in place.

import { get, poll } from "./api.js";
import { byId, el, initialData, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";
import { cell, fillStatus, fillTime, numberCell, showRows, statusCell, timeCell } from "./table.js";

const LIVE_MS = 3000;

function newRow(worker) {
  return el(
    "tr",
    {},
    el("td", { class: "name" }, el("b", {}, worker.name)),
    statusCell(),
    cell("Working on", el("a")),
    cell("Queues", worker.queues.join(", ")),
    cell("Labels", worker.labels.join(", ") || format.NONE),
    numberCell("GPUs", format.count(worker.gpus)),
    numberCell("GPU memory", worker.gpu_memory_gb === null ? format.NONE : `${worker.gpu_memory_gb} GB`),
    timeCell("Started", worker.started_at),
  );
}

// The pages of what a worker works on, by the prefix of its id; a checkpoint has no page.
const PAGES = { job: "jobs", ds: "datasets" };

function fillWork(link, work) {
  setText(link, work?.name ?? format.NONE);
  const page = PAGES[work?.id.split("_")[0]];
  if (page) setAttribute(link, "href", `/${page}/${work.id}`);
  else link.removeAttribute("href");
}

function fillRow(row, worker) {
  const [, status, work, , , , , started] = row.children;
  fillStatus(status, worker.status);
  fillWork(work.firstElementChild, worker.working_on);
  fillTime(started, worker.started_at);
}

function show({ data }) {
  showRows(byId("workers"), byId("no-workers"), data, newRow, fillRow);
}

show(initialData());
poll(async () => {
  show(await get("/v1/workers"));
  return LIVE_MS;
});
