"""The layouts that are recognised, as data: what a table must have, how it is read, and what is known of it."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusion_align.data import interpret
from diffusion_align.data.records import PROMPTS, Record
from diffusion_align.data.rows import Row

_PROMPT = ("prompt", "caption")


@dataclass(frozen=True, slots=True)
class Format:
    """A layout.

    Attributes:
        holds: pairs, rankings, captions or prompts.
        needs: the columns that make it out, each with the names it may have.
        may: columns that are read where they are there.
        mapping: theirs -> ours, for people.
        tie: how a tie is known; weight: what the weight is. Empty where there is none.
        known: where it is from, and its licence.
    """

    name: str
    holds: str
    needs: tuple[tuple[str, ...], ...]
    row: Callable[[Record], Row]
    mapping: tuple[tuple[str, str], ...]
    may: tuple[str, ...] = ()
    tie: str = ""
    weight: str = ""
    known: str = ""


FORMATS = (
    Format(
        "lists of pictures (this project's own)",
        "rankings",
        (_PROMPT, ("images",), interpret.VALUES),
        interpret.listed_pictures,
        (
            ("prompt", "prompt"),
            ("images", "pictures [K]"),
            ("relevance; else scores [K] or [M][K], or ranks, the share of comparisons won", "relevance"),
            ("weight, source, models", "weight, source, models"),
        ),
        may=("weight", "source", "models"),
        tie="all pictures equally relevant",
        weight="weight, or 1",
        known="data synth, data annotate, data convert",
    ),
    Format(
        "Pick-a-Pic",
        "pairs",
        (("caption", "prompt"), ("jpg_0",), ("jpg_1",), ("label_0",), ("label_1",)),
        interpret.pick_a_pic,
        (
            ("caption", "prompt"),
            ("jpg_0, jpg_1", "pictures"),
            ("label_0, label_1", "relevance, 1 the winner"),
            ("model_0, model_1", "models"),
        ),
        may=("model_0", "model_1"),
        tie="label_0 == 0.5",
        known="Pick-a-Pic v1, v2 and sets with their names (MaPO, data synth); the card of v1 names no licence",
    ),
    Format(
        "chosen and rejected",
        "pairs",
        (_PROMPT, ("chosen", "chosen_file_name"), ("rejected", "rejected_file_name")),
        interpret.chosen_rejected,
        (("prompt", "prompt"), ("chosen", "winner"), ("rejected", "loser"), ("weight", "weight")),
        may=("weight",),
        weight="weight, or 1",
        known="trl's naming, datasets' image folder; open-image-preferences-v1-binarized is Apache-2.0",
    ),
    Format(
        "HPDv2 train",
        "pairs",
        (_PROMPT, ("file_path",), ("human_preference",)),
        interpret.file_path_preference,
        (("prompt", "prompt"), ("file_path", "pictures"), ("human_preference", "relevance, 1 the winner")),
        tie="both preferences equal",
        known="HPDv2; licence: see its card",
    ),
    Format(
        "ImageRewardDB, a picture a row",
        "rankings",
        (_PROMPT, ("prompt_id",), ("image_path",), ("rank",)),
        interpret.image_path_rank,
        (
            ("prompt", "prompt"),
            ("rows of one prompt_id", "one row"),
            ("image_path", "pictures [K]"),
            ("rank, 1 the best", "relevance, the share of comparisons won"),
        ),
        tie="all ranks equal",
        known="ImageRewardDB, Apache-2.0; its pictures come from DiffusionDB",
    ),
    Format(
        "HPDv2 test",
        "rankings",
        (_PROMPT, ("image_path",), ("rank",)),
        interpret.image_path_rank,
        (
            ("prompt", "prompt"),
            ("image_path", "pictures [K]"),
            ("rank, the lowest the best", "relevance, the share of comparisons won"),
        ),
        tie="all ranks equal",
        known="HPDv2; licence: see its card",
    ),
    Format(
        "HPDv3",
        "pairs",
        (_PROMPT, ("path1",), ("path2",)),
        interpret.path_1_is_better,
        (
            ("prompt", "prompt"),
            ("path1", "winner, always"),
            ("path2", "loser"),
            ("confidence", "weight"),
            ("model1, model2", "models"),
        ),
        may=("confidence", "model1", "model2", "source"),
        tie="confidence 0",
        weight="confidence, or 1 where it is null",
        known="HPDv3, MIT; HPDv3++, Apache-2.0",
    ),
    Format(
        "ImageReward JSON",
        "rankings",
        (_PROMPT, ("generations",), ("ranking",)),
        interpret.generations_ranking,
        (
            ("prompt", "prompt"),
            ("generations", "pictures [K]"),
            ("ranking, the lowest the best", "relevance, the share of comparisons won"),
        ),
        tie="all ranks equal",
        known="ImageReward's repository; the pictures are those of ImageRewardDB, Apache-2.0",
    ),
    Format(
        "Rapidata",
        "pairs",
        (
            _PROMPT,
            ("image1",),
            ("image2",),
            ("weighted_results_image1_preference",),
            ("weighted_results_image2_preference",),
        ),
        interpret.weighted_votes,
        (
            ("prompt", "prompt"),
            ("image1, image2", "pictures"),
            ("weighted_results_image{1,2}_preference, v1 and v2", "relevance: the larger wins"),
            ("|v1 - v2| / (v1 + v2)", "weight"),
            ("model1, model2", "models"),
        ),
        may=("model1", "model2"),
        tie="both votes equal",
        weight="|v1 - v2| / (v1 + v2)",
        known="Rapidata; the licence is each set's own, see its card",
    ),
    Format(
        "pictures with captions",
        "captions",
        (("file_name",), PROMPTS),
        interpret.caption,
        (("file_name, or the picture", "picture"), ("its text", "prompt")),
        known="datasets' image folder, kohya's folders, webdataset",
    ),
    Format(
        "prompts",
        "prompts",
        (PROMPTS,),
        interpret.prompt_only,
        (("prompt", "prompt"),),
        known="one a line, a JSON list, or JSON lines as of GenEval",
    ),
)
PICK_A_PIC, IMAGE_REWARD_DB, CAPTIONS, PROMPT_LIST = FORMATS[1], FORMATS[4], FORMATS[-2], FORMATS[-1]
