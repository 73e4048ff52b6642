// A dataset's page: facts, classes by split, and what its check found.

import { get, poll } from "./api.js";
import { byId, el, initialData, setBadge, setText } from "./dom.js";
import { showFailure } from "./failure.js";
import * as format from "./format.js";

const LIVE_MS = 2000;
const ENDED = new Set(["ready", "invalid", "failed"]);

const NOTES = {
  awaiting_upload: "Waiting for you to upload the archive.",
  queued: "Waiting for a worker to check it.",
  checking: "A worker is unpacking and checking it.",
  ready: "Jobs can use this dataset.",
  invalid: "The check found errors. Correct them and upload the data as a new dataset.",
  failed: "The worker could not finish the check.",
};

const SEVERITIES = { note: "Note", dropped: "Dropped", fatal: "Fatal" };

const initial = initialData();

function showFacts(dataset) {
  setBadge(byId("status"), dataset.status, format.words(dataset.status));
  setText(byId("state-note"), NOTES[dataset.status] ?? "");
  setText(byId("fact-format"), dataset.format?.toUpperCase() ?? format.NONE);
  setText(byId("fact-images"), format.splitTotal(dataset.splits, "images"));
  setText(byId("fact-boxes"), format.splitTotal(dataset.splits, "boxes"));
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
          el("summary", {}, `Examples: ${format.count(problem.examples.length)} of ${format.count(problem.count)}`),
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

/** Show the report if there is one: the API answers 404 or 409 while no check has ended. */
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
