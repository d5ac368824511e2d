"""mkdocs' hook: the README is the first page, and links to other files lead to the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and the pictures outside docs/ that pages show."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for shown, _, target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            path = page.parent / target
            if shown and not path.resolve().is_relative_to(DOCS) and path.exists():
                files.append(File.generated(config, f"images/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt links to what is not in docs/: pictures are copied, other files are shown by the repository."""
    source = page.file.src_uri
    folder = ROOT if source == "index.md" else (DOCS / source).parent

    def adapted(match: re.Match[str]) -> str:
        shown, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (folder / target).resolve()
        if ":" in target or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # mkdocs reports what does not exist
        inside = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else f"images/{path.name}"
        if files.get_file_from_path(inside) is not None:
            return f"{shown}[{text}]({posixpath.relpath(inside, posixpath.dirname(source) or '.')}{anchor})"
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url}/blob/main/{path.relative_to(ROOT)}{anchor})"

    return LINK.sub(adapted, markdown)
