// A list's pages and filters, which the page's address holds.

import { byId } from "./dom.js";

export const query = () => new URLSearchParams(location.search);

/** This page's address with other query parameters; an empty value removes one. */
export function addressWith(changes) {
  const params = query();
  for (const [name, value] of Object.entries(changes)) {
    if (value) params.set(name, value);
    else params.delete(name);
  }
  const text = params.toString();
  return text ? `${location.pathname}?${text}` : location.pathname;
}

/** Show the links to the first and to the next page of a list, where there are such pages. */
export function showPages(page) {
  byId("newest").hidden = !query().has("after");
  byId("newest").href = addressWith({ after: null });
  byId("older").hidden = !page.has_more;
  if (page.has_more) byId("older").href = addressWith({ after: page.next_cursor });
}
