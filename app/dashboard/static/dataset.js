// A dataset's page: facts, classes by split, and what its check found.

import { get, poll } from "./api.js";
import { byId, el, initialData, setBadge, setText, showFailure } from "./dom.js";
import * as format from "./format.js";

const LIVE_MS = 2000;
const ENDED = new Set(["ready", "invalid", "failed"]);

const NOTES = {
  awaiting_upload: "Waiting for its archive to be uploaded.",
  queued: "Waiting to be checked.",
  checking: "Being unpacked and checked.",
  ready: "Ready to be used by jobs.",
  invalid: "The check found something that has to be mended; upload it again as a new dataset.",
  failed: "The check could not be carried out.",
};

const SEVERITIES = { note: "Note", dropped: "Left out", fatal: "Fatal" };

const initial = initialData();

const sum = (splits, what) => Object.values(splits).reduce((total, split) => total + split[what], 0);

function showFacts(dataset) {
  setBadge(byId("status"), dataset.status, format.words(dataset.status));
  setText(byId("state-note"), NOTES[dataset.status] ?? "");
  setText(byId("fact-format"), dataset.format?.toUpperCase() ?? format.NONE);
  setText(byId("fact-images"), dataset.splits ? format.count(sum(dataset.splits, "images")) : format.NONE);
  setText(byId("fact-boxes"), dataset.splits ? format.count(sum(dataset.splits, "boxes")) : format.NONE);
  setText(byId("fact-classes"), format.count(dataset.classes?.length));
  setText(byId("fact-size"), format.bytes(dataset.size_bytes));
  setText(byId("fact-hash"), dataset.content_hash ?? "");
}

const number = (value) => el("td", { class: "number" }, format.count(value));

function headRows(splits) {
  const names = splits.map((split) => el("th", { scope: "colgroup", colspan: 2, class: "number" }, split));
  const units = splits.flatMap(() => [
    el("th", { scope: "col", class: "number sub" }, "images"),
    el("th", { scope: "col", class: "number sub" }, "boxes"),
  ]);
  return [el("tr", {}, el("th", { scope: "col", rowspan: 2 }, "Class"), ...names), el("tr", {}, ...units)];
}

const cells = (splits, counts) =>
  splits.flatMap((split) => [number(counts?.[split]?.images ?? 0), number(counts?.[split]?.boxes ?? 0)]);

function showSplits(report) {
  const splits = Object.keys(report.splits ?? {});
  byId("splits-card").hidden = splits.length === 0;
  byId("splits-head").replaceChildren(...headRows(splits));
  byId("splits").replaceChildren(
    ...report.classes.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name), ...cells(splits, row.splits))),
  );
  byId("splits-foot").replaceChildren(
    el("tr", {}, el("th", { scope: "row" }, "All"), ...cells(splits, report.splits)),
  );
}

const example = ({ file, detail }) => el("li", {}, el("code", {}, file), detail ? ` ${detail}` : "");

function problemItem(problem) {
  const known = Object.hasOwn(SEVERITIES, problem.severity) ? problem.severity : "note";
  return el(
    "li",
    { class: known },
    el("p", {}, el("span", { class: `badge ${known}` }, SEVERITIES[known]), ` ${problem.summary} `, el("code", {}, problem.code)),
    problem.examples.length
      ? el(
          "details",
          {},
          el("summary", {}, `${format.count(problem.examples.length)} of ${format.count(problem.count)}`),
          el("ul", { class: "examples" }, ...problem.examples.map(example)),
        )
      : null,
  );
}

function showProblems(report) {
  byId("problems-card").hidden = false;
  byId("problems").replaceChildren(...report.problems.map(problemItem));
  byId("problems-empty").hidden = report.problems.length > 0;
  const allowed = format.percent(report.max_dropped_fraction, 1);
  setText(byId("fact-dropped"), `${format.percent(report.dropped_fraction, 1)} / ${allowed}`);
}

function showReport(report) {
  showSplits(report);
  showProblems(report);
}

/** A check that never came to an end has no report: 404 is the API's word for that. */
async function refreshReport() {
  const report = await get(`/v1/datasets/${initial.id}/report`).catch((error) => {
    if (error.status === 404 || error.status === 409) return null;
    throw error;
  });
  if (report) showReport(report);
}

async function refresh() {
  const dataset = await get(`/v1/datasets/${initial.id}`);
  showFacts(dataset);
  showFailure(dataset.failure);
  if (!ENDED.has(dataset.status)) return LIVE_MS;
  await refreshReport();
  return null;
}

setText(byId("fact-dropped"), format.NONE);
showFacts(initial);
showFailure(initial.failure);
poll(refresh);
