"""Hooks of MkDocs: pages that are made from files outside docs/, links to such files, and equations.

This script makes pages of the site from the changelog, the examples, the notebooks and the docstrings, so that every
fact is written in one place only.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
API = {
    "vmoe_routers": "Routers and layers",
    "affinity": "Affinities",
    "losses": "Losses",
    "ops": "Ops",
    "inspect": "Inspection",
    "models": "Models",
    "checkpoints": "Checkpoints",
    "training": "Training",
    "distributed": "Distributed",
}
ROOT_HEADING = "    options: { show_root_heading: true, show_root_toc_entry: true, show_root_full_path: false }\n"
IN_ROUTERS = ("affinity", "losses")
# Attributes that share a description, "mixup, cutmix": mkdocstrings takes the first as the name, the rest as its type.
_JOINT = re.compile(r"<code><span [^>]*>([\w, ]+),</span></code></b>\s*\(<code>(.*?)</code>\)", re.DOTALL)
COPIED = ("CHANGELOG.md", "CONTRIBUTING.md")
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def on_files(files, config):
    """Adds the pages that are made from files outside docs/."""
    pages: dict[str, str | bytes] = {name: (ROOT / name).read_text() for name in COPIED}
    for name, title in API.items():
        module = "vmoe_routers" + (".routers" if name in IN_ROUTERS else "")
        module += "" if name == "vmoe_routers" else f".{name}"
        head = f"# {title}\n\n::: {module}\n    options: {{ members: false }}\n\n"
        pages[f"api/{name}.md"] = head + "\n".join(f"::: {path}\n{ROOT_HEADING}" for path in _public(module))
    for path in NOTEBOOKS:
        pages |= _notebook(path)
    pages["notebooks.md"] = "# Notebooks\n\n" + "".join(
        f"- [{_title(path)}](notebooks/{path.stem}.md)\n" for path in NOTEBOOKS
    )
    # Pictures of kept results, which pages show as ../results/...
    for path in sorted((ROOT / "docs").glob("*.md")):
        for name in re.findall(r"!\[[^\]]*\]\(\.\./(results/[^)]+)\)", path.read_text()):
            pages[name] = (ROOT / name).read_bytes()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def _public(module: str) -> list[str]:
    """Lists the paths of the names that a module exports, without modules, which have pages of their own."""
    folder = ROOT / module.replace(".", "/")
    body = ast.parse((folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text()).body
    names = [item.name for item in body if isinstance(item, (ast.FunctionDef, ast.ClassDef)) and item.name[0] != "_"]
    for item in body:
        if isinstance(item, ast.Assign) and getattr(item.targets[0], "id", "") == "__all__":
            names = [name for name in ast.literal_eval(item.value) if name not in API]
    if module == "vmoe_routers":  # the ops have a separate page
        names = [name for name in names if not (folder / "ops" / f"{name}.py").exists()]
    # A function of an op has the name of its module.
    return [f"{module}.{name}" + (f".{name}" if (folder / f"{name}.py").exists() else "") for name in names]


def _example(path: Path) -> str:
    """Makes the section of an example: the first line of its docstring, and the file."""
    source = path.read_text()
    text = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return f'## {path.stem}\n\n{text}\n\n```python title="examples/{path.name}"\n{source}```\n'


def _title(path: Path) -> str:
    return "".join(json.loads(path.read_text())["cells"][0]["source"]).split("\n")[0].lstrip("# ")


def _notebook(path: Path) -> dict[str, str | bytes]:
    """Makes the page of a notebook, and its pictures, from the kept outputs."""
    found: dict[str, str | bytes] = {}
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = "".join(output.get("text") or data.get("text/plain", ""))
            if "image/png" in data:
                name = f"{path.stem}_{len(found)}.png"
                found[f"notebooks/{name}"] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            elif "text/html" in data:
                parts.append("<div markdown=0>" + "".join(data["text/html"]) + "</div>")
            elif text:
                parts.append(f"```text\n{text}\n```")
    found[f"notebooks/{path.stem}.md"] = "\n\n".join(parts)
    return found


def on_page_markdown(markdown, page, config, files):
    """Changes links out of docs/ to the page that shows the file. Without such a page, only the link's text stays."""
    here = ROOT / "docs" / page.file.src_uri
    # Links of a page from outside docs/ begin at the folder of its file.
    is_outside = page.file.src_uri in COPIED or page.file.src_uri.startswith("notebooks/")
    folder = (ROOT / page.file.src_uri if is_outside else here).parent
    if page.file.src_uri == "examples.md":
        markdown += "\n".join(["", *map(_example, EXAMPLES)])

    def lead(match):
        text, target = match["text"], match["target"]
        path, _, anchor = target.partition("#")
        wanted = Path(os.path.normpath(folder / path))
        if "://" in target or not path or not wanted.exists():  # MkDocs reports broken links
            return match[0]
        shown = _shown(wanted)
        if shown is None or files.get_file_from_path(shown.partition("#")[0]) is None:
            return match[0] if wanted.is_relative_to(ROOT / "docs") else text
        uri, _, made = shown.partition("#")
        anchor = f"#{anchor or made}" if anchor or made else ""
        return f"[{text}]({os.path.relpath(ROOT / 'docs' / uri, here.parent)}{anchor})"

    markdown = markdown.replace("](../results/", "](results/")
    link = re.compile(r"(?<!!)\[(?P<text>[^\]\[]*)\]\((?P<target>[^)\s]+)\)")
    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(piece if piece.startswith("```") else link.sub(lead, piece) for piece in pieces)


def _shown(path: Path) -> str | None:
    """Returns the page, relative to docs/, that shows a file of the repository; None if no page does."""
    if path in EXAMPLES:
        return f"examples.md#{path.stem}"
    if path == ROOT / "examples":
        return "examples.md"
    if path in NOTEBOOKS:
        return f"notebooks/{path.stem}.md"
    if path in [ROOT / name for name in COPIED]:
        return path.name
    return path.relative_to(ROOT / "docs").as_posix() if path.is_relative_to(ROOT / "docs") else None


def _joined(match: re.Match) -> str:
    rest = re.sub(r"<[^>]*>|[()]", "", match[2])
    return f"<code>{match[1]}, {rest}</code></b>"


def on_page_content(content, page, config, files):
    """Writes equations as MathML, which browsers draw without a script or a font of the site."""

    def equation(match):
        display = "block" if match["tag"] == "div" else "inline"
        drawn = convert(html.unescape(match["tex"]), display=display)
        return f'<{match["tag"]} class="arithmatex">{drawn}</{match["tag"]}>'

    if page.file.src_uri.startswith("api/") and "doc-heading" not in content:
        raise PluginError(f"{page.file.src_uri} documents nothing: is __all__ right?")
    content = _JOINT.sub(_joined, content)
    content = re.sub(r"<code>(--[^<]{,35})</code>", r'<code class="option">\1</code>', content)
    pattern = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(pattern, equation, content, flags=re.DOTALL)
