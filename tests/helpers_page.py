"""docs/extending.md as data, and a program that runs its commands on a copy of the package that it changed.

python helpers_page.py FOLDER        runs FOLDER/blocks.json there, and writes what came out to FOLDER/results.json
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"(?:^(New file|In) `([^`]+)`:\n+|^)```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block: `kind` is "new" or "change" for a file, "sh" or "python" for what is run."""

    section: str
    kind: str
    path: str
    text: str


def read_blocks(page: str) -> list[Block]:
    """The blocks of every section, in order; a diff without a path belongs to the file of the one before it."""
    blocks = []
    for section in page.split("\n## ")[1:]:
        title, path = section.splitlines()[0], ""
        for how, named, language, text in BLOCK.findall(section):
            path = named or path
            kind = "new" if how == "New file" else "change" if language == "diff" else language
            blocks.append(Block(title, kind, path if kind in ("new", "change") else "", text))
    return blocks


def apply(block: Block, root: Path) -> None:
    """Write a new file, or make a change whose old lines must stand in the file exactly once."""
    path = root / block.path
    if block.kind == "new":
        assert not path.exists(), f"{block.path} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        return
    lines = [line or " " for line in block.text.splitlines()]
    assert all(line[0] in "+- " for line in lines), block.text
    old, new = ("".join(line[1:] + "\n" for line in lines if line[0] != sign) for sign in "+-")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{block.path} holds these lines {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def commands_of(text: str) -> list[tuple[str, str]]:
    """(command, what the comment above it promises) of each command of a block."""
    found, promise = [], ""
    for line in text.splitlines():
        if line.startswith("# "):
            promise = line[2:]
        elif line:
            found.append((line, promise))
            promise = ""
    return found


def run_command(words: list[str]) -> tuple[int, str]:
    """The exit status and all output of a command, in this process."""
    from accelerate.state import AcceleratorState

    from diffusion_align import cli

    AcceleratorState._reset_state(True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = cli.main(words)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
    return code, output.getvalue()


def run_program(text: str) -> tuple[int, str]:
    """0 and nothing, or 1 and the error of a program in Python."""
    try:
        exec(compile(text, "docs/extending.md", "exec"), {})
    except Exception:
        return 1, traceback.format_exc()
    return 0, ""


def main(folder: Path) -> None:
    """Run the blocks in order; one that fails does not keep the others from running."""
    results = []
    for block in (Block(**known) for known in json.loads((folder / "blocks.json").read_text())):
        if block.kind == "new":
            apply(block, folder)
            continue
        for command, promise in commands_of(block.text) if block.kind == "sh" else [(block.text, "")]:
            code, output = run_command(shlex.split(command)[1:]) if block.kind == "sh" else run_program(command)
            result = {"section": block.section, "command": command, "promise": promise}
            results.append(result | {"code": code, "output": output})
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
