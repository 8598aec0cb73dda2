"""`doctor`: which packages are installed and work together, which are missing, and what to do about it."""

from __future__ import annotations

import importlib
import platform
import shlex
from importlib import metadata

from diffusion_align.options import UsageError

# Imported in this order: a CPU build of torch with the registry's torchvision fails here, before a run does.
NEEDED = ("torch", "torchvision", "diffusers", "transformers", "peft", "open_clip", "safetensors", "PIL", "yaml")
EXTRAS = {"xformers": "xformers", "bitsandbytes": "8bit"}
DISTRIBUTIONS = {"open_clip": "open_clip_torch", "PIL": "Pillow", "yaml": "PyYAML"}
TORCHVISION_CURE = "reinstall torch and torchvision together: pip install --force-reinstall torch torchvision"


def doctor(argv: list[str]) -> int:
    """Print a line for each package and for the device; return 1 if a needed package does not work."""
    if argv:
        raise UsageError(f"doctor takes no argument, got {argv[0]}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    broken = 0
    for name in NEEDED:
        line, works = check(name)
        broken += not works
        print(f"{name:13} {line}")
    for name, extra in EXTRAS.items():
        line, works = check(name)
        install = shlex.join(["pip", "install", f"diffusion_align[{extra}]"])
        print(f"{name:13} {line if works else f'not there (optional): {install}'}")
    if check("torch")[1]:
        print(f"device        {_devices()}")
    print("all there" if not broken else f"{broken} broken: a run will not start")
    return 1 if broken else 0


def check(name: str) -> tuple[str, bool]:
    """(version, True) of an installed module, or (the error of its import, False)."""
    try:
        importlib.import_module(name)
        return metadata.version(DISTRIBUTIONS.get(name, name)), True
    except metadata.PackageNotFoundError:
        return "imports, version unknown", True
    except Exception as error:  # a broken binary raises anything: RuntimeError, OSError, AttributeError
        said = " ".join(str(error).split())[:150]
        cure = f"; {TORCHVISION_CURE}" if "torchvision::" in said else ""
        return f"DOES NOT IMPORT: {type(error).__name__}: {said}{cure}", False


def _devices() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"cuda: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads"
