// The words for a job's status, phase and place in the queue.

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
  pausing: "Saving a checkpoint before pausing",
  paused: "Paused",
  cancelling: "Cancelling",
  succeeded: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};

export const isTerminal = (status) => TERMINAL.has(status);

/** A queued job's place in the queue, what it waits for and when it starts. */
export function describeQueue(queue) {
  const jobs = format.counted(queue.jobs_ahead, "job", "jobs");
  const ahead = queue.position === null ? `at least ${jobs} ahead` : `${jobs} ahead`;
  const words = [queue.jobs_ahead === 0 ? "Next in the queue" : ahead, `waits for ${queue.waiting_for}`];
  if (queue.eta_s !== null) {
    const spread = `${format.duration(queue.eta_low_s)} to ${format.duration(queue.eta_high_s)}`;
    words.push(queue.eta_high_s < 1 ? "starts soon" : `starts in about ${format.duration(queue.eta_s)} (${spread})`);
  }
  return words.join(" · ");
}

const waitsUntil = (job) => (job.status === "queued" && job.not_before ? Date.parse(job.not_before) : null);

/** What a job does now, in a few words. */
export const phaseOf = (job) => {
  const due = waitsUntil(job);
  if (due !== null && due > Date.now()) return `Failed; the service retries at ${format.clockTime(due)}`;
  return RESTING[job.status] ?? PHASES[job.progress?.phase] ?? "Preparing";
};

/** A job's progress for its row: `fraction` (0 to 1) and a few words, with the epoch. */
export function describeProgress(job) {
  const { progress } = job;
  const fraction = job.status === "succeeded" ? 1 : (progress?.fraction ?? 0);
  if (job.queue && !(waitsUntil(job) > Date.now())) return { fraction, text: describeQueue(job.queue) };
  const words = [phaseOf(job)];
  if (progress?.epoch != null && job.status !== "succeeded") {
    words.push(`epoch\u00a0${format.outOf(progress.epoch, progress.epochs)}`);
  }
  return { fraction, text: words.join(" · ") };
}
