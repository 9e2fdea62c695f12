"The site: nothing of a notebook is lost on the way to it, every link leads somewhere, and browsers show it."

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from filelock import FileLock

MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
pytest.importorskip("zensical")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb") if not re.search(r"/[._]", p.as_posix()))
NAMES = [p.with_suffix("").as_posix() for p in NOTEBOOKS]
BLOCKS = "p li h1 h2 h3 h4 h5 h6 td th pre div tr table ul ol dt dd blockquote".split()


@pytest.fixture(scope="session")
def site(tmp_path_factory, request):
    "The site, made once for all workers by the command that people type."
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if hasattr(request.config, "workerinput") else shared) / "site"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            build = [sys.executable, ROOT / "scripts" / "docs.py", "--out", shared]
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            env = os.environ | dict(PYTHONPATH=path, HF_HUB_OFFLINE="1", GP_SPECTRAL_MODELS=f"{shared}.no-models")
            done = subprocess.run(build, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
            assert not Path(f"{shared}.no-models").exists(), "building the site asked for a model"
    return shared


def cells(notebook):
    return json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]


def text_of(value):
    return value if isinstance(value, str) else "".join(value)


def page_of(notebook):
    "As nbdev names pages."
    return notebook.with_name(re.sub(r"^\d+[a-z]*_", "", notebook.stem)).with_suffix(".html")


def squeezed(text):
    return re.sub(r"\s+", "", text)


class Page(HTMLParser):
    "What stands on a page, block by block, formulas as □; its ids, where it leads, what its cells show."

    def __init__(self, file):
        super().__init__()
        self.ids, self.links, self.outputs, self.words, self.inside = set(), [], [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        self.blocks = {squeezed(part) for part in "".join(self.words).split("\0")}

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.ids.add(told.get("id"))
        self.links += [(tag, told[name]) for name in ("href", "src") if name in told]
        self.outputs += [tag] if told.get("class") == "output" else []
        if tag in ("article", "math") or told.get("class") == "headerlink":
            self.inside.append(tag)
        self.words += ["□"] if tag == "math" else ["\0"] if tag in BLOCKS else []

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()
        self.words += ["\0"] if tag in BLOCKS else []

    def handle_data(self, data):
        self.words += [data] if self.inside == ["article"] else []


@functools.cache
def page(file):
    return Page(file)


def shown_cells(notebook):
    for cell in cells(notebook):
        source = text_of(cell["source"])
        if not re.search(r"^#\|\s*(hide|export)\b", source, re.MULTILINE):
            yield cell, source


def texts(notebook):
    "All markdown of a notebook: its cells, and what its cells show as markdown."
    for cell, source in shown_cells(notebook):
        if cell["cell_type"] == "markdown":
            yield source
        for out in cell.get("outputs", []):
            if "text/markdown" in out.get("data", {}):
                yield text_of(out["data"]["text/markdown"])


def paragraphs(text):
    "The blocks of a markdown text, in the words of another reader of markdown than the site's; formulas as □."
    code = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.DOTALL)
    formula = re.compile(r"\$\$.+?\$\$|\$[^\s$]\$|\$[^\s$][^$\n]*?[^\s$]\$(?!\d)", re.DOTALL)
    text = "".join(part if i % 2 else formula.sub("□", part) for i, part in enumerate(code))
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline":
            words = [t.content for t in token.children if t.type in ("text", "code_inline", "text_special")]
            yield "".join(words)
        elif token.type == "fence":
            yield token.content


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_every_paragraph_survives(site, notebook):
    there = page(site / page_of(notebook)).blocks
    said = [words for text in texts(notebook) for words in paragraphs(text)]
    assert said and [words for words in said if squeezed(words) not in there] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_every_page_tells_where_its_notebook_is(site, notebook):
    links = [to for _, to in page(site / page_of(notebook)).links]
    place = f"gp-spectral/gp_spectral/blob/main/nbs/{notebook.as_posix()}"
    assert {f"https://github.com/{place}", f"https://colab.research.google.com/github/{place}"} <= set(links)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_pictures_and_tables_survive(site, notebook):
    kept = [set(o.get("data", {})) for cell, _ in shown_cells(notebook) for o in cell.get("outputs", [])]
    outputs = page(site / page_of(notebook)).outputs
    tables = [o for o in kept if "text/html" in o and "text/markdown" not in o]
    assert outputs.count("div") == len(tables)
    assert outputs.count("img") == len([o for o in kept if "image/png" in o])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_a_title_cell_is_a_title_and_a_promise(notebook):
    "nbdev makes front matter of it: what stands there besides would be lost."
    assert re.fullmatch(r"# .+\n\n> .+", text_of(cells(notebook)[0]["source"]).strip())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_no_text_stands_twice(notebook):
    long = [text_of(c["source"]) for c in cells(notebook) if len(text_of(c["source"])) > 60]
    assert {text for text in long if long.count(text) > 1} == set()


def linked(text):
    "Where a markdown text leads, itself and its pictures."
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for t in token.children or []:
            if target := t.attrs.get("href") or t.attrs.get("src"):
                yield unquote(target)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_links_lead_somewhere_in_jupyter(notebook):
    targets = {t for text in texts(notebook) for t in linked(text) if not urlparse(t).scheme}
    files = {t.partition("#")[0] for t in targets} - {""}
    assert [f for f in files if not (NBS / notebook).parent.joinpath(f).is_file()] == []
    assert not [f for f in files if f.endswith(".html")], "notebooks are linked as .ipynb; the site makes .html of it"


def pages_of(site):
    "All but the one for lost readers, and the one that is shown inside another."
    return [f for f in sorted(site.rglob("*.html")) if f.name != "404.html" and f.parent.name != "pages"]


@pytest.mark.parametrize("file", [page_of(p) for p in NOTEBOOKS], ids=NAMES)
def test_links_lead_somewhere_on_the_site(site, file):
    lost, file = [], site / file
    for tag, link in page(file).links:
        url = urlparse(link)
        if url.scheme or url.netloc:
            assert tag == "a", f"the page loads {link}"
            continue
        target = (file.parent / unquote(url.path)).resolve() if url.path else file
        if not target.is_file() and not (target / "index.html").is_file():
            lost.append(link)
        elif url.fragment and target.suffix == ".html" and unquote(url.fragment) not in page(target).ids:
            lost.append(link)
    assert lost == []


@pytest.fixture(scope="module")
def address(site):
    "The site, served on this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def window(browser):
    "`window(width)` makes the browser's window so wide, as a phone's where that is narrow."

    def wide(width):
        size = dict(width=width, height=1000, deviceScaleFactor=1, mobile=width < 500)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield wide
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")


def wait(browser, script, seconds=20):
    "Until a script gives something true, which is given back."
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: b.execute_script(f"return {script}"))


FAR = "performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(arguments[0]))"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNDRAWN = "[...document.querySelectorAll('math')].filter(m => !(m.getBoundingClientRect().height > 5)).length"


def test_every_page_in_a_browser(site, address, browser, window):
    "At both widths: no error, nothing from elsewhere, not wider than the window, formulas drawn."
    faults, formulas = [], 0
    browser.get_log("browser")
    for page in [f.relative_to(site).as_posix() for f in pages_of(site)]:
        browser.get(f"{address}/{page}")
        for width in (1280, 390):
            window(width)
            if (wider := browser.execute_script(f"return {WIDER}")) > 0:
                faults.append((page, width, f"{wider} pixels wider than the window"))
        if browser.execute_script(f"return {UNDRAWN}"):
            faults.append((page, "a formula is not drawn"))
        formulas += browser.execute_script("return document.querySelectorAll('math').length")
        faults += [(page, name) for name in browser.execute_script(f"return {FAR}", address)]
        faults += [(page, x["message"]) for x in browser.get_log("browser") if x["level"] == "SEVERE"]
    assert faults == [] and formulas > 200


@pytest.mark.parametrize("way", ["served", "opened as a file"])
def test_search(site, address, browser, window, way):
    "The field for it lies in a tree of its own."
    window(1280)
    browser.get(f"{address}/index.html" if way == "served" else (site / "index.html").as_uri())
    browser.find_element("css selector", "button.md-search__button").click()
    tree = "[...document.querySelectorAll('*')].find(e => e.shadowRoot)?.shadowRoot"
    field = wait(browser, f"{tree}?.querySelector('input')")
    field.send_keys("direct_rotation")
    wait(browser, f"[...{tree}.querySelectorAll('a')].some(a => a.href.endsWith('/recovery.html#direct_rotation'))")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_to_click_on(address, browser, window, width):
    "A click on the map of the page that is embedded changes its detail."
    window(width)
    browser.get(f"{address}/example.html")
    browser.switch_to.frame(browser.find_element("css selector", "iframe.page"))
    squares = "[...document.querySelectorAll('#map svg .mark-rect path')]"
    named = "[...document.querySelectorAll('#map svg text')].map(t => t.textContent).filter(t => /layers/.test(t))"
    wait(browser, f"{squares}.length && {named}.length")
    before = browser.execute_script(f"return {named}")
    other = next(
        s for s in browser.execute_script(f"return {squares}") if before[0] not in (s.get_attribute("aria-label") or "")
    )
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", other)
    other.click()
    wait(browser, f"{named}.join() != {json.dumps(','.join(before))}")
    browser.switch_to.default_content()
