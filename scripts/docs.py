"""Builds the documentation: nbdev's processed notebooks as a static site, without Quarto and without the internet.

    python scripts/docs.py            # then open _docs/index.html; it needs no server

nbdev does here what it does for Quarto: front matter, `show_doc` for what is exported, links to what is documented.
Each processed notebook becomes a page of markdown, and Zensical makes the site of these. A formula becomes MathML,
which browsers draw themselves. The addresses are those of the published site.
"""

import argparse
import base64
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from fastcore.nbio import read_nb
from fontTools import subset
from latex2mathml.converter import convert
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
LOOKS = ROOT / "scripts" / "site"  # the style sheet, and what lets pages that were opened as files search
CODE = re.compile(r"^(?P<fence>`{3,}).*?^(?P=fence)`*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", re.S)
LIST = re.compile(r"^(?!\s|[-*+|>#]|\d+\.)(.+)\n(?=(?:[-*+]|1\.) )", re.M)  # right behind the line of a paragraph
SIGNS = [(0x20, 0x7F), (0xA0, 0x100), (0x300, 0x400), (0x2010, 0x2300), (0x1D434, 0x1D468), (0x1D6A8, 0x1D71C)]
NAME = re.compile(r"^### ([\w.]+)$", re.M)  # the heading that `show_doc` writes
COLAB = "https://colab.research.google.com/github/"
DROPPED = "](\0)"  # the end of a link that leads nowhere
FRAME = """# {title}

{text} A click shows more. [The page](pages/{name}.html) is one file, which can be passed on.

<iframe class="page" src="pages/{name}.html" title="{title}"></iframe>
"""


def outside_code(change, text):
    "Markdown, everything but its code changed."
    found, at = [], 0
    for code in CODE.finditer(text):
        found += [change(text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*found, change(text[at:])])


def mathml(formula):
    "A formula (a match) as MathML on one line; what markdown would take for markup is written as entities."
    block, inline = formula.groups()
    made = convert((block or inline).strip(), display="block" if block else "inline")
    made = re.sub(r"[*_\\\[\]{}|`~^]", lambda sign: f"&#{ord(sign[0])};", made.replace("\n", " "))
    return f'<span class="formula{" block" if block else ""}">{made}</span>'


def plain(text):
    "Text as it is, under a cell."
    return f'<pre class="output">{html.escape(text.rstrip(), quote=False)}</pre>' if text.strip() else ""


class Site:
    "Notebooks as pages: what each becomes, and how links lead there."

    def __init__(self, processed, config):
        "`processed`: nbdev's folder of notebooks; `config`: nbdev's, which says where the site and the source are."
        names = [p.relative_to(processed) for p in sorted(processed.rglob("*.ipynb"))]
        self.pages = {name.as_posix(): nbpath2html(name).with_suffix(".md").as_posix() for name in names}
        self.notebooks = {name: read_nb(processed / name) for name in self.pages}
        self.config, self.address = config, config.doc_url.rstrip("/") + "/"
        outputs = {name: "\n".join(map(self.asis, nb.cells)) for name, nb in self.notebooks.items()}
        self.shown = {self.pages[name]: {x.lower() for x in NAME.findall(text)} for name, text in outputs.items()}

    @staticmethod
    def asis(cell):
        "The markdown among a cell's outputs."
        data = [o.get("data", {}) for o in cell.get("outputs", [])]
        return "\n".join("".join(d["text/markdown"]) for d in data if "text/markdown" in d)

    def target(self, link, name):
        "Where a link of a notebook leads on the site; what is not of the site stays, None is what leads nowhere."
        address, _, anchor = link.partition("#")
        if address.startswith(self.address):  # by nbdev, from the name of what is documented there
            page = address.removeprefix(self.address).replace(".html", ".md")
            if anchor not in self.shown.get(page, ()):
                return None
        elif not (page := self.pages.get(os.path.normpath(Path(name).parent / address))):
            return link
        return os.path.relpath(page, Path(self.pages[name]).parent) + (anchor and f"#{anchor}")

    def markdown(self, text, name):
        "Markdown of a notebook as the generator reads it."

        def change(part):
            part = LIST.sub(r"\1\n\n", FORMULA.sub(mathml, part))
            return LINK.sub(lambda m: f"]({to})" if (to := self.target(m[1], name)) else DROPPED, part)

        text = re.sub(rf"\[([^\[\]]*){re.escape(DROPPED)}", r"\1", outside_code(change, text))
        anchor = lambda name: name.lower().replace("_", r"\_")
        return NAME.sub(lambda m: f"### `{m[1]}` {{#{anchor(m[1])}}}", text)

    def output(self, out, name, pictures):
        "What an output shows, the best form that it has; a picture becomes a file of `pictures`."
        if out["output_type"] == "stream":
            return plain("".join(out["text"]))
        data = {kind: value if isinstance(value, str) else "".join(value) for kind, value in out["data"].items()}
        if "text/markdown" in data:
            return self.markdown(data["text/markdown"].replace("__main__.", ""), name)
        if "text/html" in data:
            return f'<div class="output">{re.sub("<style.*?</style>", "", data["text/html"], flags=re.S)}</div>'
        if "image/png" in data:
            pictures.append(base64.b64decode(data["image/png"]))
            file = f"{Path(self.pages[name]).stem}_files/{len(pictures)}.png"
            return f'<img class="output" alt="{html.escape(data.get("text/plain", ""))}" src="{file}">'
        return plain(data.get("text/plain", ""))

    def cell(self, cell, name, pictures):
        "A cell as markdown."
        if cell.cell_type == "markdown":
            return "" if cell.source.startswith("<!-- WARNING") else self.markdown(cell.source, name)
        if cell.cell_type != "code":
            return ""
        told, source = cell.directives, re.sub(r"\A(#\s*\|.*\n?)+", "", cell.source).strip()
        shown = [] if told.get("echo") == "false" or not source else [f"````python\n{source}\n````"]
        return "\n\n".join([*shown, *(self.output(o, name, pictures) for o in cell.outputs)])

    def elsewhere(self, name):
        "Where a notebook can be read and run."
        repo, place = self.config.git_url.rstrip("/"), f"blob/{self.config.branch}/{self.config.nbs_path.name}/{name}"
        colab = f"{COLAB}{urlsplit(repo).path[1:]}/{place}"
        first = f"(there, `%pip install {self.config.lib_name}` first)"
        return f"[The notebook]({repo}/{place}) · [open in Colab]({colab}) {first}\n{{: .elsewhere }}"

    def write(self, name, folder):
        "Writes the page of a notebook, and its pictures beside it."
        front, *cells = self.notebooks[name].cells
        told, pictures = yaml.safe_load(front.source.strip().strip("-")), []
        body = "\n\n".join(self.cell(cell, name, pictures) for cell in cells)
        promise = f"{told['description']}\n{{: .promise }}" if "description" in told else ""
        head = json.dumps({key: told[key] for key in ("title", "description") if key in told}, ensure_ascii=False)
        page = folder / self.pages[name]
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            f"---\n{head}\n---\n\n# {told['title']}\n\n{promise}\n\n{self.elsewhere(name)}\n\n{body}\n",
            encoding="utf-8",
        )
        for number, png in enumerate(pictures, 1):
            file = page.parent / f"{page.stem}_files" / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(png)

    def navigation(self, entries):
        "The sidebar of `sidebar.yml`, for the generator."
        if isinstance(entries, str):
            return [page for name, page in self.pages.items() if Path(name).match(entries)]
        found = []
        for entry in entries:
            if isinstance(entry, str):
                found += self.navigation(entry)
            elif "section" in entry:
                found.append({entry["section"]: self.navigation(entry["contents"])})
            else:
                found.append({entry["text"]: self.pages[entry["href"]]})
        return found


def font(file):
    "Writes the signs of formulas as a font: STIX Two Math, which the package ziamath carries."
    package = Path(importlib.util.find_spec("ziamath").origin).parent
    options = subset.Options(flavor="woff", layout_features=["ssty"])  # smaller forms for exponents
    whole, some = subset.load_font(package / "fonts" / "STIXTwoMath-Regular.ttf", options), subset.Subsetter(options)
    some.populate(unicodes=[code for signs in SIGNS for code in range(*signs)])
    some.subset(whole)
    subset.save_font(whole, file, options)


def comparison(notebooks):
    "The page of a small comparison."
    from example_pair import make_pair
    from gp_spectral.angles import compare_all
    from gp_spectral.page import write_page

    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "report.html"
        write_page(compare_all(make_pair(), progress=False), file)
        return file.read_text(encoding="utf-8")


def rule_study(notebooks):
    "The page of the reference study, from its tables."
    from gp_spectral.report import page_of

    return page_of(notebooks / "studies" / "rule")


def rule_study_again(notebooks):
    "The page of the first half of that study, made again with all that a study keeps by now."
    from gp_spectral.report import page_of

    return page_of(notebooks / "studies" / "rule" / "again", "gp-spectral study --preset tiny-rule-bases --seeds 1")


def skill_study(notebooks):
    "The page of the same on bases that lose skill, from its tables."
    from gp_spectral.report import page_of

    return page_of(notebooks / "studies" / "skill" / "six", "gp-spectral study --preset tiny-bases")


def default_study(notebooks):
    "The page of the command that the home page gives, from its tables."
    from gp_spectral.report import page_of

    return page_of(notebooks / "studies" / "rule" / "shipped", "gp-spectral study")


def tables_of(folder, names):
    "Some tables of a study."
    import pandas as pd

    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in names}


def healing_map(notebooks):
    "The page of the map of healing, from its tables."
    from gp_spectral.healing import map_page

    return map_page(tables_of(notebooks / "studies" / "healing", ("points", "findings")))


def constraints(notebooks):
    "The page of SFT under constraints, from its tables."
    from gp_spectral.tradeoff import arms_page

    tables = tables_of(notebooks / "studies" / "constraints", ("curves", "summary", "beside"))
    return arms_page(tables, "gp-spectral tradeoff --preset tiny-constraints --first 18 …")


PAGES = {  # to click on: title, what it is, what makes it
    "example": (
        "A comparison to click on",
        "This is what `gp-spectral compare` writes, here for a small pair: the model that comes with the package, and "
        "the same model after a few seconds of fine-tuning.",
        comparison,
    ),
    "rule-study": (
        "The rule study to click on",
        "This is what `gp-spectral study` writes, here from the tables of [the rule study](studies/rule.md).",
        rule_study,
    ),
    "rule-study-again": (
        "Half of the rule study, made again, to click on",
        "Six of the twelve runs of [the rule study](studies/rule.md), with answers to fifty hands, sorted angles and "
        "the angles through training, which the first runs did not keep.",
        rule_study_again,
    ),
    "skill-study": (
        "The skill study to click on",
        "This is what `gp-spectral study` writes, here from the tables of [the study of bases that lose only skill]"
        "(studies/skill.md).",
        skill_study,
    ),
    "default-study": (
        "The default study to click on",
        "This is what `gp-spectral study` wrote, as the home page gives it: one base, four seeds, with the answers to "
        "fifty hands and the angles through training.",
        default_study,
    ),
    "constraints": (
        "SFT under constraints, to click on",
        "This is what `gp-spectral tradeoff` writes, here from the tables of [the study of constraints]"
        "(studies/constraints.md).",
        constraints,
    ),
    "healing-map": (
        "The map of healing to click on",
        "This is what `gp-spectral map` writes, here from the tables of [the map](studies/healing.md).",
        healing_map,
    ),
}


def write_pages(notebooks, pages):
    "Writes the pages to click on, and a page of the site around each; their names."
    (pages / "pages").mkdir()
    for name, (title, text, make) in PAGES.items():
        (pages / "pages" / f"{name}.html").write_text(make(notebooks), encoding="utf-8")
        (pages / f"{name}.md").write_text(FRAME.format(title=title, text=text, name=name), encoding="utf-8")
    return [f"{name}.md" for name in PAGES]


def palette(preferred, scheme, other, icon):
    "Colours for readers who prefer light or dark, and the button that changes them."
    media = f"(prefers-color-scheme: {preferred})"
    return dict(media=media, scheme=scheme, toggle=dict(icon=icon, name=f"Change to {other} mode"))


def settings(config, navigation):
    "What the generator is told."
    return dict(
        site_name=config.title,
        site_description=config.description,
        copyright=f'<a href="{config.git_url}">The notebooks</a>',
        docs_dir="pages",
        site_dir="site",
        use_directory_urls=False,
        theme=dict(
            name="material",
            font=False,  # that of the reader's machine
            features=["navigation.sections", "navigation.top", "navigation.footer", "content.code.copy", "toc.follow"],
            palette=[
                palette("light", "default", "dark", "lucide/sun"),
                palette("dark", "slate", "light", "lucide/moon"),
            ],
        ),
        plugins=["search", "offline"],
        extra=dict(polyfills=["iframe-worker.js"], generator=False),
        extra_css=["site.css"],
        markdown_extensions=[
            "attr_list",
            "tables",
            "pymdownx.superfences",
            {"pymdownx.highlight": dict(pygments_lang_class=True)},
            {"toc": dict(permalink=True)},
        ],
        nav=navigation,
    )


def build(
    out,  # the folder of the site; what is there is replaced
):
    "Processes the notebooks that have changed since the last time, and writes the site."
    config = get_config(ROOT)
    sys.path.insert(0, str(config.nbs_path))  # notebooks import example_pair from beside them
    site = Site(proc_nbs(str(config.nbs_path), n_workers=0), config)
    with tempfile.TemporaryDirectory() as work:
        pages = Path(shutil.copytree(LOOKS, Path(work) / "pages"))
        font(pages / "formulas.woff")
        for name in site.pages:
            site.write(name, pages)
        for png in config.nbs_path.rglob("*.png"):
            file = pages / png.relative_to(config.nbs_path)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(png, file)
        clickable = write_pages(config.nbs_path, pages)
        sidebar = yaml.safe_load((config.nbs_path / "sidebar.yml").read_text(encoding="utf-8"))
        told = settings(config, site.navigation(sidebar["website"]["sidebar"]["contents"]) + clickable)
        (Path(work) / "mkdocs.yml").write_text(json.dumps(told), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(Path(work) / "site", out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds the documentation as a static site.")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="the folder of the site (default: _docs)")
    print(f"open {build(parser.parse_args().out) / 'index.html'}")
