"""Writes README.md from nbs/index.ipynb, and its pictures from the saved outputs of another notebook. `nbdev-readme`
does the former with Quarto; this needs nothing but nbdev."""

import base64
import json
import re
from pathlib import Path
from nbdev.config import get_config
from nbdev.readme_filter import doc_link

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook, not this file. -->\n"
LINK = re.compile(r"(!?)(\[[^\]]*\]\()([^)\s]+)(\))")
PICTURES_AT = "https://raw.githubusercontent.com/gp-spectral/gp_spectral/main"  # the package index shows them, too
PICTURES = {
    "success": "plot_success(",
    "recovery": "plot_recovery_bars(",
}  # nbs/studies/rule/<name>.png: of the cell in nbs/studies/rule.ipynb that says so
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def _text(source):
    return source if isinstance(source, str) else "".join(source)


def _directives(cell):
    "The cell's `#|` directives as `{name: value}`, those in its metadata too, and the source without them."
    lines, found = _text(cell["source"]).splitlines(), {}
    while lines and (d := re.match(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        found[d[1]] = d[2]
        lines = lines[1:]
    return {**cell["metadata"].get("nbdev", {}), **found}, "\n".join(lines).strip()


def _links(text, base):
    "Links to notebooks lead to the documentation, pictures to the repository."

    def one(m):
        bang, label, target, close = m.groups()
        if re.match(r"\w+:|[#/]|\.\./", target):
            target = target.removeprefix("../")
        else:
            target = f"{PICTURES_AT}/nbs/{target}" if bang else doc_link(target, base)
        return bang + label + target + close

    return "".join(
        part if i % 2 else LINK.sub(one, part) for i, part in enumerate(FENCE.split(text))
    )  # code is left alone


def _output(out):
    "One output as markdown; pictures belong in files that a markdown cell shows."
    if out["output_type"] == "stream":
        return f"```\n{_text(out['text']).rstrip()}\n```"
    data = out.get("data", {})
    if "text/markdown" in data:
        return _text(data["text/markdown"]).strip()
    if any(kind.startswith("image/") for kind in data):
        raise ValueError(
            "a picture in an output of index.ipynb: save it under nbs/images and show it in a markdown cell"
        )
    return f"```\n{_text(data['text/plain']).rstrip()}\n```" if "text/plain" in data else ""


def render(notebook, base=""):
    "The markdown of a notebook (a dict, as in its JSON); `base` is where the documentation is."
    parts = []
    for cell in notebook["cells"]:
        directives, source = _directives(cell)
        if "hide" in directives or directives.get("include") == "false":
            continue
        if cell["cell_type"] == "markdown":
            parts.append(_links(source, base))
        elif cell["cell_type"] == "code":
            if directives.get("echo") != "false" and source:
                parts.append(f"```python\n{source}\n```")
            if directives.get("output") != "false":
                parts += [_links(_output(o), base) for o in cell["outputs"]]
    return MARKER + "\n" + "\n\n".join(p for p in parts if p) + "\n"


def readme(root=ROOT):
    config = get_config(root)
    return render(json.loads((config.nbs_path / config.readme_nb).read_text(encoding="utf-8")), config.doc_url)


def pictures(root=ROOT):
    "{file: bytes} of the pictures that index.ipynb shows, as they stand in the notebook that draws them."
    cells = json.loads((root / "nbs/studies/rule.ipynb").read_text(encoding="utf-8"))["cells"]

    def drawn(call):
        return next(
            o["data"]["image/png"]
            for c in cells
            if call in _text(c["source"])
            for o in c.get("outputs", [])
            if "image/png" in o.get("data", {})
        )

    return {
        root / f"nbs/studies/rule/{name}.png": base64.b64decode(_text(drawn(call))) for name, call in PICTURES.items()
    }


if __name__ == "__main__":
    for file, png in pictures().items():
        file.write_bytes(png)
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    print("README.md and its pictures written")
