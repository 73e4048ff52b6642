// Where a job is: the words for its progress, and the head of its page.

import { byId, setAttribute, setBadge, setText } from "./dom.js";
import * as format from "./format.js";

const TERMINAL = new Set(["succeeded", "failed", "cancelled"]);

const PHASES = {
  preparing: "Preparing",
  teacher: "Training the teacher",
  distillation: "Distilling the student",
  evaluation: "Evaluating",
  finishing: "Finishing",
};

const RESTING = {
  queued: "Waiting for a worker",
  pausing: "Saving before it pauses",
  paused: "Paused",
  cancelling: "Cancelling",
  succeeded: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};

export const isTerminal = (status) => TERMINAL.has(status);

const waitsUntil = (job) => (job.status === "queued" && job.not_before ? Date.parse(job.not_before) : null);

const phaseOf = (job) => {
  const due = waitsUntil(job);
  if (due !== null && due > Date.now()) return `Failed, and is tried again at ${format.clockTime(due)}`;
  return RESTING[job.status] ?? PHASES[job.progress?.phase] ?? "Preparing";
};

// What may be asked of a job, by its status; `cancel` stands apart, since it is always shown.
const ACTIONS = {
  pause: new Set(["queued", "preparing", "running"]),
  resume: new Set(["paused"]),
  retry: new Set(["failed", "cancelled"]),
};

/** A job's progress for its row: `fraction` (0 to 1) and a few words with the epoch. */
export function describeProgress(job) {
  const { progress } = job;
  const fraction = job.status === "succeeded" ? 1 : (progress?.fraction ?? 0);
  const words = [phaseOf(job)];
  if (progress?.epoch != null && job.status !== "succeeded") {
    words.push(`epoch ${format.outOf(progress.epoch, progress.epochs)}`);
  }
  return { fraction, text: words.join(" · ") };
}

/** Fill the job page's badge, bar, facts and buttons. */
export function showProgress(job) {
  const { progress } = job;
  const live = !isTerminal(job.status);
  const { fraction } = describeProgress(job);
  setBadge(byId("status"), job.status, format.words(job.status));
  setText(byId("phase"), phaseOf(job));
  setText(byId("fraction"), format.percent(fraction));
  setAttribute(byId("bar"), "value", fraction);
  setAttribute(byId("bar"), "class", job.status);
  setText(byId("fact-epoch"), format.outOf(progress?.epoch, progress?.epochs));
  setText(byId("fact-step"), format.outOf(progress?.step, progress?.steps));
  setText(byId("fact-rate"), progress?.images_per_s == null ? format.NONE : progress.images_per_s.toFixed(1));
  setText(byId("fact-eta"), live ? format.duration(progress?.eta_s) : format.NONE);
  setText(byId("fact-elapsed"), format.duration(format.elapsed(job.started_at, job.finished_at)));
  setText(byId("fact-attempt"), format.count(job.attempt));
  for (const [action, statuses] of Object.entries(ACTIONS)) byId(action).hidden = !statuses.has(job.status);
  byId("cancel").disabled = !live || job.status === "cancelling";
}
