// How good teacher and student are: the tiles, and the table by class.

import { byId, el, reconcile, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";

const NOT_YET = "not evaluated yet";

const order = { by: "class", descending: false };
let rows = [];

const newest = (evaluations, subject) => evaluations.filter((row) => row.subject === subject).at(-1);

/** The metrics to show for each: a job's results once it has them, else the newest evaluation. */
function best(job, evaluations) {
  const asResult = (row) => (row ? { ...row.metrics, epoch: row.epoch } : null);
  return {
    student: job.results?.student ?? asResult(newest(evaluations, "student")),
    teacher: job.results?.teacher ?? asResult(newest(evaluations, "teacher")),
  };
}

const epochNote = (metrics) => (metrics?.epoch == null ? "" : `epoch ${metrics.epoch}`);

const teacherNote = (teacher) => (teacher ? epochNote(teacher) || "target for the student" : NOT_YET);

const maskNote = (student, teacher) =>
  student?.masks ? `masks ${format.score(student.masks.ap50)} / ${format.score(teacher?.masks?.ap50)}` : "";

/** Fill the four tiles on top. */
export function showTiles(job, evaluations) {
  const { student, teacher } = best(job, evaluations);
  const share = student?.ap != null && teacher?.ap ? student.ap / teacher.ap : null;
  setText(byId("tile-student"), format.score(student?.ap));
  setText(byId("tile-student-note"), student ? epochNote(student) : NOT_YET);
  setText(byId("tile-teacher"), format.score(teacher?.ap));
  setText(byId("tile-teacher-note"), job.spec.teacher ? teacherNote(teacher) : "baseline: no teacher");
  setText(byId("tile-ap50"), `${format.score(student?.ap50)} / ${format.score(teacher?.ap50)}`);
  setText(byId("tile-ap50-note"), maskNote(student, teacher) || "AP at IoU 0.5");
  setText(byId("tile-share"), format.percent(share));
}

function joined(student, teacher) {
  const names = [...new Set([...(student?.per_class ?? []), ...(teacher?.per_class ?? [])].map((row) => row.class))];
  const apOf = (metrics, name) => metrics?.per_class?.find((row) => row.class === name)?.ap ?? null;
  return names.map((name, index) => {
    const [ours, theirs] = [apOf(student, name), apOf(teacher, name)];
    const gap = ours == null || theirs == null ? null : ours - theirs;
    return { name, index, student: ours, teacher: theirs, gap };
  });
}

function compare(a, b) {
  if (order.by === "class") return order.descending ? b.index - a.index : a.index - b.index;
  // What is not measured goes last in either direction.
  if (a[order.by] == null || b[order.by] == null) return (a[order.by] == null) - (b[order.by] == null);
  return (order.descending ? -1 : 1) * (a[order.by] - b[order.by]);
}

const newRow = (row) =>
  el(
    "tr",
    {},
    el("th", { scope: "row" }, row.name),
    el("td", { class: "wide" }, el("div", { class: "ap-bar student" }), el("div", { class: "ap-bar teacher" })),
    el("td", { class: "number" }),
    el("td", { class: "number muted" }),
    el("td", { class: "number" }),
  );

function fillRow(element, row) {
  const [, bars, student, teacher, gap] = element.children;
  // Through the object model: a style attribute in the markup is forbidden by the Content-Security-Policy.
  bars.children[0].style.setProperty("--ap", row.student ?? 0);
  bars.children[1].style.setProperty("--ap", row.teacher ?? 0);
  setText(student, format.score(row.student));
  setText(teacher, format.score(row.teacher));
  setText(gap, format.difference(row.gap));
}

function draw() {
  reconcile(byId("classes"), [...rows].sort(compare), (row) => row.index, newRow, fillRow);
}

/** Fill the table by class. */
export function showClasses(job, evaluations) {
  const { student, teacher } = best(job, evaluations);
  rows = joined(student, teacher);
  byId("classes-card").hidden = rows.length === 0;
  const parts = [format.counted(rows.length, "class", "classes")];
  if (epochNote(student)) parts.push(`student at ${epochNote(student)}`);
  setText(byId("classes-note"), parts.join(" · "));
  draw();
}

function sortBy(button) {
  // Numbers are first wanted from the best down, classes in their own order.
  const descending = order.by === button.value ? !order.descending : button.value !== "class";
  Object.assign(order, { by: button.value, descending });
  for (const other of document.querySelectorAll(".sort")) {
    const direction = other === button ? (descending ? "descending" : "ascending") : "none";
    setAttribute(other.closest("th"), "aria-sort", direction);
  }
  draw();
}

for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => sortBy(button));
