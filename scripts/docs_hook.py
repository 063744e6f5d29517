"""Pages of the site from the Markdown files of the repository, where they are; mkdocs calls this (`make docs`).

A page has the path of its file, so links between pages hold as they are. A source file that a page links to becomes a
page with its text, a folder one with the names of its files.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[^)#:\s]+")
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".csv": "text", "": "text"}
"""Source files with these endings have a page."""
OUT_OF_SEARCH = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README and the like, docs, and whatever they link to."""
    site = Files(file for file in files if file.src_dir != config.docs_dir)  # the theme's
    docs = (f"docs/{file.src_uri}" for file in files if file.src_dir == config.docs_dir)
    in_nav = {*docs, *(path.name for path in ROOT.glob("*.md")), "kernels/README.md"}
    todo, done = sorted(in_nav), set[str]()
    while todo:
        uri = todo.pop()
        path = ROOT / uri
        if uri in done or uri.startswith("..") or not path.exists():
            continue  # mkdocs reports a link to what is not there
        done.add(uri)
        if path.is_dir() or path.suffix in LANGUAGES:
            file = File.generated(config, f"{uri}.md", content=source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
        else:
            level = InclusionLevel.UNDEFINED if uri in in_nav else InclusionLevel.NOT_IN_NAV
            file = File(uri, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=level)
        site.append(file)
        if file.is_documentation_page():
            todo += [target(file.src_uri, link) for link in LINK.findall(file.content_string)]
    return site


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to source files lead to their pages, and lists in lists are indented as Python's Markdown wants it."""

    def to_page(link: re.Match[str]) -> str:
        shown = files.get_file_from_path(target(page.file.src_uri, link[0]) + ".md")
        return f"{link[0]}.md" if shown else link[0]

    return re.sub(r"^  (?=- )", "    ", LINK.sub(to_page, markdown), flags=re.MULTILINE)


def target(uri: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(uri), link))


def source_page(path: Path) -> str:
    title = f"{OUT_OF_SEARCH}# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_file():
        return f"{title}~~~~{LANGUAGES[path.suffix]}\n{path.read_text()}~~~~\n"
    names = [(file, file.relative_to(path.parent).as_posix()) for file in sorted(path.rglob("*")) if file.is_file()]
    linked = {".md", *LANGUAGES}
    return title + "".join(f"- [{name}]({name})\n" if f.suffix in linked else f"- `{name}`\n" for f, name in names)
