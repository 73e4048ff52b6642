// A job's page: one poll keeps every part of it live until the job has ended.

import { get, getAll, patch, poll, post } from "./api.js";
import { accuracyChart, lossChart } from "./charts.js";
import { byId, initialData, segments, setText } from "./dom.js";
import { showClasses, showTiles } from "./evaluation.js";
import { showFailure } from "./failure.js";
import { showGallery } from "./gallery.js";
import { addEvents, showDownloads } from "./lists.js";
import { showProgress } from "./progress.js";
import { isTerminal } from "./states.js";

const LIVE_MS = 2000;
const METRICS_PAGE = 1000;
const NO_STEPS = { teacher: -1, student: -1 };

const initial = initialData();
const base = `/v1/jobs/${initial.id}`;
const losses = lossChart(byId("loss-chart"), byId("loss-empty"));
const accuracy = accuracyChart(byId("map-chart"), byId("map-empty"), initial);

const trainsTeacher = initial.spec.teacher?.source === "train";

const seen = { attempt: initial.attempt, event: null, step: { ...NO_STEPS }, subject: null, artifacts: null };

/** The rows of one of the job's lists that come after a cursor; null: all of them. */
const getPart = (part, after) =>
  getAll(
    (cursor) => `${base}/${part}?limit=100${cursor ? `&after=${encodeURIComponent(cursor)}` : ""}`,
    (page) => page.next_cursor,
    after,
  );

async function refreshMetrics(subject) {
  const rows = await getAll(
    (step) => `${base}/metrics?subject=${subject}&after_step=${step}&limit=${METRICS_PAGE}`,
    (page) => page.data.at(-1).step,
    seen.step[subject],
  );
  if (rows.length === 0) return;
  seen.step[subject] = rows.at(-1).step;
  losses.add(subject, rows);
}

async function refreshEvaluations(job) {
  const { data } = await get(`${base}/evaluations`);
  showTiles(job, data);
  showClasses(job, data);
  await accuracy.show(data);
}

async function refreshEvents() {
  const rows = await getPart("events", seen.event);
  if (rows.length) seen.event = rows.at(-1).id;
  addEvents(rows);
}

async function refreshArtifacts(job) {
  // The service records artifacts when a run ends: read them at first and after a change of status.
  if (seen.artifacts === job.status) return;
  const rows = await getPart("artifacts", null);
  showDownloads(job.id, rows);
  await showGallery(job.id, rows);
  seen.artifacts = job.status;
}

/** A new attempt continues from a checkpoint and logs some steps again: read all metrics again. */
function restartOnNewAttempt(job) {
  if (job.attempt === seen.attempt) return;
  seen.attempt = job.attempt;
  seen.step = { ...NO_STEPS };
  losses.clear();
}

/** Show the losses of the model in training, or of the student once the job has ended; a reader may choose another. */
function followSubject(job) {
  const atTeacher = trainsTeacher && job.progress?.phase === "teacher" && !isTerminal(job.status);
  const training = atTeacher ? "teacher" : "student";
  if (seen.subject === training) return;
  seen.subject = training;
  lossSubject.press(training);
}

async function refresh() {
  const job = await get(base);
  // The job comes first: once it has ended, all that is read after it is complete.
  showJob(job);
  restartOnNewAttempt(job);
  followSubject(job);
  await Promise.all([
    refreshMetrics("teacher"),
    refreshMetrics("student"),
    refreshEvaluations(job),
    refreshEvents(),
    refreshArtifacts(job),
  ]);
  await losses.draw();
  return isTerminal(job.status) ? null : LIVE_MS;
}

function showJob(job) {
  showProgress(job);
  showFailure(job.failure);
}

/** Send a change of the job and show the job that the API returns; show in `error` why the change failed. */
async function change(button, error, send) {
  button.disabled = true;
  error.hidden = true;
  try {
    showJob(await send());
    wake();
    return true;
  } catch (problem) {
    setText(error, problem.message);
    error.hidden = false;
    return false;
  } finally {
    button.disabled = false;
  }
}

function listenToCancel() {
  const dialog = byId("cancel-dialog");
  const error = byId("cancel-error");
  const confirm = byId("cancel-confirm");
  byId("cancel").addEventListener("click", () => {
    error.hidden = true;
    dialog.showModal();
  });
  confirm.addEventListener("click", async () => {
    if (await change(confirm, error, () => post(`${base}/cancel`))) dialog.close();
  });
}

function listenToPriority() {
  byId("priority-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const priority = byId("priority").valueAsNumber;
    change(event.submitter, byId("priority-error"), () => patch(base, { priority }));
  });
}

/** Pause, resume and retry lose nothing, so the page sends them without a question. */
function listenToActions() {
  for (const button of [byId("pause"), byId("resume"), byId("retry")]) {
    button.addEventListener("click", () => change(button, byId("action-error"), () => post(`${base}/${button.id}`)));
  }
}

byId("loss-subject").hidden = !trainsTeacher;
const lossSubject = segments(byId("loss-subject"), (subject) => losses.select(subject));
segments(byId("loss-scale"), (scale) => losses.scale(scale));
showJob(initial);
const { wake } = poll(refresh);
listenToCancel();
listenToPriority();
listenToActions();
