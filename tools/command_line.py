"""Write docs/command-line.md from the help of the commands: ``python -m tools.command_line``."""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from runner_client.cli import main as commands

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"

_HEAD = """# The command line

`python -m tools.command_line` writes this page from the help texts, which `mlx-runner COMMAND
--help` shows too. Commands that call a runner take its address as `HOST:PORT`, `[IPV6]:PORT` or
`unix:/path`. Sizes are `8GiB`, `512MiB`, `8GB` (powers of 1000) or a number of bytes. `--json`
prints one JSON object; progress goes to standard error.
"""


def page() -> str:
    """Return the text of the page."""
    rows = [
        f"| [`{name}`](#{name}) | {command.short_help} |"
        for name, command in commands.commands.items()
    ]
    sections = [_section(name, command) for name, command in commands.commands.items()]
    table = ["| command | purpose |", "|---|---|", *rows]
    return "\n".join([_HEAD, *table, "", *sections])


def _section(name: str, command: click.Command) -> str:
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    options = [each for each in command.params if isinstance(each, click.Option)]
    words = [each.metavar or (each.name or "").upper() for each in arguments]
    usage = " ".join(["mlx-runner", name, *["[OPTIONS]"] * bool(options), *words])
    parts = [f"## {name}\n", f"```text\n{usage}\n```\n", f"{_cleaned(command.help)}\n"]
    if options:
        rows = [f"| {_spelling(each)} | {_meaning(each)} |" for each in options]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows, ""]))
    return "\n".join([*parts, f"{_cleaned(command.epilog)}\n"])


def _cleaned(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("|", "\\|")


def _spelling(option: click.Option) -> str:
    return f"`{'`, `'.join(option.opts)}`"


def _meaning(option: click.Option) -> str:
    kind = option.type
    choices = (
        f" One of {', '.join(map(str, kind.choices))}." if isinstance(kind, click.Choice) else ""
    )
    effect, mark, default = _cleaned(option.help).partition("  [default: ")
    if option.show_default:
        mark, default = "  [default: ", f"{option.default}]"
    return f"{effect}{choices}{mark}{default}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
