"""Folders that `datasets.save_to_disk` writes: arrow files, of which state.json names those that belong to the set."""

import json
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import DataError

_STATE, _DICT = "state.json", "dataset_dict.json"


def saved_files(folder: Path, split: str) -> tuple[Path, ...] | None:
    """The arrow files of a saved data set, of one split if it has several; None if the folder is no such set.

    Raises:
        DataError: no such split, a file that is missing, or a selection of rows that was not written out.
    """
    if (folder / _DICT).is_file():
        splits = _read(folder / _DICT).get("splits")
        named = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if split not in named:
            raise DataError(f"{folder}: holds no split {split!r}, only {', '.join(named) or 'none'}")
        if Path(split).name != split:
            raise DataError(f"{folder}: split {split!r} leads outside")
        folder = folder / split
    state = folder / _STATE
    if not state.is_file():
        return None
    facts = _read(state)
    if "_data_files" not in facts:
        return None
    if facts.get("_indices_data_files"):
        raise DataError(f"{folder}: keeps a selection of rows apart; call flatten_indices() and save_to_disk again")
    listed = facts["_data_files"]
    names = [one.get("filename") if isinstance(one, dict) else None for one in listed if listed]
    files = [folder / name for name in names if isinstance(name, str) and Path(name).name == name]
    if len(files) != len(names) or not files:
        raise DataError(f"{state}: does not name its files; save the data set again")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: is missing, and {state.name} names it; fetch or save the data set again")
    return tuple(files)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({str(error)[:200]}); fetch the data again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: is not an object; fetch the data again")
    return found
