"""What MkDocs is told while it builds the site: where sources lie, and the page of all commands.

The page is made from the command line itself, so it cannot tell anything else.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

from fastres.cli.main import app

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "build" / "docs-sources"
PAGE = "reference/commands.md"


def on_startup(**_: Any) -> None:
    """Lays the packages out as they are imported: griffe reads files and follows no links."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    only_python = shutil.ignore_patterns("__pycache__", "*.json")
    shutil.copytree(ROOT / "fastres", SOURCES / "fastres", ignore=only_python)
    for name in ("kernels", "calib"):
        shutil.copytree(ROOT / name, SOURCES / "fastres" / name, ignore=only_python)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of all commands."""
    files.append(File.generated(config, PAGE, content=commands_page()))
    return files


def commands_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    group: Any = get_command(app)
    with group.make_context("fastres", [], resilient_parsing=True) as context:
        parts = ["# Commands", _escaped(inspect.cleandoc(group.help)), _options(group, context)]
        for name, command in group.commands.items():
            inner = command.context_class(command, info_name=name, parent=context)
            pieces = " ".join(["fastres", name, *command.collect_usage_pieces(inner)])
            parts += [
                f"## fastres {name} {{ #{name} }}",
                f"```\n{pieces}\n```",
                _escaped(inspect.cleandoc(command.help)),
                _options(command, inner),
            ]
    return "\n\n".join(parts) + "\n"


def _options(command: Any, context: Any) -> str:
    """A list of what the help lists, in its order."""
    records = (param.get_help_record(context) for param in command.get_params(context))
    return "\n".join(f"- `{name}`: {_escaped(text)}" for name, text in filter(None, records))


def _escaped(text: str) -> str:
    """Text of the help, in which nothing is markup."""
    for sign in "\\`*_{}[]<>":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else f"&{'lg'[sign == '>']}t;")
    return text
