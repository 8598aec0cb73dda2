"""Commands that are printed for the user to copy: quoted for a shell, and with the launcher of several processes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PROG = "diffusion-align"


def command_line(*words: object) -> str:
    """`diffusion-align WORDS`, quoted for a shell."""
    return shlex.join([PROG, *map(str, words)])


def restart_command(verb: str, words: Sequence[str]) -> str:
    """The command that runs this verb with these words, with the current number of processes.

    The command of a launcher is copied from the parent process, up to the script.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return command_line(*verb.split(), *words)
    given = sys.argv[1:]
    # scripts/finetune.py takes the method without `train`; the scripts of one method take options only.
    forms = (verb.split(), verb.split()[1:], [])
    named = next(form for form in forms if given[: len(form)] == form)
    launcher = _launcher(given)
    if launcher is None:
        local = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        more = ["--nnodes", nodes] if nodes != "1" else []
        launcher, named = ["torchrun", "--nproc_per_node", local, *more, "-m", "diffusion_align.cli"], verb.split()
    return shlex.join([*launcher, *named, *words])


def _launcher(given: Sequence[str]) -> list[str] | None:
    """The words of the parent process before the arguments of this one; None if they cannot be read."""
    parent = _words_of(os.getppid())
    end = len(parent) - len(given)
    # After a fork, parent and child have the same command line: such a parent is no launcher.
    if not given or end < 1 or parent[end:] != list(given) or parent == _words_of(os.getpid()):
        return None
    before = parent[:end]
    python = Path(before[0]).name.startswith("python")
    if python and len(before) > 1 and Path(before[1]).is_absolute() and os.access(before[1], os.X_OK):
        before = before[1:]  # an executable script, which the interpreter in its first line runs
    name = Path(before[0]).name
    return [name if shutil.which(name) == before[0] else before[0], *before[1:]]


def _words_of(process: int) -> list[str]:
    """The command line of a process, on Linux; elsewhere []."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []
    return [os.fsdecode(word) for word in words]
