"""What README and the benchmarks' README name exists: options, scripts, public names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import l2p_lowvram
import offload
import tiling
from l2p_lowvram import cli

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md", "CHANGELOG.md")}
# Shown as commands, with an ellipsis for what was said before.
COMMANDS = re.findall(r"^    \$ (l2p-lowvram .*)$", TEXTS["README.md"], re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_one(command: str) -> None:
    words = shlex.split(command.replace(" ... ", " -p fox "), comments=True)[1:]

    cli.build_parser().parse_args(words)


@pytest.mark.parametrize("name", TEXTS)
def test_options_and_scripts_that_the_docs_name_exist(name: str) -> None:
    scripts = set(re.findall(r"benchmarks/(\w+\.py)", TEXTS[name]))
    sources = [*(ROOT / "l2p_lowvram").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    known = {"--help", "--version"} | set(
        re.findall(r'"(--[a-z][a-z0-9-]+)"', "\n".join(path.read_text() for path in sources))
    )
    code = " ".join(re.findall(r"`[^`]+`", TEXTS[name]))
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", code))

    assert [script for script in sorted(scripts) if not (ROOT / "benchmarks" / script).is_file()] == []
    assert sorted(named - known) == []


@pytest.mark.parametrize("package", [l2p_lowvram, offload, tiling], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_readme(package: object) -> None:
    told = TEXTS["README.md"]

    assert [name for name in package.__all__ if not re.search(rf"\b{name}\b", told)] == []
