// The list of jobs: filters and page in the address, rows updated in place.

import { get, poll } from "./api.js";
import { byId, el, initialData, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";
import { addressWith, query, showPages } from "./paging.js";
import { describeProgress, isTerminal } from "./states.js";
import { fillStatus, fillTime, nameCell, showRows, statusCell, timeCell } from "./table.js";

const LIVE_MS = 2000;
const IDLE_MS = 10000;

const newRow = (job) =>
  el(
    "tr",
    {},
    nameCell(`/jobs/${job.id}`, job.name),
    statusCell(),
    el(
      "td",
      { class: "progress", "data-label": "Progress" },
      el("progress", { max: 1, value: 0, "aria-label": `Progress of ${job.name}` }),
      el("span", { class: "under" }),
    ),
    el("td", { class: "number time", "data-label": "Time" }, el("span"), el("span", { class: "under" })),
    el("td", { class: "number pair", "data-label": "AP" }, el("b"), el("span")),
    el("td", { class: "number pair", "data-label": "AP50" }, el("b"), el("span")),
    timeCell("Created", job.created_at),
  );

function fillScores(cell, results, name) {
  setText(cell.children[0], format.score(results?.student?.[name]));
  setText(cell.children[1], ` / ${format.score(results?.teacher?.[name])}`);
}

function fillDuration(cell, job) {
  const eta = isTerminal(job.status) ? null : job.progress?.eta_s;
  setText(cell.children[0], format.duration(format.elapsed(job.started_at, job.finished_at)));
  setText(cell.children[1], eta == null ? "" : `${format.duration(eta)} left`);
}

const methods = ({ distillation }) => [distillation].flat().map((one) => one.method).join(" + ");

function fillRow(row, job) {
  const [name, status, progress, time, ap, ap50, created] = row.children;
  const labels = Object.entries(job.labels).map(([key, value]) => `${key}: ${value}`);
  setText(name.children[1], [methods(job.spec), ...labels].join(" · "));
  fillStatus(status, job.status);
  const { fraction, text } = describeProgress(job);
  setAttribute(progress.children[0], "value", fraction);
  setAttribute(progress.children[0], "class", job.status);
  setText(progress.children[1], text);
  fillDuration(time, job);
  fillScores(ap, job.results, "ap");
  fillScores(ap50, job.results, "ap50");
  fillTime(created, job.created_at);
}

function show(page) {
  const narrowed = ["name", "status", "after"].some((parameter) => query().get(parameter));
  const [empty, other] = narrowed ? [byId("no-matches"), byId("no-jobs")] : [byId("no-jobs"), byId("no-matches")];
  other.hidden = true;
  showRows(byId("jobs"), empty, page.data, newRow, fillRow);
  showPages(page);
}

async function refresh() {
  const asked = location.search;
  // An empty filter, as a form without scripts sends it, filters nothing.
  const filters = [...new URLSearchParams(asked)].filter(([, value]) => value);
  const page = await get(`/v1/jobs?${new URLSearchParams(filters)}`);
  if (location.search !== asked) return 0;
  show(page);
  return page.data.every((job) => isTerminal(job.status)) ? IDLE_MS : LIVE_MS;
}

function listenToFilters(wake) {
  const form = byId("filters");
  let timer = 0;
  const apply = () => {
    const { name, status } = Object.fromEntries(new FormData(form));
    history.replaceState(null, "", addressWith({ name: name.trim(), status, after: null }));
    wake();
  };
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(apply, 250);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    apply();
  });
}

show(initialData());
listenToFilters(poll(refresh).wake);
