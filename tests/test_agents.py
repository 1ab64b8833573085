"""What Claude Code and Codex may do unasked: what program.md names, and no edit of a fixed file."""

import json
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatchcase

import pytest

from children import ROOT

OURS = {"train.py", "results.tsv", "ideas.md"}
CLAUDE = json.loads((ROOT / ".claude/settings.json").read_text())["permissions"]
CODEX = tomllib.loads((ROOT / ".codex/config.toml").read_text())
RULES = []
exec((ROOT / ".codex/rules/night.rules").read_text(),       # Starlark that is also Python
     {"prefix_rule": lambda **rule: RULES.append(rule)})


def commands():
    """All of program.md's commands that begin with uv or git, with something in each <place>."""
    text = (ROOT / "program.md").read_text()
    found = re.findall(r"`((?:uv|git|mv|mkdir) [^`]+)`", text) + [
        line.strip() for line in text.splitlines() if re.match(r" {4,}(uv|git) ", line)]
    for command in found:
        for part in " ".join(command.split()).split(" && "):
            yield re.sub(r"<[^>]+>", "abc1234", part)


# What both clients let through unasked because it only reads.
READING = ("git status", "git diff", "git config user.name")


def claude_allows(command):
    rules = (rule[5:-1] for rule in CLAUDE["allow"] if rule.startswith("Bash("))
    return any(fnmatchcase(command, rule) for rule in rules)


def codex_allows(command):
    """Whether a rule has the command run outside of the sandbox."""
    words = shlex.split(command)
    return any(len(words) >= len(rule["pattern"]) and all(
        word == each or word in each and isinstance(each, list)
        for word, each in zip(words, rule["pattern"])) for rule in RULES)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_both_allow_the_commands_of_program_md(command):
    if not command.startswith(READING):
        assert claude_allows(command) and codex_allows(command)


@pytest.mark.parametrize("command", [
    "git push origin main", "git reset --hard abc", "git clean -fd", "uv run python -c 1",
    "uv run train.py", "uv add x", "uv run pytest", "pip install x", "rm train.py"])
def test_neither_allows(command):
    assert not claude_allows(command) and not codex_allows(command)


def test_no_fixed_file_may_be_edited():
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                             cwd=ROOT, capture_output=True, text=True, check=True)
    roots = {name.split("/")[0] for name in tracked.stdout.split()} - OURS
    roots -= {".ci", ".gitattributes", ".gitignore", ".python-version", "LICENSE"}
    assert {"prepare.py", "tests", "program.md"} < roots
    folders = {name for name in roots if (ROOT / name).is_dir()} | {".git"}
    rules = CODEX["permissions"][CODEX["default_permissions"]]["filesystem"][":workspace_roots"]
    assert {name for name, access in rules.items() if access == "read"} == roots | {".git"}
    denied = {f"/{name}/**" if name in folders else f"/{name}" for name in roots | {".git"}}
    assert {f"Edit({name})" for name in denied} <= {*CLAUDE["deny"]}
    assert {rule for rule in CLAUDE["allow"] if rule.startswith("Edit")} == {
        f"Edit(/{name})" for name in OURS}
