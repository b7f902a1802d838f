"""What the site has beside this folder, and the references in docstrings, for mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages that stand elsewhere in the repository.
ELSEWHERE = {"changelog.md": ROOT / "CHANGELOG.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
ELSEWHERE |= {f"models/{card.parent.name}.md": card for card in sorted(ROOT.glob("checkpoints/*/README.md"))}
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?(?:[\w.]*\.)?(\w+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere."""
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, content=path.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Let links between the two lead to where the pages are now."""
    name = page.file.src_uri
    if name in ELSEWHERE:
        markdown = markdown.replace("](../../docs/", "](../").replace("](docs/", "](")
        markdown = markdown.replace("](CONTRIBUTING.md", "](contributing.md")
        return re.sub(r"\]\(\.\./([\w-]+)/README\.md", r"](\1.md", markdown)
    return re.sub(r"\]\(\.\./checkpoints/([\w-]+)/README\.md", r"](models/\1.md", markdown)


def on_page_content(html: str, **_: object) -> str:
    """Show the references of docstrings as code."""
    return _ROLE.sub(r"<code>\1</code>", html)
