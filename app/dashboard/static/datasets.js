// The list of datasets.

import { get, poll } from "./api.js";
import { byId, el, initialData, setText } from "./dom.js";
import * as format from "./format.js";
import { showPages } from "./paging.js";
import { cell, fillStatus, fillTime, nameCell, numberCell, showRows, statusCell, timeCell } from "./table.js";

const LIVE_MS = 2000;
const IDLE_MS = 10000;
const MOVING = new Set(["queued", "checking"]);

const newRow = (dataset) =>
  el(
    "tr",
    {},
    nameCell(`/datasets/${dataset.id}`, dataset.name),
    statusCell(),
    cell("Format"),
    numberCell("Classes"),
    numberCell("Images"),
    numberCell("Boxes"),
    numberCell("Size"),
    timeCell("Created", dataset.created_at),
  );

function fillRow(row, dataset) {
  const [name, status, kind, classes, images, boxes, size, created] = row.children;
  const splits = Object.entries(dataset.splits ?? {}).map(([split, { images: n }]) => `${split} ${format.count(n)}`);
  setText(name.children[1], splits.join(" · ") || dataset.source.kind);
  fillStatus(status, dataset.status);
  setText(kind, dataset.format?.toUpperCase() ?? format.NONE);
  setText(classes, format.count(dataset.classes?.length));
  setText(images, format.splitTotal(dataset.splits, "images"));
  setText(boxes, format.splitTotal(dataset.splits, "boxes"));
  setText(size, format.bytes(dataset.size_bytes));
  fillTime(created, dataset.created_at);
}

function show(page) {
  showRows(byId("datasets"), byId("no-datasets"), page.data, newRow, fillRow);
  showPages(page);
}

show(initialData());
poll(async () => {
  const page = await get(`/v1/datasets${location.search}`);
  show(page);
  return page.data.some((dataset) => MOVING.has(dataset.status)) ? LIVE_MS : IDLE_MS;
});
