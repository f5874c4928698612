"""What README and docs tell people to type exists: every `ctseg` line has a known command and known options."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from ctseg.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def typed_lines(page: Path) -> list[str]:
    """Lines of code blocks and inline code that start with `ctseg `, continuation lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(ctseg [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [re.sub(r"^(srun )?", "", line.strip()) for line in lines if re.match(r"\s*(srun )?ctseg [a-z]", line)]


def test_the_pages_have_commands_to_check() -> None:
    assert sum(len(typed_lines(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_typed_command_and_option_exists(page: Path) -> None:
    for line in typed_lines(page):
        words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
        assert words[1] in COMMANDS, line
        queued = [word for word in words[2:3] if words[1] == "slurm" and word in COMMANDS]  # it takes its options too
        used = [COMMANDS[c] for c in (words[1], *queued)]
        used[0] = getattr(used[0], "commands", {}).get("".join(words[2:3]), used[0])  # `dicom ls`: a command of a group
        known = {name for command in used for parameter in command.params for name in parameter.opts}
        unknown = [
            word for word in words[2:] if word.startswith("--") and word.partition("=")[0] not in {*known, "--help"}
        ]
        assert not unknown, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
