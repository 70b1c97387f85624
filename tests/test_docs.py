"""What the docs say is run: code and commands of README and of every page.

A comment before a block, such as `<!-- needs: a GPU -->`, says that it cannot be run here; it is
parsed all the same. One that names a module is run where that is installed. Other tests build the
site, and see that it cannot be built with dead links.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from fastres.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PHOTOS = ROOT / "examples" / "photos"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
NAMES = [str(page.relative_to(ROOT).with_suffix("")) for page in PAGES]
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n+)?```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
mkdocs = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("mkdocstrings") is None,
    reason="the site is built with mkdocs-material and mkdocstrings: pip install '.[docs]'",
)


@dataclass(frozen=True)
class Block:
    """One block of code on a page; `needs` is what it takes to run it, empty for nothing."""

    where: str
    line: int
    language: str
    code: str
    needs: str

    @property
    def runs(self) -> bool:
        """Whether what it needs is nothing, or a module that is here."""
        return not self.needs or (self.needs.isidentifier() and find_spec(self.needs) is not None)

    def program(self) -> Any:
        """Python compiled, with the page's own line numbers."""
        return compile("\n" * self.line + self.code, self.where, "exec")

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(text: str, where: str) -> list[Block]:
    return [
        Block(
            where,
            text[: found.start("code")].count("\n"),
            found["language"],
            found["code"],
            found["needs"] or "",
        )
        for found in BLOCK.finditer(text)
    ]


def parsed(block: Block) -> None:
    """A block is good Python, or good shell with commands of ours that can be given so."""
    if block.language == "python":
        block.program()
        return
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    group: Any = get_command(app)
    with group.make_context("fastres", [], resilient_parsing=True) as context:
        for name, *words in block.commands():
            if name == "fastres":
                _, command, rest = group.resolve_command(context, words)
                command.make_context(command.name, rest, parent=context)


def run(block: Block, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        exec(block.program(), namespace)
        return
    for name, *words in block.commands():
        assert name == "fastres", f"{block.where}: {name} is no command of ours; mark the block"
        result = CliRunner().invoke(app, words, prog_name="fastres")
        assert result.exit_code == 0, f"{block.where}: fastres {shlex.join(words)}\n{result.output}"


@pytest.mark.compile
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_says_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # which `fastres bench` on another page has changed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    only_pictures = shutil.ignore_patterns("*.md")
    shutil.copytree(PHOTOS, tmp_path / "examples" / "photos", ignore=only_pictures)
    namespace = ModuleType("page").__dict__
    for block in blocks_of(page.read_text(), str(page.relative_to(ROOT))):
        parsed(block)
        if block.runs:
            run(block, namespace)


def test_pages_have_blocks_that_run() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page.read_text(), page.name)]
    for language in ("python", "bash"):
        assert sum(b.language == language and not b.needs for b in blocks) > 10, language
    fences = sum(len(re.findall(r"^```(?:python|bash)$", p.read_text(), re.M)) for p in PAGES)
    assert len(blocks) == fences, "a fence that is not closed"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pictures_are_there_in_both_themes(page: Path) -> None:
    text = page.read_text()
    light, dark = (re.findall(rf'{name}="([^"]*)"', text) for name in ("src", "srcset"))
    assert [name.replace("-light", "-dark") for name in light] == dark
    for name in (*light, *dark):
        assert (page.parent / name).is_file(), f"{page.name}: no {name}"
    assert text.count("<img alt=") == len(light), "a picture without words"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """Else MkDocs takes them for text, where other readers of Markdown do not."""
    text = re.sub(r"^```.*?^```$", "a block", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = text.splitlines()
    for before, line in pairwise(lines):
        if re.match(r" *(-|\d+\.) ", line) and before and not re.match(r"#|-|\d+\. | ", before):
            pytest.fail(f"{page.name}: leave a line empty before {line!r}")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_beside_the_site_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#([^)\s]+))?\)", (ROOT / name).read_text())
    for path, anchor in links:
        assert (ROOT / path).exists(), f"{name}: {path} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            there = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in there, f"{name}: {path} has no heading #{anchor}"


def test_a_block_that_is_wrong_is_found(tmp_path: Path) -> None:
    good, broken, unknown = blocks_of(
        "```bash\nfastres doctor  # fine\n```\n\n<!-- needs: a GPU -->\n```python\nx = = 1\n```\n"
        "```bash\nfastres compile fastres:resnet50 \\\n  --no-such-flag\n```\n",
        "a page",
    )
    parsed(good)
    assert (broken.needs, broken.line) == ("a GPU", 6)
    with pytest.raises(SyntaxError, match="invalid syntax"):
        parsed(broken)
    with pytest.raises(Exception, match="No such option"):
        parsed(unknown)
    with pytest.raises(AssertionError, match="No such option"):
        run(unknown, {})


def build(config: Path, to: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", to]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


@mkdocs
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    result = build(ROOT / "mkdocs.yml", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    commands = (tmp_path / "reference" / "commands.html").read_text()
    assert all(f'id="{name}"' in commands for name in get_command(app).commands)  # type: ignore[attr-defined]
    assert "--fail-if-slower" in commands
    api = (tmp_path / "reference" / "api.html").read_text()
    import fastres

    documented = set(fastres.__all__) - {"__version__", "deploy", "errors", "models"}
    missing = {name for name in documented if f'id="fastres.{name}"' not in api}
    assert missing == {"CalibrationTable"}  # which has a page of its own


@mkdocs
def test_a_site_with_a_dead_link_is_refused(tmp_path: Path) -> None:
    for name in ("sound", "page", "anchor"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.yml").write_text(
            f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {name}\nnav: [index.md]\nhooks: []\n"
            "plugins: []\n"
        )
    (tmp_path / "sound" / "index.md").write_text("# Home\n[here](#home)\n")
    (tmp_path / "page" / "index.md").write_text("# Home\n[there](nowhere.md)\n")
    (tmp_path / "anchor" / "index.md").write_text("# Home\n[there](index.md#nowhere)\n")
    sound, page, anchor = (
        build(tmp_path / f"{name}.yml", tmp_path / "site") for name in ("sound", "page", "anchor")
    )
    assert sound.returncode == 0, sound.stderr
    for refused in (page, anchor):
        assert refused.returncode != 0 and "nowhere" in refused.stderr
