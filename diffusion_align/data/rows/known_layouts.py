"""The layouts that are recognised, by name: the columns that a table must have, and how its rows are read."""

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

from diffusion_align.data.pairs_and_rankings import DataRow
from diffusion_align.data.rows import interpret
from diffusion_align.data.rows.raw_rows import PROMPT_COLUMNS, RawRow

_PROMPT = ("prompt", "caption")
_RANKED = "relevance, the fraction of comparisons won"


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout.

    Attributes:
        holds: pairs, rankings, captions or prompts.
        needs: the columns by which it is recognised, each with the names it may have.
        to_row: reads a row.
        mapping: theirs -> ours, for people.
        may: columns that are read if they exist.
        tie: what a tie is; weight: what the weight is. Empty if there is none.
        known: where it is from, and its licence.
    """

    name: str
    holds: str
    needs: tuple[tuple[str, ...], ...]
    to_row: Callable[[RawRow], DataRow]
    mapping: tuple[tuple[str, str], ...]
    may: tuple[str, ...] = ()
    tie: str = ""
    weight: str = ""
    known: str = ""

    @property
    def compares(self) -> bool:
        """Whether its rows say which picture is better."""
        return self.holds in ("pairs", "rankings")

    def fits(self, columns: Collection[str]) -> bool:
        """Whether a table has all columns that this layout needs."""
        return all(any(name in columns for name in names) for names in self.needs)

    def reads(self, columns: Iterable[str]) -> list[str]:
        """The columns of a table that this layout reads, in the table's order."""
        columns = list(columns)
        named = set(self.may)
        for names in self.needs:
            present = [name for name in names if name in columns]
            named |= set(present[:1] if set(names) <= set(PROMPT_COLUMNS) else present)
        return [column for column in columns if column in named]


PICTURE_LISTS = Layout(
    "lists of pictures (this project's own)",
    "rankings",
    (_PROMPT, ("images",), interpret.VALUE_COLUMNS),
    interpret.listed_pictures,
    (
        ("prompt", "prompt"),
        ("images", "pictures [K]"),
        ("relevance; else scores [K] or [M][K], or ranks, the fraction of comparisons won", "relevance"),
        ("weight, source, models", "weight, source, models"),
    ),
    may=("weight", "source", "models"),
    tie="all pictures equally relevant",
    weight="weight, or 1",
    known="data synth, data annotate, data convert",
)
PICK_A_PIC = Layout(
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
)
CHOSEN_REJECTED = Layout(
    "chosen and rejected",
    "pairs",
    (_PROMPT, ("chosen", "chosen_file_name"), ("rejected", "rejected_file_name")),
    interpret.chosen_rejected,
    (("prompt", "prompt"), ("chosen", "winner"), ("rejected", "loser"), ("weight", "weight")),
    may=("weight",),
    weight="weight, or 1",
    known="trl's naming, datasets' image folder; open-image-preferences-v1-binarized is Apache-2.0",
)
HPDV2_TRAIN = Layout(
    "HPDv2 train",
    "pairs",
    (_PROMPT, ("file_path",), ("human_preference",)),
    interpret.file_path_preference,
    (("prompt", "prompt"), ("file_path", "pictures"), ("human_preference", "relevance, 1 the winner")),
    tie="both preferences equal",
    known="HPDv2; licence: see its card",
)
IMAGE_REWARD_DB = Layout(
    "ImageRewardDB, a picture a row",
    "rankings",
    (_PROMPT, ("prompt_id",), ("image_path",), ("rank",)),
    partial(interpret.ranked, pictures="image_path", ranks="rank"),
    (
        ("prompt", "prompt"),
        ("rows of one prompt_id", "one row"),
        ("image_path", "pictures [K]"),
        ("rank, 1 the best", _RANKED),
    ),
    tie="all ranks equal",
    known="ImageRewardDB, Apache-2.0; its pictures come from DiffusionDB",
)
HPDV2_TEST = Layout(
    "HPDv2 test",
    "rankings",
    (_PROMPT, ("image_path",), ("rank",)),
    partial(interpret.ranked, pictures="image_path", ranks="rank"),
    (("prompt", "prompt"), ("image_path", "pictures [K]"), ("rank, the lowest the best", _RANKED)),
    tie="all ranks equal",
    known="HPDv2; licence: see its card",
)
HPDV3 = Layout(
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
)
IMAGE_REWARD_JSON = Layout(
    "ImageReward JSON",
    "rankings",
    (_PROMPT, ("generations",), ("ranking",)),
    partial(interpret.ranked, pictures="generations", ranks="ranking"),
    (("prompt", "prompt"), ("generations", "pictures [K]"), ("ranking, the lowest the best", _RANKED)),
    tie="all ranks equal",
    known="ImageReward's repository; the pictures are those of ImageRewardDB, Apache-2.0",
)
_VOTES = ("weighted_results_image1_preference",), ("weighted_results_image2_preference",)
RAPIDATA = Layout(
    "Rapidata",
    "pairs",
    (_PROMPT, ("image1",), ("image2",), *_VOTES),
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
)
CAPTIONS = Layout(
    "pictures with captions",
    "captions",
    (("file_name",), PROMPT_COLUMNS),
    interpret.caption,
    (("file_name, or the picture", "picture"), ("its text", "prompt")),
    known="datasets' image folder, kohya's folders, webdataset",
)
PROMPT_LIST = Layout(
    "prompts",
    "prompts",
    (PROMPT_COLUMNS,),
    interpret.prompt_only,
    (("prompt", "prompt"),),
    known="one a line, a JSON list, or JSON lines as of GenEval",
)
# The first that fits is taken, so a layout stands before those whose columns it has too.
PREFERENCES = (
    PICTURE_LISTS, PICK_A_PIC, CHOSEN_REJECTED, HPDV2_TRAIN, IMAGE_REWARD_DB, HPDV2_TEST, HPDV3, IMAGE_REWARD_JSON,
    RAPIDATA,
)  # fmt: skip
# A table with one of these compares pictures, so it is not taken for captions or prompts with more beside them.
_COMPARING = {name for known in PREFERENCES for names in known.needs for name in names}
_COMPARING -= {*PROMPT_COLUMNS, "prompt_id"}


def layout_of(columns: Collection[str]) -> Layout | None:
    """The first layout that fits a table with these columns, or None."""
    known = PREFERENCES if _COMPARING & set(columns) else (*PREFERENCES, CAPTIONS, PROMPT_LIST)
    return next((layout for layout in known if layout.fits(columns)), None)


def why_no_layout(columns: Collection[str]) -> str:
    """What the nearest layout misses, the columns present, and the name that was perhaps meant."""

    def present(layout: Layout) -> float:
        return sum(any(name in columns for name in names) for names in layout.needs) / len(layout.needs)

    nearest = max((*PREFERENCES, CAPTIONS), key=present)
    lacks = next((names for names in nearest.needs if not any(name in columns for name in names)), nearest.needs[0])
    has = ", ".join(map(repr, columns)) or "none"
    for name in lacks:
        near = difflib.get_close_matches(name, list(columns), n=1, cutoff=0.6)
        if near:
            return (
                f"column {name!r} is missing; it has {has}; did you mean {near[0]!r}? rename it to {name!r} "
                f"(nearest layout: {nearest.name})"
            )
    others = f" (or {', '.join(map(repr, lacks[1:]))})" if lacks[1:] else ""
    return f"column {lacks[0]!r}{others} is missing; it has {has} (nearest layout: {nearest.name})"
