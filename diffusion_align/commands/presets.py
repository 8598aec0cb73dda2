"""`presets {ls,show,cp,check}`: lists, prints and copies presets, and checks what they need."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from diffusion_align.commands.presets_check import needs_of, report
from diffusion_align.options import UsageError, all_presets, preset_path, read_yaml


def presets(word: str, argv: list[str]) -> int:
    """List, print, copy or check presets."""
    bad = [flag for flag in argv if flag.startswith("-")]
    if bad:
        raise UsageError(f"presets {word} takes no flag, got {bad[0]}")
    if word == "ls":
        _expect(argv, 0, 0, "presets ls")
        width = max(map(len, all_presets()))
        for name in all_presets():
            print(f"{name:{width}}  {read_yaml(_path(name))['about']}")
    elif word == "show":
        _expect(argv, 1, 1, "presets show METHOD/NAME")
        path = _path(argv[0])
        print(path.read_text(encoding="utf-8"), end="")
        print("\n# Licences, as stated at the addresses:")
        for need in needs_of(f"{path.parent.name}/{path.stem}"):
            print(f"#   {need.what:16} {need.name}: {need.licence}")
    elif word == "check":
        _expect(argv, 0, 1, "presets check [METHOD/NAME]")
        paths = [_path(argv[0])] if argv else [_path(name) for name in all_presets()]
        print("\n".join(report([f"{path.parent.name}/{path.stem}" for path in paths])))
    else:
        _expect(argv, 1, 2, "presets cp METHOD/NAME [FILE]")
        source = _path(argv[0])
        target = Path(argv[1] if len(argv) == 2 else source.name).expanduser()
        target = target / source.name if target.is_dir() else target
        if target.exists():
            raise UsageError(f"{target} exists; give another name")
        shutil.copyfile(source, target)
        print(f"{target}: edit it and use it with --config {shlex.quote(str(target))}")
    return 0


def _path(name: str) -> Path:
    """The file of the preset METHOD/NAME; a NAME without METHOD is a preset of `dpo`."""
    method, _, bare = name.rpartition("/")
    return preset_path(bare, f"train {method or 'dpo'}")


def _expect(argv: list[str], least: int, most: int, usage: str) -> None:
    if not least <= len(argv) <= most:
        raise UsageError(f"usage: diffusion-align {usage}")
