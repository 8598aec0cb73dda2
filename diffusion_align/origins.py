"""What a run fetches by name: address, size and licence of each. Facts only; importing it is cheap.

Licences and sizes are what the addresses state; a size with "about" is computed from numbers of weights. They were read
from public pages, last in November 2026; nothing was fetched. Rewards have their own table, `rewards.catalogue`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RAIL_M = "CreativeML Open RAIL-M"
NO_LICENCE = "none stated there; the code of its authors, PickScore, is MIT"


@dataclass(frozen=True)
class Origin:
    """A model, a set of preferences, or a file of weights on the hub.

    Attributes:
        files: names or patterns of what is fetched; empty for a model's folder.
        note: what else a reader should know.
        make: the command that makes it if nobody publishes it; then `repo` is empty.
    """

    repo: str
    licence: str
    size: str
    files: tuple[str, ...] = ()
    note: str = ""
    make: str = ""


MODELS: Mapping[str, Origin] = {
    "tiny": Origin("", "Apache-2.0", "in the package"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Origin(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", RAIL_M, "about 5.5 GB",
        note="a copy of runwayml/stable-diffusion-v1-5, which was deleted",
    ),
    "CompVis/stable-diffusion-v1-4": Origin("CompVis/stable-diffusion-v1-4", RAIL_M, "about 5.5 GB"),
    "stabilityai/stable-diffusion-xl-base-1.0": Origin(
        "stabilityai/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M", "about 14 GB"
    ),
}  # fmt: skip

_SYNTH = (
    "diffusion-align data synth --models stabilityai/stable-diffusion-xl-base-1.0 --prompts pickapic-v2 "
    "--num_prompts 58000 --pictures 4 --rewards hpsv2.1 --rewards pickscore --rewards imagereward "
    "--rewards clipscore --rewards aesthetic --out syn-pic"
)
DATA_SETS: Mapping[str, Origin] = {
    "tiny": Origin("", "Apache-2.0", "in the package"),
    "yuvalkirstain/pickapic_v2": Origin(
        "yuvalkirstain/pickapic_v2", NO_LICENCE, "335 GB in all splits", ("*train*.parquet",),
        "Pick-a-Pic v2, 959,000 rows to train on; its encodings take 64 kB a picture for Stable Diffusion 1.5",
    ),
    "yuvalkirstain/pickapic_v1": Origin(
        "pickapic-anonymous/pickapic_v1", NO_LICENCE, "202 GB in all splits", ("*train*.parquet",),
        "Pick-a-Pic v1 in a copy by others: its own address has not answered since 2025-04-30",
    ),
    "kashif/pickascore": Origin(
        "kashif/pickascore", "none looked up", "not looked up", ("*train*.parquet",), "a small part of Pick-a-Pic"
    ),
    "syn-pic": Origin(
        "", "your own; that of the pictures' models holds", "58,000 prompts x 4 pictures",
        note="RankDPO's Syn-Pic is not published: this is its counterpart, by SDXL alone and rewards that are here",
        make=_SYNTH,
    ),
}  # fmt: skip

_STEP_AWARE = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
STEP_AWARE: Mapping[str, Origin] = {
    "spo-sd15": Origin(
        _STEP_AWARE, "Apache-2.0", "about 5.2 GB", ("sd-v1-5_step-aware_preference_model.bin",),
        "SPO's own, for Stable Diffusion 1.5",
    ),
    "spo-sdxl": Origin(
        _STEP_AWARE, "Apache-2.0", "about 5.2 GB", ("sdxl_step-aware_preference_model.bin",), "SPO's own, for SDXL"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PromptList:
    """A list of prompts that is fetched.

    Attributes:
        files: {category: file}; a single file has the category "", and without a `key` the names are no categories.
        prompts: their number, if known.
        key: the rows' name for the category.
        once: rows are preferences, with many rows to a prompt; each prompt is taken once.
        sha256: of a single file on the web, below the URL `repo`; without it `repo` is on the hub.
    """

    repo: str
    files: Mapping[str, str]
    prompts: int | None
    licence: str
    key: str = "category"
    size: str = "under 1 MB"
    once: bool = False
    sha256: str = ""
    note: str = ""


STYLES = ("anime", "concept-art", "paintings", "photo")
ATTRIBUTES = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")


def _validation(attribute: str) -> str:
    # The data set names its splits by what follows the first underscore of the configuration's name.
    name = f"{attribute}_val"
    return f"{name}/{name.split('_', 1)[1]}-00000-of-00001.parquet"


BENCHMARKS: Mapping[str, PromptList] = {
    "hpdv2": PromptList(
        "ymhao/HPDv2", {style: f"benchmark/{style}.json" for style in STYLES}, 3200, "Apache-2.0", key="style"
    ),
    "drawbench": PromptList(
        "Jialuo21/DrawBench", {"": "data/test-00000-of-00001.parquet"}, 200, "none stated, by its authors or this copy"
    ),
    "t2i-compbench": PromptList(
        "NinaKarine/t2i-compbench", {name: _validation(name) for name in ATTRIBUTES}, 2400, "MIT"
    ),
    "dpg-bench": PromptList(
        "Jialuo21/DPG-Bench",
        {"": "data/test-00000-of-00001.parquet"},
        1065,
        "Apache-2.0 (its authors' repository; this copy states none)",
    ),
}
TRAINING_LISTS: Mapping[str, PromptList] = {
    "hpdv2-train": PromptList(
        "ymhao/HPDv2", {"": "train.json"}, None, "Apache-2.0", "", "116 MB", once=True,
        note="the prompts of HPD v2's training split, over 100,000",
    ),
    "pickapic-v1": PromptList(
        "yuvalkirstain/pickapic_v1_no_images", {"": "data/train-00000-of-00001-b138676ed2d1f52a.parquet"}, None,
        NO_LICENCE, "", "168 MB", once=True, note="the prompts of Pick-a-Pic v1's training split",
    ),
    "pickapic-v2": PromptList(
        "yuvalkirstain/pickapic_v2_no_images",
        {
            "0": "data/train-00000-of-00002-c261d1ef2a61d087.parquet",
            "1": "data/train-00001-of-00002-4fc6e0b8b7258189.parquet",
        },
        None, NO_LICENCE, "", "282 MB", once=True, note="the prompts of Pick-a-Pic v2's training split",
    ),
    "spo-4k": PromptList(
        "https://raw.githubusercontent.com/RockeyCoss/SPO/27a86428edcff3b25dcce8001be94a7a01608f58",
        {"": "spo_training_and_inference/assets/prompts/4k_training_prompts.json"}, 4000,
        "MIT (the repository's; the prompts are Pick-a-Pic v1's)", "",
        sha256="804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4",
        note="the prompts that SPO's authors trained on",
    ),
}  # fmt: skip
PROMPT_LISTS: Mapping[str, PromptList] = {**BENCHMARKS, **TRAINING_LISTS}


@dataclass(frozen=True)
class Shipped:
    """A list of prompts that ships with the package, below assets/."""

    file: str
    licence: str


SHIPPED: Mapping[str, Shipped] = {
    "parti": Shipped("prompts/parti.tsv", "Apache-2.0"),
    "geneval": Shipped("prompts/geneval.jsonl", "MIT"),
    "animals": Shipped("prompts/animals.txt", "MIT (kvablack/ddpo-pytorch); 45 names of animals"),
}
