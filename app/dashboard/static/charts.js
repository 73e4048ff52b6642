// The two live charts, drawn by Plotly, which is loaded after the rest of the page stands.

import { setAttribute } from "./dom.js";
import * as format from "./format.js";

// A curve keeps at most this many points: more than the pixels it is drawn on help nobody.
const MOST_POINTS = 800;
const CONFIG = { displayModeBar: false, responsive: true };

let plotly = null;

function loadPlotly() {
  plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = document.querySelector('meta[name="plotly"]').content;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      plotly = null;
      reject(new TypeError("Plotly could not be loaded"));
    };
    document.head.append(script);
  });
  return plotly;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function axis(title, more) {
  const line = color("line");
  return {
    title: { text: title, standoff: 8 },
    gridcolor: line,
    zerolinecolor: line,
    linecolor: line,
    tickcolor: line,
    automargin: true,
    ...more,
  };
}

function layout(element, xTitle, yTitle, x, y) {
  return {
    height: element.parentElement.clientHeight,
    margin: { l: 52, r: 12, t: 8, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: color("font"), size: 12, color: color("muted") },
    hovermode: "x unified",
    hoverlabel: { bgcolor: color("surface"), bordercolor: color("line"), font: { color: color("text") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, entrywidth: 106 },
    xaxis: axis(xTitle, x),
    yaxis: axis(yTitle, y),
    uirevision: "keep",
  };
}

const redrawOnTheme = (draw) => matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

/** Average neighbours until at most `most` points are left; nulls count for nothing. */
export function thin(x, y, most = MOST_POINTS) {
  if (x.length <= most) return { x, y };
  const size = Math.ceil(x.length / most);
  const thinned = { x: [], y: [] };
  for (let start = 0; start < x.length; start += size) {
    const values = y.slice(start, start + size).filter((value) => value != null);
    thinned.x.push(x[Math.min(start + (size >> 1), x.length - 1)]);
    thinned.y.push(values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
  }
  return thinned;
}

/** "loss/neck_object" and "gradient_share/neck_object" as "neck object". */
const partName = (name) => name.slice(name.indexOf("/") + 1).replaceAll("_", " ").replaceAll("/", " ");

// Class names and loss names come from people, and Plotly reads <b> and the like in them.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

// A short curve starts at 0 on a linear scale; a logarithm has no 0.
const AXES = {
  linear: { type: "linear", rangemode: "tozero" },
  log: { type: "log" },
  share: { type: "linear", range: [0, 1], tickformat: ".0%" },
};

/** The loss by step, one curve for each part, of the teacher's training or of the student's. */
export function lossChart(element, empty) {
  const rows = { teacher: [], student: [] };
  let subject = "student";
  let scale = "linear";

  /** Each part's share of the gradient, one on the other: they add up to 1 wherever they were measured. */
  function shares() {
    const measured = rows[subject].filter((row) => Object.keys(row.values).some((name) => name.startsWith("gradient_share/")));
    const names = new Set(measured.flatMap((row) => Object.keys(row.values)));
    const parts = [...names].filter((name) => name.startsWith("gradient_share/")).sort();
    return parts.map((name, index) => ({
      x: measured.map((row) => row.step),
      y: measured.map((row) => row.values[name] ?? 0),
      name: plain(partName(name)),
      mode: measured.length === 1 ? "markers" : "lines",
      stackgroup: "shares",
      line: { width: 1, color: color(`series-${index % 8}`) },
      hovertemplate: "%{y:.1%}",
    }));
  }

  function traces() {
    const steps = rows[subject].map((row) => row.step);
    const names = new Set(rows[subject].flatMap((row) => Object.keys(row.values)));
    const parts = [...names].filter((name) => name.startsWith("loss/")).sort();
    // The total comes first, whatever the alphabet says: it is what people look for.
    parts.sort((a, b) => (b === "loss/total") - (a === "loss/total"));
    return parts.map((name, index) => {
      const total = name === "loss/total";
      const values = rows[subject].map((row) => row.values[name] ?? null);
      return {
        ...thin(steps, values),
        name: plain(partName(name)),
        mode: steps.length === 1 ? "markers" : "lines",
        line: { width: total ? 2.5 : 1.5, color: total ? color("text") : color(`series-${index % 8}`) },
        hovertemplate: "%{y:.4g}",
      };
    });
  }

  async function draw() {
    const drawn = scale === "share" ? shares() : traces();
    empty.hidden = drawn.length > 0;
    empty.textContent = scale === "share" ? "No gradient measured so far." : "No losses logged so far.";
    element.hidden = drawn.length === 0;
    if (drawn.length === 0) return;
    const Plotly = await loadPlotly();
    const last = rows[subject].at(-1);
    await Plotly.react(
      element,
      drawn,
      layout(element, "step", scale === "share" ? "share of the gradient" : "loss", {}, AXES[scale]),
      CONFIG,
    );
    setAttribute(
      element,
      "aria-label",
      `Loss of the ${subject} by step; at step ${last.step} the total is ${last.values["loss/total"] ?? "not known"}`,
    );
  }

  redrawOnTheme(draw);
  return {
    add: (who, more) => rows[who].push(...more),
    clear: () => Object.assign(rows, { teacher: [], student: [] }),
    select(value) {
      subject = value;
      return draw();
    },
    scale(value) {
      scale = value;
      return draw();
    },
    draw,
  };
}

function curve(points, metric, name, shade, dash) {
  return {
    x: points.map((point) => point.epoch),
    y: points.map((point) => point.metrics[metric]),
    name,
    mode: "lines+markers",
    line: { color: color(shade), width: dash ? 1.5 : 2.5, dash: dash ?? "solid" },
    marker: { size: dash ? 4 : 6, color: color(shade) },
    hovertemplate: "%{y:.3f}",
  };
}

/** A line over the whole width at a detector's AP, with its value at hand when hovered. */
function level(epochs, value, name, dash) {
  return {
    x: epochs,
    y: epochs.map(() => value),
    name,
    mode: "lines",
    line: { color: color("teacher"), width: dash ? 1.5 : 2, dash: dash ?? "dash" },
    hovertemplate: "%{y:.3f}",
  };
}

/** The student's AP and AP50 by epoch, and the teacher's as horizontal lines. */
export function accuracyChart(element, empty, job) {
  const epochs = job.spec.schedule?.epochs ?? 1;
  let evaluations = [];

  function traces() {
    const student = evaluations.filter((row) => row.subject === "student");
    const teacher = evaluations.filter((row) => row.subject === "teacher").at(-1);
    const drawn = [];
    if (student.length) {
      drawn.push(curve(student, "ap", "Student AP", "student"), curve(student, "ap50", "Student AP50", "student", "dot"));
    }
    if (teacher) {
      const width = [...new Set([0, ...student.map((row) => row.epoch), epochs])].sort((a, b) => a - b);
      drawn.push(level(width, teacher.metrics.ap, "Teacher AP"), level(width, teacher.metrics.ap50, "Teacher AP50", "dot"));
    }
    return { drawn, student, teacher };
  }

  async function draw() {
    const { drawn, student, teacher } = traces();
    empty.hidden = drawn.length > 0;
    element.hidden = drawn.length === 0;
    if (drawn.length === 0) return;
    const Plotly = await loadPlotly();
    const x = { range: [-0.02 * epochs, 1.02 * epochs], dtick: epochs <= 12 ? 1 : undefined };
    const y = { rangemode: "tozero", tickformat: ".2f" };
    await Plotly.react(element, drawn, layout(element, "epoch", "AP", x, y), CONFIG);
    const latest = student.at(-1);
    const words = [latest ? `student AP at epoch ${latest.epoch} is ${format.score(latest.metrics.ap)}` : "no student yet"];
    if (teacher) words.push(`the teacher's is ${format.score(teacher.metrics.ap)}`);
    setAttribute(element, "aria-label", `AP by epoch: ${words.join("; ")}`);
  }

  redrawOnTheme(draw);
  return {
    show(rows) {
      const same = rows.length === evaluations.length;
      evaluations = rows;
      return same && rows.length ? undefined : draw();
    },
  };
}
