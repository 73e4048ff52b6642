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

/** Where a queued job stands, in words. */
export function describeQueue(queue) {
  const ahead = queue.position === null ? `${queue.jobs_ahead} or more jobs ahead` : `${queue.jobs_ahead} ahead`;
  const words = [queue.jobs_ahead === 0 ? "Next in the queue" : ahead, `waits for ${queue.waiting_for}`];
  if (queue.eta_s !== null) {
    const spread = `${format.duration(queue.eta_low_s)} to ${format.duration(queue.eta_high_s)}`;
    words.push(`begins in ${format.duration(queue.eta_s)} (${spread})`);
  }
  return words.join(" · ");
}

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
  if (job.queue && !(waitsUntil(job) > Date.now())) return { fraction, text: describeQueue(job.queue) };
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
  setText(byId("fact-priority"), String(job.priority));
  byId("queue").hidden = !job.queue;
  if (job.queue) setText(byId("queue-place"), describeQueue(job.queue));
  for (const [action, statuses] of Object.entries(ACTIONS)) byId(action).hidden = !statuses.has(job.status);
  byId("cancel").disabled = !live || job.status === "cancelling";
}
