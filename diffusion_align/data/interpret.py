"""Who was preferred: from a record to a Row, one function for each way in which people say it."""

import sys
from collections.abc import Sequence
from typing import Any

from diffusion_align.data.layouts import Picture
from diffusion_align.data.records import Record
from diffusion_align.data.rows import Row, RowError, shares_won

VALUES = ("relevance", "scores", "ranks")
_MOST = sys.float_info.max


def _number(record: Record, name: str, low: float, high: float) -> float:
    """A finite number, also one written as text, as in archives and CSV."""
    value = record.values.get(name)
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        raise RowError(f"{name!r} is {value!r:.40}, not a number from {low:g} to {high:g}")
    return number


def _label(value: Any) -> Any:
    """A label as a number where it is one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def pick_a_pic(record: Record) -> Row:
    """jpg_0, jpg_1 with label_0, label_1: 1 and 0 for the winner and the loser, 0.5 a tie."""
    labels = _label(record.values.get("label_0")), _label(record.values.get("label_1"))
    models = record.values.get("model_0"), record.values.get("model_1")
    if labels[0] == 0.5:
        labels = (0.5, 0.5)
    elif labels not in ((1, 0), (0, 1)):
        raise RowError(f"labels {labels[0]!r:.40}, {labels[1]!r:.40} say neither who won (1, 0 or 0, 1) nor tie (0.5)")
    return _pair(record, [record.picture("jpg_0"), record.picture("jpg_1")], labels, 1.0, models)


def _pair(
    record: Record, pictures: Sequence[Picture], votes: Sequence[float], weight: float, models: Sequence[Any] = ()
) -> Row:
    """A row of two pictures, the winner first; two equal votes are a tie."""
    if votes[0] == votes[1]:
        return record.row_of(pictures, (0.5, 0.5), weight=weight, models=models)
    order = 1 if votes[0] > votes[1] else -1
    return record.row_of(pictures[::order], (1.0, 0.0), weight=weight, models=models[::order])


def chosen_rejected(record: Record) -> Row:
    """chosen and rejected, or chosen_file_name and rejected_file_name; `weight` if there is one."""
    pictures = []
    for side in ("chosen", "rejected"):
        named = [column for column in (f"{side}_file_name", side) if column in record.values or column in record.cells]
        if not named:
            keys = ", ".join(map(repr, list(record.values)[:8]))
            raise RowError(f"is no pair: {side!r} (or '{side}_file_name') is missing; it has {keys}")
        pictures.append(record.picture(named[0]))
    return record.row_of(pictures, (1.0, 0.0), weight=_weight(record))


def _weight(record: Record) -> float:
    return 1.0 if record.values.get("weight") in (None, "") else _number(record, "weight", 0, _MOST)


def file_path_preference(record: Record) -> Row:
    """HPDv2's train.json: file_path of two, human_preference 1 for the preferred and 0 for the other."""
    said = _checked(record, "human_preference", 0, 1)
    pictures = _counted(record, "file_path", "human_preference", said)
    if len(pictures) != 2:
        raise RowError(f"is no pair: it compares {len(pictures)} pictures")
    return _pair(record, pictures, said, 1.0)


def image_path_rank(record: Record) -> Row:
    """HPDv2's test.json and ImageRewardDB's images by prompt: image_path [K], rank [K], the lowest the best."""
    return _ranked(record, "image_path", "rank")


def generations_ranking(record: Record) -> Row:
    """ImageReward's JSON: generations [K], ranking [K], the lowest the best."""
    return _ranked(record, "generations", "ranking")


def _ranked(record: Record, pictures: str, ranks: str) -> Row:
    said = _checked(record, ranks, -_MOST, _MOST)
    return record.row_of(_counted(record, pictures, ranks, said), shares_won([[-rank for rank in said]]))


def path_1_is_better(record: Record) -> Row:
    """HPDv3: path1 is always the better picture; confidence in [0, 1] is the weight, 1 where it is null."""
    known = record.values.get("confidence") is not None
    weight = _number(record, "confidence", 0, 1) if known else 1.0
    models = record.values.get("model1"), record.values.get("model2")
    return record.row_of([record.picture("path1"), record.picture("path2")], (1.0, 0.0), weight=weight, models=models)


def weighted_votes(record: Record) -> Row:
    """Rapidata: image1, image2 and the weight of the votes for each; |v1 - v2| / (v1 + v2) is the weight."""
    votes = [_number(record, f"weighted_results_image{side}_preference", 0, _MOST) for side in (1, 2)]
    if not 0 < sum(votes) <= _MOST:
        raise RowError(f"the votes {votes[0]:g} and {votes[1]:g} say nothing")
    models = record.values.get("model1"), record.values.get("model2")
    weight = abs(votes[0] - votes[1]) / sum(votes)
    return _pair(record, [record.picture("image1"), record.picture("image2")], votes, weight, models)


def listed_pictures(record: Record) -> Row:
    """images [K] with relevance [K], or scores [K] or [M][K], or ranks [K]; and weight, source, models if present."""
    lists: dict[str, list[Any]] = {}
    for name in VALUES:
        values = record.values.get(name)
        if values is not None and values != []:
            nested = name == "scores" and isinstance(values, list) and isinstance(values[0], list)
            lists[name] = values if nested else [values]
    # How many pictures a parquet cell lists is not known without reading them: they are counted when they are read.
    count = next((len(one[0]) for one in lists.values() if isinstance(one[0], list)), 0)
    pictures = record.pictures("images", count)
    if not lists:
        raise RowError(f"says nothing of its pictures: give one of {', '.join(VALUES)}")
    for name, values in lists.items():
        for one in values:
            _require_numbers(name, one, len(pictures), *((0, 1) if name == "relevance" else (-_MOST, _MOST)))
    scores = tuple(tuple(map(float, one)) for one in lists.get("scores", []))
    if "relevance" in lists:
        relevance = tuple(map(float, lists["relevance"][0]))
    else:
        relevance = shares_won(scores or [[-float(rank) for rank in lists["ranks"][0]]])
    models = record.values.get("models")
    known = models if isinstance(models, list) and len(models) == len(pictures) else ()
    return record.row_of(pictures, relevance, scores, _weight(record), known)


def caption(record: Record) -> Row:
    """A picture (file_name, or an archive's) and its text."""
    return record.row_of([record.picture("file_name")])


def prompt_only(record: Record) -> Row:
    """A prompt."""
    return record.row_of([])


def _checked(record: Record, name: str, low: float, high: float) -> list[float]:
    values = record.values.get(name)
    _require_numbers(name, values, len(values) if isinstance(values, list) else 0, low, high)
    return [float(value) for value in values or []]


def _counted(record: Record, column: str, numbers: str, said: Sequence[float]) -> list[Picture]:
    pictures = record.pictures(column, len(said))
    if len(pictures) != len(said):
        raise RowError(f"{numbers!r} has {len(said)} numbers for {len(pictures)} pictures")
    return pictures


def _require_numbers(name: str, values: Any, size: int, low: float, high: float) -> None:
    """Raise RowError unless these values are one number for each of `size` pictures."""
    if not isinstance(values, list):
        raise RowError(f"{name!r} is {type(values).__name__}, not a list of numbers")
    if size < 2:
        raise RowError(f"ranks {size} picture{'s' * (size != 1)}: a ranking needs at least 2")
    if len(values) != size:
        raise RowError(f"{name!r} has {len(values)} numbers for {size} pictures")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            bounds = f" from {low} to {high}" if high == 1 else ""
            raise RowError(f"{name!r} holds {value!r:.40}, not a finite number{bounds}")
