"""Lists of prompts in every form that people have them: one reader for training, sampling, scoring and evaluation."""

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffusion_align.data import raw_rows
from diffusion_align.data.folders import prompt_lines
from diffusion_align.data.known_layouts import PROMPT_LIST
from diffusion_align.data.layouts import prompt_fault
from diffusion_align.data.match import match, missing
from diffusion_align.data.prompt_files import as_known
from diffusion_align.data.raw_rows import BadRow, DataError
from diffusion_align.data.records import PROMPTS
from diffusion_align.data.table_rows import SUFFIXES, columns_of, records

PROMPT_KEYS = (*PROMPTS, "prompts")
CATEGORY_KEYS = ("category", "categories", "challenge", "tag", "skills", "style")
"""What lists call them, whatever the case: PartiPrompts Category and Challenge, GenEval tag, GenEval 2 skills."""
LAYOUTS = (
    "a .txt with one prompt a line, a .json list, .jsonl, .csv, .tsv or .parquet with a prompt each, "
    "or a folder of .txt with one each"
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, the categories it is in, as "key: value", and whatever else its list says of it."""

    text: str
    categories: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a list, in order; what else it says of them is passed over. Raises as `read_list` does."""
    return [prompt.text for prompt in read_list(path)]


def read_list(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a list, in order, with what it says of each. Blank ones are passed over.

    Raises:
        DataError: no such path, not a list of prompts, a row without one, or none at all.
    """
    path = Path(path)
    with as_known(path) as file:
        return _read(path, file)


def _read(path: Path, file: Path) -> list[Prompt]:
    """The prompts of `file`, which is `path` or stands for it."""
    found = []
    for where, row in _rows(file):
        if isinstance(row, BadRow):
            raise DataError(f"{path}: {row.row} {row.reason}; give {LAYOUTS}")
        prompt = prompt_of(row)
        if isinstance(prompt, str):
            raise DataError(f"{path}: {where} {prompt}; give {LAYOUTS}")
        found += [prompt] if prompt.text else []
    if not found:
        raise DataError(f"{path}: holds no prompt; give {LAYOUTS}")
    return found


def prompts_once(path: Path, seen: set[str]) -> Iterator[Prompt]:
    """The prompts of a table of preferences, each once and in the order of its first row; rows without one are passed.

    `seen` holds those of files read before, and is added to.
    """
    if path.suffix == ".parquet":
        names = raw_rows.schema_of(path).names
        columns = [name for name in names if name.lower() in PROMPT_KEYS][:1]
        rows: Iterator[Mapping[str, Any]] = iter(raw_rows.iter_rows(path, columns)) if columns else iter(())
    else:
        rows = (record.values for record in records(path, PROMPT_LIST) if not isinstance(record, BadRow))
    for row in rows:
        prompt = prompt_of(row)
        if isinstance(prompt, Prompt) and prompt.text and prompt.text not in seen:
            seen.add(prompt.text)
            yield Prompt(prompt.text)


def prompt_of(row: Mapping[str, Any]) -> Prompt | str:
    """The prompt of a row, or why there is none."""
    named = {key.lower(): key for key in row if isinstance(key, str)}
    key = next((named[name] for name in PROMPT_KEYS if name in named), None)
    if key is None:
        return f"has no {', '.join(PROMPT_KEYS)}; it has {', '.join(map(repr, list(named)[:8])) or 'nothing'}"
    fault = prompt_fault(row[key])
    if fault is not None:
        return fault
    # A cell that cannot be read is its error here; a CSV's row that is too long has its rest under None.
    extra = {k: v for k, v in row.items() if isinstance(k, str) and k != key and not isinstance(v, Exception)}
    return Prompt(row[key].strip(), tuple(_categories({name: row[named[name]] for name in named})), extra)


def _categories(named: Mapping[str, Any]) -> Iterator[str]:
    for key in CATEGORY_KEYS:
        value = named.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one.strip():
                yield f"{key}: {one.strip()}"


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Where each row stands, and its values by name."""
    if path.is_dir():
        yield from _files(path)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder; give {LAYOUTS}")
    elif path.suffix == ".tsv":
        yield from _tabs(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".txt" or path.suffix in SUFFIXES:
        if path.suffix != ".txt":
            _require_prompts(path, columns_of(path))
        for record in prompt_lines(path) if path.suffix == ".txt" else records(path, PROMPT_LIST):
            yield ("", record) if isinstance(record, BadRow) else (record.id, record.values)
    else:
        raise DataError(f"{path}: is not a list of prompts known here; give {LAYOUTS}")


def _require_prompts(path: Path, columns: list[str]) -> None:
    """Preferences and captions hold prompts too, but whoever names them here has most likely taken another file."""
    known = match(columns)
    if known is not None and known.holds != "prompts":
        raise DataError(f"{path}: {known.name}, not prompts; give {LAYOUTS}")
    if known is None and set(PROMPTS) & set(columns):
        raise DataError(f"{path}: {missing(columns)}")
    if not columns:
        raise DataError(f"{path}: holds no rows; give {LAYOUTS}")


def _files(folder: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """A prompt a file, named by it, as DPG-Bench has them."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder}: holds no .txt; give {LAYOUTS}")
    for file in files:
        try:
            yield file.name, {"prompt": file.read_text(encoding="utf-8-sig"), "item_id": file.stem}
        except UnicodeDecodeError:
            yield file.name, BadRow(file.name, "is not text in UTF-8")


def _tabs(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """PartiPrompts' form: names in the first line, tabs between, quotation marks mean themselves."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8; give {LAYOUTS}") from error
    for number, row in enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        yield f"{path.name}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The columns of text; lists and pictures beside them are not read."""
    schema = raw_rows.schema_of(path)
    _require_prompts(path, schema.names)
    columns = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    for number, row in enumerate(raw_rows.iter_rows(path, columns)):
        yield f"{path.name}:{number}", row
