"""What a run fetches by name: where it lies, how large it is, under which licence. Facts only; nothing is imported.

Licences are those stated at the address itself; where it states none, that is said. Sizes are those stated there, or,
where "about" is written beside them, computed from the number of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """One thing on the hub. `files` are what is fetched of it, all that a run needs where none is named; "@SPLIT" and
    patterns are not used. `note` is what else a reader should know."""

    repo: str
    licence: str
    size: str = ""
    files: tuple[str, ...] = ()
    note: str = ""
    make: str = ""  # the command that makes it, where nobody publishes it


STEP_AWARE: Mapping[str, Origin] = {
    "spo-sd15": Origin(
        "SPO-Diffusion-Models/Step-Aware_Preference_Models", "Apache-2.0", "about 5.2 GB",
        ("sd-v1-5_step-aware_preference_model.bin",), "SPO's, for Stable Diffusion 1.5",
    ),
    "spo-sdxl": Origin(
        "SPO-Diffusion-Models/Step-Aware_Preference_Models", "Apache-2.0", "about 5.2 GB",
        ("sdxl_step-aware_preference_model.bin",), "SPO's, for SDXL",
    ),
}  # fmt: skip
