// The tables of jobs, datasets and workers: a row for each resource, updated in place.

import { el, reconcile, setBadge, setText } from "./dom.js";
import * as format from "./format.js";

/** A cell; on a narrow screen, where a table has no head, `label` stands above it. */
export const cell = (label, ...children) => el("td", { "data-label": label }, ...children);

export const numberCell = (label, ...children) => el("td", { class: "number", "data-label": label }, ...children);

/** The first cell: the name, which links to the resource's page, and a line under it. */
export const nameCell = (address, name) =>
  el("td", { class: "name" }, el("a", { href: address }, name), el("span", { class: "under" }));

export const statusCell = () => cell("Status", el("span", { class: "badge" }));

export const timeCell = (label, time) =>
  el("td", { class: "number when", "data-label": label }, el("time", { datetime: time, title: format.fullTime(time) }));

export const fillStatus = (status, name) => setBadge(status.firstElementChild, name, format.words(name));

export const fillTime = (when, time) => setText(when.firstElementChild, format.ago(time));

/** Show resources in a table, and `empty` where there are none. */
export function showRows(table, empty, resources, newRow, fillRow) {
  reconcile(table.tBodies[0], resources, (resource) => resource.id, newRow, fillRow);
  table.hidden = resources.length === 0;
  empty.hidden = resources.length > 0;
}
