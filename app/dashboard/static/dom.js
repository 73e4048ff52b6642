// The only way this dashboard makes elements: text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** An HTML element with attributes and children (nodes, or strings as text). */
export const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);

/** An SVG element, likewise. */
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

/** Set an element's text only if it differs: an unchanged page is not announced or laid out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Set an attribute only if it differs. */
export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Show a status in a badge. Its class is the status, which the style sheet colours. */
export function setBadge(element, status, text) {
  setAttribute(element, "class", `badge ${/^[a-z_]+$/.test(status) ? status : ""}`);
  setText(element, text);
}

/**
 * Make `parent`'s children match `items` by key, keeping the elements (and so focus and scroll) of those that stay.
 * `create(item)` returns a new element; `update(element, item)` fills it.
 */
export function reconcile(parent, items, key, create, update) {
  const present = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let element = present.get(name);
    present.delete(name);
    if (!element) {
      element = create(item);
      element.dataset.key = name;
    }
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update(element, item);
  }
  for (const element of present.values()) element.remove();
}

/** The resource that the server put into the page, so that the first paint needs no request. */
export const initialData = () => JSON.parse(byId("initial").textContent);

/**
 * Make a group of buttons a choice of one: `choose(value)` is called when another is pressed. Returns `{press}`, which
 * presses the button with a value.
 */
export function segments(group, choose) {
  const buttons = [...group.querySelectorAll("button")];

  function press(value) {
    const chosen = buttons.find((button) => button.value === value);
    if (chosen.getAttribute("aria-pressed") === "true") return;
    for (const button of buttons) setAttribute(button, "aria-pressed", button === chosen);
    choose(value);
  }

  for (const button of buttons) button.addEventListener("click", () => press(button.value));
  return { press };
}
