// The list of datasets.

import { get, poll } from "./api.js";
import { byId, el, initialData, reconcile, setAttribute, setBadge, setText } from "./dom.js";
import * as format from "./format.js";

const LIVE_MS = 2000;
const IDLE_MS = 10000;
const MOVING = new Set(["queued", "checking"]);

const cell = (label, more = "") => el("td", { class: `number ${more}`, "data-label": label });

const newRow = (dataset) =>
  el(
    "tr",
    {},
    el("td", { class: "name" }, el("a", { href: `/datasets/${dataset.id}` }, dataset.name), el("span", { class: "under" })),
    el("td", { "data-label": "Status" }, el("span", { class: "badge" })),
    el("td", { "data-label": "Format" }),
    cell("Classes"),
    cell("Images"),
    cell("Boxes"),
    cell("Size"),
    el("td", { class: "number created", "data-label": "Created" }, el("time", { datetime: dataset.created_at })),
  );

function total(splits, what) {
  return splits ? Object.values(splits).reduce((sum, split) => sum + split[what], 0) : null;
}

function fillRow(row, dataset) {
  const [name, status, kind, classes, images, boxes, size, created] = row.children;
  const splits = Object.entries(dataset.splits ?? {}).map(([split, { images: n }]) => `${split} ${format.count(n)}`);
  setText(name.children[1], splits.join(" · ") || (dataset.source.kind === "reference" ? "by reference" : "uploaded"));
  setBadge(status.firstElementChild, dataset.status, format.words(dataset.status));
  setText(kind, dataset.format?.toUpperCase() ?? format.NONE);
  setText(classes, format.count(dataset.classes?.length));
  setText(images, format.count(total(dataset.splits, "images")));
  setText(boxes, format.count(total(dataset.splits, "boxes")));
  setText(size, format.bytes(dataset.size_bytes));
  setText(created.firstElementChild, format.ago(dataset.created_at));
  setAttribute(created.firstElementChild, "title", format.fullTime(dataset.created_at));
}

function show(page) {
  const after = new URLSearchParams(location.search).get("after");
  reconcile(byId("datasets").tBodies[0], page.data, (dataset) => dataset.id, newRow, fillRow);
  byId("datasets").hidden = page.data.length === 0;
  byId("no-datasets").hidden = page.data.length > 0;
  byId("newest").hidden = !after;
  byId("older").hidden = !page.has_more;
  if (page.has_more) byId("older").href = `/datasets?after=${encodeURIComponent(page.next_cursor)}`;
}

show(initialData());
poll(async () => {
  const page = await get(`/v1/datasets${location.search}`);
  show(page);
  return page.data.some((dataset) => MOVING.has(dataset.status)) ? LIVE_MS : IDLE_MS;
});
