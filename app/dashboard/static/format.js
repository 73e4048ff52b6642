// Numbers, times and sizes as text. What is unknown (null) is an en dash everywhere.

export const NONE = "–";

const integer = new Intl.NumberFormat("en");
const dateOnly = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });
const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

/** An accuracy, 0 to 1, with three decimals. */
export const score = (value) => (value == null ? NONE : value.toFixed(3));

/** A difference of two accuracies, with its sign. */
export const difference = (value) => (value == null ? NONE : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`);

/** A fraction, 0 to 1, as a percentage. */
export const percent = (fraction, decimals = 0) => (fraction == null ? NONE : `${(100 * fraction).toFixed(decimals)} %`);

export const count = (value) => (value == null ? NONE : integer.format(value));

/** "1 job", "2 jobs". */
export const counted = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;

/** The images or boxes (`what`) of all splits together; null splits are unknown. */
export const splitTotal = (splits, what) =>
  count(splits && Object.values(splits).reduce((total, split) => total + split[what], 0));

/** "7 / 12" on one line, or one number where the other is unknown. */
export function outOf(value, total) {
  if (value == null) return NONE;
  return total == null ? count(value) : `${count(value)}\u00a0/\u00a0${count(total)}`;
}

/** Seconds as "12 s", "3 min 20 s", "1 h 05 min" or "2 d 3 h". */
export function duration(seconds) {
  if (seconds == null) return NONE;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Bytes in decimal units, as file managers show them. */
export function bytes(value) {
  if (value == null) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value;
  let unit = 0;
  while (size >= 999.5 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit === 0 || size >= 99.95 ? size.toFixed(0) : size.toFixed(1)} ${units[unit]}`;
}

/** A past RFC 3339 time, relative while it is less than a day old. */
export function ago(time) {
  if (!time) return NONE;
  const seconds = (Date.now() - new Date(time).getTime()) / 1000;
  if (seconds < 10) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return dateOnly.format(new Date(time));
}

export const fullTime = (time) => (time ? full.format(new Date(time)) : "");
export const clockTime = (time) => clock.format(new Date(time));

/** Seconds from `start` to `end` (now if it has not ended); null before the start. */
export function elapsed(start, end) {
  if (!start) return null;
  return ((end ? new Date(end) : new Date()).getTime() - new Date(start).getTime()) / 1000;
}

/** "awaiting_upload" as "Awaiting upload". */
export function words(name) {
  const text = name.replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}
