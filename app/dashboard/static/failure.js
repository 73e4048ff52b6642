// The panel that shows why a job or a dataset failed.

import { byId, setText } from "./dom.js";

/** Fill the failure panel (`null` hides it): class, code, detail and the log's last lines. */
export function showFailure(failure) {
  byId("failure").hidden = !failure;
  if (!failure) return;
  setText(byId("failure-class"), failure.class);
  setText(byId("failure-code"), failure.code);
  setText(byId("failure-detail"), failure.detail);
  const log = failure.log_tail ?? [];
  byId("failure-log-box").hidden = log.length === 0;
  setText(byId("failure-log"), log.join("\n"));
}
