"""`reward ls`: the rewards known by name, and how to write others."""

from __future__ import annotations

from diffusion_align.options import UsageError
from diffusion_align.rewards.catalogue import CATALOGUE, FORMS, HOW


def reward_ls(argv: list[str]) -> int:
    """Print what each reward measures, its unit, licence, weights, memory and needs."""
    if argv:
        raise UsageError(f"reward ls takes no argument, got {argv[0]}")
    width = max(map(len, CATALOGUE))
    for name, entry in CATALOGUE.items():
        size = f", {entry.gigabytes:g} GB" if entry.gigabytes else ""
        print(f"{name:{width}}  {entry.about}")
        print(f"{'':{width}}    unit: {entry.unit}; licence: {entry.licence}")
        print(f"{'':{width}}    weights: {entry.origin}{size}; needs: {entry.needs}")
    print()
    width = max(map(len, FORMS))
    for form, about in FORMS.items():
        print(f"{form:{width}}  {about}")
    print("\n" + "\n".join(HOW))
    return 0
