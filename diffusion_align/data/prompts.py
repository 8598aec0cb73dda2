"""Lists of prompts in every form that people have them: one reader for training, sampling, scoring and evaluation."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.known_layouts import PROMPT_LIST, layout_of, why_no_layout
from diffusion_align.data.rows.listing import entries_of
from diffusion_align.data.rows.raw_rows import PROMPT_COLUMNS, RowError, chat_text, prompt_fault
from diffusion_align.data.rows.tables.columnar import COLUMNAR, parquet_rows, parquet_schema
from diffusion_align.data.rows.tables.table_rows import columns_of, is_table, prompt_lines, table_rows
from diffusion_align.data.rows.tables.text import kind_of, text_encoding

PROMPT_KEYS = (*PROMPT_COLUMNS, "prompts")
# In any case of letters: PartiPrompts has Category and Challenge, GenEval tag, GenEval 2 skills.
CATEGORY_KEYS = ("category", "categories", "challenge", "tag", "skills", "style")
READABLE_LISTS = (
    "a .txt with one prompt a line, a .json list, .jsonl, .csv, .tsv or .parquet with a prompt each, "
    "or a folder of .txt with one each"
)
_KNOWN = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_PLAIN = ("", ".text", ".list", ".lst", ".prompt", ".prompts")  # suffixes that say nothing, so the content decides
_LIST_KEYS = ("prompts", "prompt", "captions", "texts", "data", "items", "rows", "samples")
_TEXTS = ("prompt", "caption", "text")
_LARGEST = 64 << 20  # in bytes; a larger file is left to the readers that stream


@dataclass(frozen=True)
class Prompt:
    """A prompt, the categories it is in, as "key: value", and the other columns of its list."""

    text: str
    categories: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def read_list(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a list, in order, with its other columns. Blank ones are left out.

    Raises:
        DataError: no such path, not a list of prompts, a row without one, or none at all.
    """
    path, found = Path(path), []
    with _in_utf_8(path) as file:
        for where, row in _rows(file):
            if isinstance(row, BadRow):
                raise DataError(f"{path}: {row}; give {READABLE_LISTS}")
            prompt = prompt_of(row)
            if isinstance(prompt, str):
                raise DataError(f"{path}: {where} {prompt}; give {READABLE_LISTS}")
            found += [prompt] if prompt.text else []
    if not found:
        raise DataError(f"{path}: holds no prompt; give {READABLE_LISTS}")
    return found


def prompt_of(row: Mapping[str, Any]) -> Prompt | str:
    """The prompt of a row, or why there is none."""
    named = {key.lower(): key for key in row if isinstance(key, str)}
    key = next((named[name] for name in PROMPT_KEYS if name in named), None)
    if key is None:
        return f"has no {', '.join(PROMPT_KEYS)}; it has {', '.join(map(repr, list(named)[:8])) or 'nothing'}"
    try:
        text = chat_text(row[key])
    except RowError as error:
        return str(error)
    fault = prompt_fault(text)
    if fault is not None:
        return fault
    # A damaged cell is its error here, and what is too much in a CSV's row stands under None.
    extra = {k: v for k, v in row.items() if isinstance(k, str) and k != key and not isinstance(v, Exception)}
    return Prompt(text.strip(), tuple(_categories({name: row[named[name]] for name in named})), extra)


def _categories(named: Mapping[str, Any]) -> Iterator[str]:
    for key in CATEGORY_KEYS:
        value = named.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one.strip():
                yield f"{key}: {one.strip()}"


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Each row's id and its values by name."""
    if path.is_dir():
        yield from _files(path)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder; give {READABLE_LISTS}")
    elif path.suffix.lower() == ".tsv":
        yield from _tabs(path)
    elif path.suffix.lower() in COLUMNAR:
        yield from _parquet(path)
    elif kind_of(path) == ".txt" or is_table(path):
        if kind_of(path) != ".txt":
            _require_prompts(path, columns_of(path))
        for raw in prompt_lines(path) if kind_of(path) == ".txt" else table_rows(path, PROMPT_LIST):
            yield ("", raw) if isinstance(raw, BadRow) else (raw.id, raw.values)
    else:
        raise DataError(f"{path}: is not a list of prompts known here; give {READABLE_LISTS}")


def _require_prompts(path: Path, columns: list[str]) -> None:
    """Refuse preferences and captions: they hold prompts too, but are most likely the wrong file."""
    known = layout_of(columns)
    if known is not None and known.holds != "prompts":
        raise DataError(f"{path}: {known.name}, not prompts; give {READABLE_LISTS}")
    if known is None and set(PROMPT_COLUMNS) & set(columns):
        raise DataError(f"{path}: {why_no_layout(columns)}")
    if not columns:
        raise DataError(f"{path}: holds no rows; give {READABLE_LISTS}")


def _files(folder: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """A prompt in each file, whose name is its item_id, as in DPG-Bench."""
    files = [path for path in entries_of(folder) if path.suffix.lower() == ".txt" and path.is_file()]
    if not files:
        raise DataError(f"{folder}: holds no .txt; give {READABLE_LISTS}")
    for file in files:
        try:
            yield file.name, {"prompt": file.read_text(encoding="utf-8-sig"), "item_id": file.stem}
        except UnicodeDecodeError:
            yield file.name, BadRow(file.name, "is not text in UTF-8")


def _tabs(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """PartiPrompts' form: names in the first line, tabs between, quotation marks mean themselves."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8; give {READABLE_LISTS}") from error
    for number, row in enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        yield f"{path.name}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The columns of text; lists and pictures beside them are not read."""
    schema = parquet_schema(path)
    _require_prompts(path, schema.names)
    columns = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    for number, row in enumerate(parquet_rows(path, columns)):
        yield f"{path.name}:{number}", row


@contextmanager
def _in_utf_8(path: Path) -> Iterator[Path]:
    """The file itself, or a copy in UTF-8 whose suffix fits its content. Folders and parquet are left alone.

    Raises:
        DataError: the text is in another encoding, with the likely one and the cure; or it is an object without a list.
    """
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in _KNOWN + _PLAIN or path.stat().st_size > _LARGEST:
        yield path
        return
    content = path.read_bytes()
    encoding = text_encoding(content, "utf-8-sig")
    text = _decoded(path, content, encoding)
    kind = suffix if suffix in _KNOWN else _kind(text)
    if kind in (".json", ".jsonl") and text.lstrip().startswith("{"):
        kind, text = _object(path, kind, text)
    elif encoding == "utf-8-sig" and kind == path.suffix:
        yield path
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / f"{path.stem}{kind}"
        copy.write_text(text, encoding="utf-8", newline="")
        try:
            yield copy
        except DataError as error:
            raise DataError(str(error).replace(os.fspath(copy), os.fspath(path))) from error


def _decoded(path: Path, content: bytes, encoding: str) -> str:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\x00" in content:
            raise DataError(f"{path}: is not text") from error
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise DataError(
            f"{path}:{line} is not text in UTF-8 (byte 0x{byte:02x}), likely in Windows-1252: save it as UTF-8, or "
            f"`iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8{path.suffix or '.txt'}`"
        ) from error
    return text.removeprefix("\ufeff")


def _kind(text: str) -> str:
    start = text.lstrip()[:1]
    if start in ("[", "{"):
        return ".json"
    head = text.lstrip().partition("\n")[0].lower().split("\t")
    return ".tsv" if len(head) > 1 and {*head} & {*_TEXTS, "prompts"} else ".txt"


def _object(path: Path, kind: str, text: str) -> tuple[str, str]:
    """(suffix, text) of a file that begins with an object: JSON lines, or one object that holds the list."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ".jsonl", text  # its reader names the line that is damaged
    return (kind, text) if kind == ".jsonl" and _is_row(found) else (".json", json.dumps(_items(path, found)))


def _is_row(found: Any) -> bool:
    return isinstance(found, dict) and any(isinstance(found.get(key), str) for key in found if key.lower() in _TEXTS)


def _items(path: Path, found: dict[str, Any]) -> list[Any]:
    """The list in an object: under one of the usual names, the values of a table of texts or rows, or the one row."""
    for name in _LIST_KEYS:
        for key, value in found.items():
            if key.lower() == name and isinstance(value, list):
                return value
    if _is_row(found):
        return [found]
    values = list(found.values())
    if values and all(isinstance(value, str) for value in values):
        return [{"prompt": value, "item_id": key} for key, value in found.items()]
    if values and all(_is_row(value) for value in values):
        return [{"item_id": key, **value} for key, value in found.items()]
    raise DataError(
        f"{path}: is an object with {', '.join(map(repr, list(found)[:8])) or 'nothing'}, not a list of prompts; "
        'give {"prompts": [...]}, or a .txt with one a line'
    )
