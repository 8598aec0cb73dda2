"""The constants that each loss of `train dpo` was published with. Whoever asks for a loss and names none gets them."""

from __future__ import annotations

from typing import Any

# diffusers' script, which offers the first three with one default; robust DPO has nothing of its own for diffusion.
_MARGIN = {"beta_dpo": 2500.0, "beta_convention": "diffusers"}
# jacklishufan/diffusion-kto: train_kto_sd_v1.5.py's default, a mean over dims without a 1/2; the launcher leaves it.
_KTO = {"beta_dpo": 1000.0, "beta_convention": "diffusers"}

PUBLISHED: dict[str, dict[str, Any]] = {
    "sigmoid": _MARGIN,
    "ipo": _MARGIN,
    "hinge": _MARGIN,
    "robust": _MARGIN,
    "kto": _KTO,
    "kto_pairs": _KTO,
    "mapo": _MARGIN,  # it reads no beta_dpo: as if nothing were set
    # huaishengzhu/DSPO, launchers/sd15.sh: its one --beta_dpo is dspo_strength too, and the sigmoid halves it.
    "dspo": {"beta_dpo": 0.001, "beta_convention": "salesforce"},
}
