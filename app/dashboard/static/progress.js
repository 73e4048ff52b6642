// The head of a job's page: badge, progress bar, facts and buttons.

import { byId, setAttribute, setBadge, setText } from "./dom.js";
import * as format from "./format.js";
import { describeProgress, describeQueue, isTerminal, phaseOf } from "./states.js";

// The statuses in which the API accepts an action. "Cancel job" is not here: it is always shown, and disabled at times.
const ACTIONS = [
  [byId("pause"), new Set(["queued", "preparing", "running"])],
  [byId("resume"), new Set(["paused"])],
  [byId("retry"), new Set(["failed", "cancelled"])],
];

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
  for (const [button, statuses] of ACTIONS) button.hidden = !statuses.has(job.status);
  byId("cancel").disabled = !live || job.status === "cancelling";
}
