// The two live charts. Plotly draws them; it is loaded after the rest of the page.

import { setAttribute, setText } from "./dom.js";
import * as format from "./format.js";

// A curve keeps at most this many points: more than there are pixels to draw them on add nothing.
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

/** Draw traces and set the text that screen readers read; show `empty` instead where there are no traces. */
async function plot(element, empty, traces, axes, label) {
  empty.hidden = traces.length > 0;
  element.hidden = traces.length === 0;
  if (traces.length === 0) return;
  const Plotly = await loadPlotly();
  await Plotly.react(element, traces, axes, CONFIG);
  setAttribute(element, "aria-label", label);
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

// Loss names hold text that Plotly would read as markup, such as <b>.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

/** The names of the values that rows hold under a prefix ("loss/"), in order. */
const valueNames = (rows, prefix) =>
  [...new Set(rows.flatMap((row) => Object.keys(row.values)))].filter((name) => name.startsWith(prefix)).sort();

/** What the curves of a loss term and of its share have in common; a line through one point would not be seen. */
const trace = (name, x, y) => ({ x, y, name: plain(partName(name)), mode: x.length === 1 ? "markers" : "lines" });

// A short curve starts at 0 on a linear scale; a logarithm has no 0.
const AXES = {
  linear: { type: "linear", rangemode: "tozero" },
  log: { type: "log" },
  share: { type: "linear", range: [0, 1], tickformat: ".0%" },
};

/** The loss by step, one curve for each loss term, of the teacher's training or of the student's. */
export function lossChart(element, empty) {
  const rows = { teacher: [], student: [] };
  let subject = "student";
  let scale = "linear";

  /** Each loss term's share of the gradient, stacked: the shares of one step add up to 1. */
  function shares() {
    const measured = rows[subject].filter((row) => valueNames([row], "gradient_share/").length > 0);
    return valueNames(measured, "gradient_share/").map((name, index) => ({
      ...trace(name, measured.map((row) => row.step), measured.map((row) => row.values[name] ?? 0)),
      stackgroup: "shares",
      line: { width: 1, color: color(`series-${index % 8}`) },
      hovertemplate: "%{y:.1%}",
    }));
  }

  function traces() {
    const steps = rows[subject].map((row) => row.step);
    const names = valueNames(rows[subject], "loss/");
    // The total comes first: it is what people look for.
    names.sort((a, b) => (b === "loss/total") - (a === "loss/total"));
    return names.map((name, index) => {
      const total = name === "loss/total";
      const { x, y } = thin(steps, rows[subject].map((row) => row.values[name] ?? null));
      return {
        ...trace(name, x, y),
        line: { width: total ? 2.5 : 1.5, color: total ? color("text") : color(`series-${index % 8}`) },
        hovertemplate: "%{y:.4g}",
      };
    });
  }

  async function draw() {
    const byShare = scale === "share";
    setText(empty, byShare ? "No gradient measured yet." : "No loss logged yet.");
    const axes = layout(element, "step", byShare ? "share of the gradient" : "loss", {}, AXES[scale]);
    const last = rows[subject].at(-1);
    const total = last?.values["loss/total"] ?? "unknown";
    const label = `Loss of the ${subject} by step; at step ${last?.step} the total is ${total}`;
    await plot(element, empty, byShare ? shares() : traces(), axes, label);
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

/** A horizontal line at the teacher's AP; a point at every epoch lets its value show on hover. */
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
    const x = { range: [-0.02 * epochs, 1.02 * epochs], dtick: epochs <= 12 ? 1 : undefined };
    const y = { rangemode: "tozero", tickformat: ".2f" };
    const latest = student.at(-1);
    const words = [
      latest ? `student AP at epoch ${latest.epoch} is ${format.score(latest.metrics.ap)}` : "no student evaluated yet",
    ];
    if (teacher) words.push(`teacher AP is ${format.score(teacher.metrics.ap)}`);
    await plot(element, empty, drawn, layout(element, "epoch", "AP", x, y), `AP by epoch: ${words.join("; ")}`);
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
