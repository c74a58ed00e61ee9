"""What MkDocs adds to these pages: the README as the first one, and formulas as MathML."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?:\(|\[)(?P<latex>.*?)\\(?:\)|\])</(?P=tag)>', re.S
)


def on_files(files: Files, config: Any) -> Files:
    """The README, with links to pages of the site, and to other files of the repository as text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    text = re.sub(r"\[([^]]+)\]\((?!https?:|#|[\w-]+\.md|figures/)[^)]*\)", r"`\1`", text)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    def mathml(found: re.Match[str]) -> str:
        display = "block" if found["tag"] == "div" else "inline"
        latex = found["latex"].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(latex.strip(), display=display)

    return FORMULA.sub(mathml, html)
