"""Every id, selector and `data-` attribute that a script looks up is in each page that loads the script.

The pages are the service's own answers. A page loads one module, and with it all modules that this one imports,
directly or not. Each lookup must match an element of the page, or one that the module itself makes. A lookup must be a
plain string: the test rejects any other, because it cannot check it.
"""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

import app.dashboard
from tests.app.dashboard.conftest import Service

ROOT = Path(app.dashboard.__file__).parent
MODULES = {path.name: path.read_text() for path in ROOT.glob("static/*.js")}
PAGES = ["/jobs", "/jobs/{succeeded}", "/jobs/{queued}", "/jobs/{baseline}"]
PAGES += ["/datasets", "/datasets/{dataset}", "/datasets/{invalid_dataset}", "/workers"]

COMMENT = re.compile(r"/\*.*?\*/|(?<![:\"'`])//[^\n]*", re.DOTALL)
IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["']\./([^"']+)["']""")
CALL = re.compile(r"\b(byId|getElementById|querySelector|querySelectorAll|closest|matches)\(\s*")
STRING = re.compile(r"""(["'])((?:(?!\1).)*)\1\s*\)""")
# dom.js defines it: `byId = (id) => document.getElementById(id)`.
DEFINITION = "document.getElementById(id)"
MADE = re.compile(r"""\b(?:el|svg)\(\s*["'](\w+)["']\s*,\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}""")
ATTRIBUTE = re.compile(r"""["']?([\w-]+)["']?:\s*(?:"([^"]*)"|`([^`]*)`|[^,]+)""")
DATA_READ = re.compile(r"\.dataset\.(\w+)(?!\w)(?!\s*=[^=])")
DATA_WRITTEN = re.compile(r"\.dataset\.(\w+)\s*=[^=]")
COMPOUND = re.compile(r"""(\w+)?((?:\#[\w-]+|\.[\w-]+|\[[\w-]+(?:=["']?[^"'\]]*["']?)?\])*)""")
CONDITION = re.compile(r"""\#([\w-]+)|\.([\w-]+)|\[([\w-]+)(?:=["']?([^"'\]]*)["']?)?\]""")

Element = tuple[str, dict[str, str | None]]  # its tag and attributes; None: a value that only the script knows


@dataclass
class Markup(HTMLParser):
    """The elements of a page, and the module that it loads."""

    html: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    def root(self) -> str:
        (src,) = [values["src"] for tag, values in self.elements if tag == "script" and values.get("type") == "module"]
        assert src is not None
        return src.rsplit("/", 1)[1]


def loaded(root: str, modules: dict[str, str]) -> set[str]:
    """Return a module and all that it imports, directly or not."""
    found, todo = set(), [root]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += IMPORT.findall(COMMENT.sub("", modules[name]))
    return found


def lookups(code: str) -> list[str]:
    """Return the selectors that a module looks up; for a lookup that is no plain string, `?` and its source."""
    found = []
    for call in CALL.finditer(code.replace(DEFINITION, "")):
        rest = code.replace(DEFINITION, "")[call.end() :]
        literal = STRING.match(rest)
        if literal is None:
            found.append(f"? {call[1]}({rest.splitlines()[0]}")
        else:
            found.append(f"#{literal[2]}" if call[1] in ("byId", "getElementById") else literal[2])
    hyphenated = (re.sub(r"[A-Z]", lambda letter: f"-{letter[0].lower()}", name) for name in DATA_READ.findall(code))
    return found + [f"[data-{name}]" for name in hyphenated]


def made(code: str) -> list[Element]:
    """Return the elements that a module makes with `el` and `svg`, and the data attributes that it writes."""
    elements: list[Element] = []
    for tag, attributes in MADE.findall(code):
        # Of a template string, only the words that hold no value are known.
        known = {
            name: text or re.sub(r"\S*\$\{[^}]*\}\S*", "", words) or None
            for name, text, words in ATTRIBUTE.findall(attributes)
        }
        elements.append((tag, known))
    return elements + [("", {f"data-{name}": None}) for name in DATA_WRITTEN.findall(code)]


def is_in(selector: str, elements: list[Element]) -> bool:
    """Return whether each compound of a selector (`form .row[hidden]` has two) matches some element."""
    return all(
        any(_matches(compound, tag, attributes) for tag, attributes in elements)
        for compound in re.findall(r"""(?:\[[^\]]*\]|[^\s,>+~])+""", selector)
    )


def _matches(compound: str, tag: str, attributes: dict[str, str | None]) -> bool:
    parts = COMPOUND.fullmatch(compound)
    assert parts is not None, f"a selector that this test cannot read: {compound}"
    if parts[1] is not None and parts[1] != tag:
        return False
    return all(
        (not id_ or attributes.get("id") == id_)
        and (not class_ or class_ in (attributes.get("class") or "").split())
        and (not name or (name in attributes and (not value or attributes[name] in (value, None))))
        for id_, class_, name, value in CONDITION.findall(parts[2])
    )


def missing(html: str, modules: dict[str, str]) -> list[str]:
    """Return the lookups of a page's modules that match no element, as "MODULE: SELECTOR"."""
    page = Markup(html)
    reported = []
    for name in sorted(loaded(page.root(), modules)):
        code = COMMENT.sub("", modules[name])
        elements = page.elements + made(code)
        reported += [f"{name}: {one}" for one in lookups(code) if one.startswith("?") or not is_in(one, elements)]
    return sorted(set(reported))


@pytest.fixture(params=PAGES)
def html(request: pytest.FixtureRequest, service: Service) -> str:
    return service.read_page(request.param.format_map(vars(service.seeded)))


def test_every_lookup_of_a_script_matches_its_page(html: str) -> None:
    assert missing(html, MODULES) == []


def test_an_id_removed_from_a_page_or_mistyped_in_a_script_is_reported(html: str) -> None:
    used = {one for name in loaded(Markup(html).root(), MODULES) for one in lookups(COMMENT.sub("", MODULES[name]))}
    ids = sorted(one[1:] for one in used if one.startswith("#"))
    assert len(ids) > 3
    for id_ in ids:
        assert html.count(f' id="{id_}"') == 1
        removed = missing(html.replace(f' id="{id_}"', ""), MODULES)
        assert {one.split(": ")[1] for one in removed} == {f"#{id_}"}
        mistyped = {name: code.replace(f'byId("{id_}")', f'byId("{id_}x")') for name, code in MODULES.items()}
        assert {one.split(": ")[1] for one in missing(html, mistyped)} == {f"#{id_}x"}


PAGE = """<link rel="modulepreload" href="tools.js"><meta name="plot"><table id="rows"><tbody></tbody></table>
<p class="note wide" data-kind="a"></p><script type="module" src="/assets/0/page.js"></script>"""
TOOLS = 'export const byId = (id) => document.getElementById(id);\n// byId("of-a-comment")\n'


@pytest.mark.parametrize(
    ("script", "reported"),
    [
        ('byId("rows")', []),
        ('byId("row")', ["#row"]),
        ('document.getElementById("row")', ["#row"]),
        ("byId(`fact-${name}`)", ["? byId(`fact-${name}`);"]),
        ("document.querySelector('meta[name=\"plot\"]')", []),
        ("document.querySelector('meta[name=\"plan\"]')", ['meta[name="plan"]']),
        ('all.querySelectorAll("#rows .note")', []),
        ('all.querySelectorAll("#rows .not")', ["#rows .not"]),
        ('event.target.closest("[data-kind]")', []),
        ('event.target.closest("[data-kinds]")', ["[data-kinds]"]),
        ("use(row.dataset.kind)", []),
        ("use(row.dataset.kindOfRow)", ["[data-kind-of-row]"]),
        ("row.dataset.kindred = 1; use(row.dataset.kindred)", []),
        ('el("p", { id: "made", class: `box ${name}` }); byId("made"); all.querySelector("p.box")', []),
        ('el("p", { id: `made-${name}` }); byId("made")', ["#made"]),
        ('el("p", { class: `box-${name}` }); all.querySelector(".box")', [".box"]),
    ],
)
def test_a_lookup_that_matches_nothing_is_reported(script: str, reported: list[str]) -> None:
    modules = {"page.js": f'import {{ byId }} from "./tools.js";\n{script};', "tools.js": TOOLS}
    assert [one.removeprefix("page.js: ") for one in missing(PAGE, modules)] == reported


def test_a_module_is_checked_against_the_pages_that_load_it_through_another() -> None:
    modules = {"page.js": 'import "./tools.js";', "tools.js": TOOLS + 'import { x } from "./deep.js";'}
    assert missing(PAGE, {**modules, "deep.js": 'byId("gone")'}) == ["deep.js: #gone"]


def test_the_tested_pages_load_every_module(service: Service) -> None:
    roots = {Markup(service.read_page(path.format_map(vars(service.seeded)))).root() for path in PAGES}
    in_templates = set(re.findall(r"\blive\(\"([\w.-]+)\"", "".join(p.read_text() for p in ROOT.glob("templates/*"))))
    assert roots == in_templates
    assert set().union(*(loaded(root, MODULES) for root in roots)) == set(MODULES)


def test_ids_are_unique_and_every_reference_to_one_resolves(html: str) -> None:
    page = Markup(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    names = [
        name for key in ("for", "aria-labelledby", "aria-describedby") for name in " ".join(page.values(key)).split()
    ]
    names += [href[1:] for href in page.values("href") if href.startswith("#")]
    assert names
    assert set(names) <= set(ids)
