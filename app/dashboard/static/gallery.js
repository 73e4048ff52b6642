// Images of the evaluation split, with the boxes of the ground truth, the teacher and the student drawn over them.

import { artifactUrl, get } from "./api.js";
import { byId, el, setText, svg } from "./dom.js";

// By the key of their boxes in the index, which is the class of their layer too.
const SUBJECTS = { truth: "ground truth", teacher: "teacher", student: "student" };
const INDEX = "gallery.json";

/** One box: its outline in pixels of the image, and its class (and score) written at its corner. */
function drawBox(box, subject, classes, width) {
  const [x1, y1, x2, y2] = box.box.map(Number);
  const name = classes[box.class] ?? `class ${box.class}`;
  const text = box.score == null ? name : `${name} ${box.score.toFixed(2)}`;
  const size = width / 34;
  // Teacher and student often agree: one writes above its box, the other below.
  const y = subject === "teacher" ? y2 + size : Math.max(y1 - size / 4, size);
  return svg(
    "g",
    { class: "box", "data-score": box.score ?? 1 },
    svg("rect", { class: "halo", x: x1, y: y1, width: x2 - x1, height: y2 - y1 }),
    svg("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1 }, svg("title", {}, `${SUBJECTS[subject]}: ${text}`)),
    subject === "truth" ? null : svg("text", { x: x1, y, "font-size": size, "stroke-width": size / 5 }, text),
  );
}

const countLine = (image) =>
  Object.entries(SUBJECTS).map(([subject, name]) => `${name} ${image[subject]?.length ?? 0}`).join(", ");

function drawImage(jobId, image, classes, lazy) {
  const layers = Object.keys(SUBJECTS).map((subject) =>
    svg("g", { class: `layer ${subject}` }, ...(image[subject] ?? []).map((box) => drawBox(box, subject, classes, image.width))),
  );
  return el(
    "div",
    { class: "image" },
    el("img", {
      src: artifactUrl(jobId, image.file),
      alt: `${image.name} (boxes: ${countLine(image)})`,
      width: image.width,
      height: image.height,
      loading: lazy ? "lazy" : "eager",
    }),
    svg("svg", { viewBox: `0 0 ${image.width} ${image.height}`, "aria-hidden": "true" }, ...layers),
  );
}

function hideBelowThreshold(root) {
  const threshold = Number(byId("threshold").value);
  for (const box of root.querySelectorAll(".box")) {
    box.classList.toggle("low", Number(box.dataset.score) < threshold);
  }
}

function applyThreshold() {
  setText(byId("threshold-value"), Number(byId("threshold").value).toFixed(2));
  hideBelowThreshold(byId("gallery"));
}

/** Let the slider start just below the lowest score: lower thresholds would hide no box. */
function setLowestThreshold(images) {
  const scores = images.flatMap((image) => [...(image.teacher ?? []), ...(image.student ?? [])].map((box) => box.score));
  byId("threshold").min = Math.floor(10 * Math.min(0.5, ...scores)) / 10;
}

function showSubject(box) {
  for (const root of [byId("gallery"), byId("viewer")]) root.classList.toggle(`show-${box.value}`, box.checked);
}

function openViewer(jobId, image, classes) {
  const drawn = drawImage(jobId, image, classes, false);
  hideBelowThreshold(drawn);
  byId("viewer-image").replaceChildren(drawn);
  // Wide enough to see, and never taller than the window.
  drawn.style.setProperty("--ratio", image.width / image.height);
  setText(byId("viewer-name"), image.name);
  byId("viewer").showModal();
}

function thumbnail(jobId, image, classes) {
  const drawn = drawImage(jobId, image, classes, true);
  const button = el("button", { type: "button", class: "open", "aria-label": `Enlarge ${image.name}` }, drawn);
  button.addEventListener("click", () => openViewer(jobId, image, classes));
  return el("figure", {}, button, el("figcaption", {}, image.name));
}

/** Draw the gallery if the job has one. */
export async function showGallery(jobId, artifacts) {
  const names = new Set(artifacts.map((artifact) => artifact.name));
  if (!names.has(INDEX)) return;
  const { classes, images } = await get(artifactUrl(jobId, INDEX));
  // Show only the job's own artifacts, whatever file names the index holds.
  const known = images.filter((image) => names.has(image.file));
  byId("gallery").replaceChildren(...known.map((image) => thumbnail(jobId, image, classes)));
  byId("gallery-card").hidden = known.length === 0;
  setLowestThreshold(known);
  applyThreshold();
}

byId("threshold").addEventListener("input", applyThreshold);
for (const box of byId("gallery-card").querySelectorAll('input[type="checkbox"]')) {
  box.addEventListener("change", () => showSubject(box));
  // A browser may restore a choice from before a reload.
  showSubject(box);
}
// A click outside the image closes the viewer.
byId("viewer").addEventListener("click", (event) => event.target === byId("viewer") && byId("viewer").close());
