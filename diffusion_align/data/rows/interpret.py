"""From a row as its file has it to a row in one form: a function for each way in which people say what they prefer."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.pairs_and_rankings import DataRow
from diffusion_align.data.rows.raw_rows import RawRow, RowError, StoredPicture

VALUE_COLUMNS = ("relevance", "scores", "ranks")
_MOST = sys.float_info.max


def pick_a_pic(raw: RawRow) -> DataRow:
    """jpg_0, jpg_1 with label_0, label_1: 1 and 0 for the winner and the loser, 0.5 a tie."""
    labels = _label(raw.values.get("label_0")), _label(raw.values.get("label_1"))
    models = raw.values.get("model_0"), raw.values.get("model_1")
    if labels[0] == 0.5:
        labels = (0.5, 0.5)
    elif labels not in ((1, 0), (0, 1)):
        raise RowError(f"labels {labels[0]!r:.40}, {labels[1]!r:.40} say neither who won (1, 0 or 0, 1) nor tie (0.5)")
    return _two_pictures(raw, [raw.picture("jpg_0"), raw.picture("jpg_1")], labels, 1.0, models)


def chosen_rejected(raw: RawRow) -> DataRow:
    """chosen and rejected, or chosen_file_name and rejected_file_name; `weight` if there is one."""
    pictures = []
    for side in ("chosen", "rejected"):
        named = [column for column in (f"{side}_file_name", side) if column in raw.values or column in raw.cells]
        if not named:
            keys = ", ".join(map(repr, list(raw.values)[:8]))
            raise RowError(f"is no pair: {side!r} (or '{side}_file_name') is missing; it has {keys}")
        pictures.append(raw.picture(named[0]))
    return _row(raw, pictures, (1.0, 0.0), weight=_weight(raw))


def file_path_preference(raw: RawRow) -> DataRow:
    """HPDv2's train.json: file_path of two, human_preference 1 for the preferred and 0 for the other."""
    votes = _numbers(raw, "human_preference", 0, 1)
    pictures = _counted_pictures(raw, "file_path", "human_preference", votes)
    if len(pictures) != 2:
        raise RowError(f"is no pair: it compares {len(pictures)} pictures")
    return _two_pictures(raw, pictures, votes, 1.0)


def ranked(raw: RawRow, pictures: str, ranks: str) -> DataRow:
    """HPDv2's test.json, ImageRewardDB, ImageReward's JSON: columns of K pictures and K ranks, the lowest the best."""
    numbers = _numbers(raw, ranks, -_MOST, _MOST)
    return _row(raw, _counted_pictures(raw, pictures, ranks, numbers), fractions_won([[-rank for rank in numbers]]))


def path_1_is_better(raw: RawRow) -> DataRow:
    """HPDv3: path1 is always the better picture; confidence in [0, 1] is the weight, 1 where it is null."""
    known = raw.values.get("confidence") is not None
    weight = _number(raw, "confidence", 0, 1) if known else 1.0
    models = raw.values.get("model1"), raw.values.get("model2")
    return _row(raw, [raw.picture("path1"), raw.picture("path2")], (1.0, 0.0), weight=weight, models=models)


def weighted_votes(raw: RawRow) -> DataRow:
    """Rapidata: image1, image2 and the weight of the votes for each; |v1 - v2| / (v1 + v2) is the weight."""
    votes = [_number(raw, f"weighted_results_image{side}_preference", 0, _MOST) for side in (1, 2)]
    if not 0 < sum(votes) <= _MOST:
        raise RowError(f"the votes {votes[0]:g} and {votes[1]:g} say nothing")
    models = raw.values.get("model1"), raw.values.get("model2")
    weight = abs(votes[0] - votes[1]) / sum(votes)
    return _two_pictures(raw, [raw.picture("image1"), raw.picture("image2")], votes, weight, models)


def listed_pictures(raw: RawRow) -> DataRow:
    """images [K] with relevance [K], or scores [K] or [M][K], or ranks [K]; and weight, source, models if present."""
    lists: dict[str, list[Any]] = {}
    for name in VALUE_COLUMNS:
        values = raw.values.get(name)
        if values is not None and values != []:
            nested = name == "scores" and isinstance(values, list) and isinstance(values[0], list)
            lists[name] = values if nested else [values]
    # A parquet cell does not tell how many pictures it lists until it is read, so they are counted when it is.
    count = next((len(one[0]) for one in lists.values() if isinstance(one[0], list)), 0)
    pictures = raw.pictures("images", count)
    if not lists:
        raise RowError(f"says nothing of its pictures: give one of {', '.join(VALUE_COLUMNS)}")
    for name, values in lists.items():
        for one in values:
            _require_numbers(name, one, len(pictures), *((0, 1) if name == "relevance" else (-_MOST, _MOST)))
    scores = tuple(tuple(map(float, one)) for one in lists.get("scores", []))
    if "relevance" in lists:
        relevance = tuple(map(float, lists["relevance"][0]))
    else:
        relevance = fractions_won(scores or [[-float(rank) for rank in lists["ranks"][0]]])
    models = raw.values.get("models")
    known = models if isinstance(models, list) and len(models) == len(pictures) else ()
    return _row(raw, pictures, relevance, scores, _weight(raw), known)


def caption(raw: RawRow) -> DataRow:
    """A picture (file_name, or an archive's) and its text."""
    return _row(raw, [raw.picture("file_name")])


def prompt_only(raw: RawRow) -> DataRow:
    """A prompt."""
    return _row(raw, [])


def grouped_by_prompt(found: Iterable[BadRow | RawRow]) -> Iterator[BadRow | RawRow]:
    """ImageRewardDB's rows, a picture each, as one row for each prompt_id, under the id of its first row.

    The rows of a prompt may stand anywhere, so all small values of this layout are held in memory, but no pictures.
    """
    groups: dict[str, list[RawRow]] = {}
    for raw in found:
        if isinstance(raw, BadRow):
            yield raw
        elif raw.values.get("prompt_id") is None:
            yield BadRow(raw.id, "'prompt_id' is missing")
        else:
            groups.setdefault(str(raw.values["prompt_id"]), []).append(raw)
    for group in groups.values():
        lists = {name: [raw.values.get(name) for raw in group] for name in ("image_path", "rank")}
        yield replace(group[0], values={**group[0].values, **lists})


def fractions_won(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The fraction of comparisons that each picture wins, scores [M][K] of M rewards -> [K]; nobody wins a tie.

    It is `objectives.win_counts` of one prompt, without torch, so that reading a table does not wait for torch.
    """
    size = len(scores[0])
    wins = [sum(one[i] > other for one in scores for other in one) for i in range(size)]
    return tuple(won / (len(scores) * (size - 1)) for won in wins)


def _row(
    raw: RawRow,
    pictures: Sequence[StoredPicture],
    relevance: Sequence[float] = (),
    scores: tuple[tuple[float, ...], ...] = (),
    weight: float = 1.0,
    models: Sequence[Any] = (),
) -> DataRow:
    named = tuple(_text(model) for model in models) if any(isinstance(model, str) for model in models) else ()
    source = _text(raw.values.get("source"))
    return DataRow(raw.id, raw.prompt(), tuple(pictures), tuple(relevance), scores, weight, source, named)


def _two_pictures(
    raw: RawRow, pictures: Sequence[StoredPicture], votes: Sequence[float], weight: float, models: Sequence[Any] = ()
) -> DataRow:
    """A row of two pictures, the winner first; two equal votes are a tie."""
    if votes[0] == votes[1]:
        return _row(raw, pictures, (0.5, 0.5), weight=weight, models=models)
    order = 1 if votes[0] > votes[1] else -1
    return _row(raw, pictures[::order], (1.0, 0.0), weight=weight, models=models[::order])


def _counted_pictures(raw: RawRow, column: str, numbers: str, values: Sequence[float]) -> list[StoredPicture]:
    pictures = raw.pictures(column, len(values))
    if len(pictures) != len(values):
        raise RowError(f"{numbers!r} has {len(values)} numbers for {len(pictures)} pictures")
    return pictures


def _weight(raw: RawRow) -> float:
    return 1.0 if raw.values.get("weight") in (None, "") else _number(raw, "weight", 0, _MOST)


def _number(raw: RawRow, name: str, low: float, high: float) -> float:
    """A finite number, also one written as text, as in archives and CSV."""
    value = raw.values.get(name)
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        raise RowError(f"{name!r} is {value!r:.40}, not a number from {low:g} to {high:g}")
    return number


def _numbers(raw: RawRow, name: str, low: float, high: float) -> list[float]:
    values = raw.values.get(name)
    _require_numbers(name, values, len(values) if isinstance(values, list) else 0, low, high)
    return [float(value) for value in values or []]


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


def _label(value: Any) -> Any:
    """A label as a number, if it is one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _text(value: Any) -> str:
    """Text that can be encoded again; empty for anything else."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
