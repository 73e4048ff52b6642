// The list of jobs: filters and page in the address, rows updated in place.

import { get, poll } from "./api.js";
import { byId, el, initialData, reconcile, setAttribute, setBadge, setText } from "./dom.js";
import * as format from "./format.js";
import { describeProgress, isTerminal } from "./progress.js";

const LIVE_MS = 2000;
const IDLE_MS = 10000;

function newRow(job) {
  return el(
    "tr",
    {},
    el("td", { class: "name" }, el("a", { href: `/jobs/${job.id}` }, job.name), el("span", { class: "under" })),
    el("td", { "data-label": "Status" }, el("span", { class: "badge" })),
    el(
      "td",
      { class: "progress", "data-label": "Progress" },
      el("progress", { max: 1, value: 0, "aria-label": `Progress of ${job.name}` }),
      el("span", { class: "under" }),
    ),
    el("td", { class: "number time", "data-label": "Time" }, el("span"), el("span", { class: "under" })),
    el("td", { class: "number pair", "data-label": "AP" }, el("b"), el("span")),
    el("td", { class: "number pair", "data-label": "AP50" }, el("b"), el("span")),
    el("td", { class: "number created", "data-label": "Created" }, el("time", { datetime: job.created_at })),
  );
}

function fillScores(cell, results, name) {
  setText(cell.children[0], format.score(results?.student?.[name]));
  setText(cell.children[1], ` / ${format.score(results?.teacher?.[name])}`);
}

function fillTime(cell, job) {
  const eta = isTerminal(job.status) ? null : job.progress?.eta_s;
  setText(cell.children[0], format.duration(format.elapsed(job.started_at, job.finished_at)));
  setText(cell.children[1], eta == null ? "" : `${format.duration(eta)} left`);
}

const methods = ({ distillation }) => [distillation].flat().map((one) => one.method).join(" + ");

function fillRow(row, job) {
  const [name, status, progress, time, ap, ap50, created] = row.children;
  const labels = Object.entries(job.labels).map(([key, value]) => `${key}: ${value}`);
  setText(name.children[1], [methods(job.spec), ...labels].join(" · "));
  setBadge(status.firstElementChild, job.status, format.words(job.status));
  const { fraction, text } = describeProgress(job);
  setAttribute(progress.children[0], "value", fraction);
  setAttribute(progress.children[0], "class", job.status);
  setText(progress.children[1], text);
  fillTime(time, job);
  fillScores(ap, job.results, "ap");
  fillScores(ap50, job.results, "ap50");
  setText(created.firstElementChild, format.ago(job.created_at));
  setAttribute(created.firstElementChild, "title", format.fullTime(job.created_at));
}

const query = () => new URLSearchParams(location.search);

function addressWith(changes) {
  const params = query();
  for (const [name, value] of Object.entries(changes)) {
    if (value) params.set(name, value);
    else params.delete(name);
  }
  const text = params.toString();
  return text ? `/jobs?${text}` : "/jobs";
}

function show(page) {
  const params = query();
  const filtered = params.has("name") || params.has("status");
  const empty = page.data.length === 0;
  reconcile(byId("jobs").tBodies[0], page.data, (job) => job.id, newRow, fillRow);
  byId("jobs").hidden = empty;
  byId("no-jobs").hidden = !empty || filtered || params.has("after");
  byId("no-matches").hidden = !empty || byId("no-jobs").hidden === false;
  byId("newest").hidden = !params.has("after");
  byId("newest").href = addressWith({ after: null });
  byId("older").hidden = !page.has_more;
  if (page.has_more) byId("older").href = addressWith({ after: page.next_cursor });
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
