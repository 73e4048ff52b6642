// A job's page: one poll keeps every part of it live until the job has ended.

import { get, getAll, patch, poll, post } from "./api.js";
import { accuracyChart, lossChart } from "./charts.js";
import { byId, initialData, segments, showFailure } from "./dom.js";
import { showClasses, showTiles } from "./evaluation.js";
import { showGallery } from "./gallery.js";
import { addEvents, showDownloads } from "./lists.js";
import { isTerminal, showProgress } from "./progress.js";

const LIVE_MS = 2000;
const METRICS_PAGE = 1000;
const NO_STEPS = { teacher: -1, student: -1 };

const initial = initialData();
const base = `/v1/jobs/${initial.id}`;
const losses = lossChart(byId("loss-chart"), byId("loss-empty"));
const accuracy = accuracyChart(byId("map-chart"), byId("map-empty"), initial);

const trainsTeacher = initial.spec.teacher?.source === "train";

const seen = { attempt: initial.attempt, event: null, step: { ...NO_STEPS }, subject: null, artifacts: null };

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
  const rows = await getAll(
    (cursor) => `${base}/events?limit=100${cursor ? `&after=${encodeURIComponent(cursor)}` : ""}`,
    (page) => page.next_cursor,
    seen.event,
  );
  if (rows.length) seen.event = rows.at(-1).id;
  addEvents(rows);
}

async function refreshArtifacts(job) {
  // Artifacts are recorded when a run ends, so they are asked for at first and at a change of status.
  if (seen.artifacts === job.status) return;
  const rows = await getAll(
    (cursor) => `${base}/artifacts?limit=100${cursor ? `&after=${encodeURIComponent(cursor)}` : ""}`,
    (page) => page.next_cursor,
    null,
  );
  showDownloads(job.id, rows);
  await showGallery(job.id, rows);
  seen.artifacts = job.status;
}

/** Another attempt goes on from a checkpoint and logs some steps once more: read the metrics afresh. */
function restartOnNewAttempt(job) {
  if (job.attempt === seen.attempt) return;
  seen.attempt = job.attempt;
  seen.step = { ...NO_STEPS };
  losses.clear();
}

/** Show the training in progress, until the reader chooses; a finished job shows its student. */
function followSubject(job) {
  const atTeacher = trainsTeacher && job.progress?.phase === "teacher" && !isTerminal(job.status);
  const training = atTeacher ? "teacher" : "student";
  if (seen.subject === training) return;
  seen.subject = training;
  byId("loss-subject").querySelector(`[value=${training}]`).click();
}

async function refresh() {
  const job = await get(base);
  // Asked for first: when it has ended, everything that is asked for after it is complete.
  showProgress(job);
  showFailure(job.failure);
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

function listenToCancel(wake) {
  const dialog = byId("cancel-dialog");
  const error = byId("cancel-error");
  const confirm = byId("cancel-confirm");
  byId("cancel").addEventListener("click", () => {
    error.hidden = true;
    dialog.showModal();
  });
  confirm.addEventListener("click", async () => {
    confirm.disabled = true;
    try {
      showProgress(await post(`${base}/cancel`));
      dialog.close();
      wake();
    } catch (problem) {
      error.textContent = problem.message;
      error.hidden = false;
    } finally {
      confirm.disabled = false;
    }
  });
}

function listenToPriority(wake) {
  const error = byId("priority-error");
  byId("priority-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    error.hidden = true;
    try {
      showProgress(await patch(base, { priority: byId("priority").valueAsNumber }));
      wake();
    } catch (problem) {
      error.textContent = problem.message;
      error.hidden = false;
    }
  });
}

/** Pause, resume and retry lose nothing, so they are asked for at once. */
function listenToActions(wake) {
  const error = byId("action-error");
  for (const action of ["pause", "resume", "retry"]) {
    const button = byId(action);
    button.addEventListener("click", async () => {
      button.disabled = true;
      error.hidden = true;
      try {
        const job = await post(`${base}/${action}`);
        showProgress(job);
        showFailure(job.failure);
        wake();
      } catch (problem) {
        error.textContent = problem.message;
        error.hidden = false;
      } finally {
        button.disabled = false;
      }
    });
  }
}

byId("loss-subject").hidden = !trainsTeacher;
segments(byId("loss-subject"), (subject) => losses.select(subject));
segments(byId("loss-scale"), (scale) => losses.scale(scale));
showProgress(initial);
showFailure(initial.failure);
const { wake } = poll(refresh);
listenToCancel(wake);
listenToPriority(wake);
listenToActions(wake);
