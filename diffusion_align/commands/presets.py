"""`presets {ls,show,cp}`: named starting points, as commented YAML."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusion_align.options import UsageError, preset_names, preset_path, read_yaml


def presets(word: str, argv: list[str]) -> int:
    """List, print or copy presets."""
    bad = [flag for flag in argv if flag.startswith("-")]
    if bad:
        raise UsageError(f"presets {word} takes no flag, got {bad[0]}")
    if word == "ls":
        _expect(argv, 0, 0, "presets ls")
        width = max(map(len, preset_names()))
        for name in preset_names():
            content = read_yaml(preset_path(name))
            print(f"{name:{width}}  {content['verb']:10}  {content['about']}")
    elif word == "show":
        _expect(argv, 1, 1, "presets show NAME")
        print(preset_path(argv[0]).read_text(encoding="utf-8"), end="")
    else:
        _expect(argv, 1, 2, "presets cp NAME [FILE]")
        source = preset_path(argv[0])
        target = Path(argv[1] if len(argv) == 2 else source.name)
        target = target / source.name if target.is_dir() else target
        if target.exists():
            raise UsageError(f"{target} exists; give another name")
        shutil.copyfile(source, target)
        print(f"{target}: edit it and use it with --config {target}")
    return 0


def _expect(argv: list[str], least: int, most: int, usage: str) -> None:
    if not least <= len(argv) <= most:
        raise UsageError(f"usage: diffusion-align {usage}")
