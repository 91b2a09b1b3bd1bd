"""What mkdocs does beside its own: the pages of the repository's root stand in the site, and links lead to them.

A link on a page is written for a reader of the repository. On the site, one to a file that is no page of the manual
leads to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

__all__ = ["on_files", "on_page_markdown"]

ROOT = Path(__file__).resolve().parents[2]
OF_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)\s:]+?)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """The pages of the root are pages of the manual, too."""
    for source, page in OF_THE_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links out of `docs` lead to the pages of the root, and else to the repository."""
    place = page.file.src_uri
    home = {page: source for source, page in OF_THE_ROOT.items()}.get(place, f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        if not link[2]:
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link[2]))
        if target in OF_THE_ROOT:
            target = f"docs/{OF_THE_ROOT[target]}"
        if target.startswith("docs/"):
            found = posixpath.relpath(target, posixpath.dirname(f"docs/{place}"))
        else:
            found = f"{config['repo_url']}/blob/main/{PurePosixPath(target)}"
        return f"{link[1]}{found}{link[3] or ''}{link[4]}"

    fenced = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in fenced)
