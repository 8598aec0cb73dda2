"""A row as its file has it: small values by name, and its pictures, which stay in their files until they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.archives.zip_members import ZipFolder, ZipMember
from diffusion_align.data.rows.find_picture import find_picture
from diffusion_align.data.rows.tables.cells import ParquetCell, ParquetItem

PROMPT_COLUMNS = ("prompt", "caption", "text", "original_prompt")


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without the row's id."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside a tar archive."""

    file: Path
    offset: int
    size: int
    name: str = field(default="", compare=False)

    def read(self) -> bytes:
        """Its bytes; DataError if the archive has become shorter."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise DataError(f"{self.file.name}: is cut off at byte {self.offset + len(data):,}; fetch the file again")
        return data


StoredPicture = bytes | Path | ParquetCell | ParquetItem | TarMember | ZipMember


def read_bytes(picture: StoredPicture) -> bytes:
    """A picture's bytes, wherever they are; DataError or OSError if they cannot be read."""
    if isinstance(picture, bytes):
        return picture
    return picture.read_bytes() if isinstance(picture, Path) else picture.read()


def picture_name(picture: StoredPicture) -> str:
    """The column, file or member that holds a picture; empty for bytes in memory."""
    if isinstance(picture, bytes):
        return ""
    if isinstance(picture, ParquetItem):
        return f"{picture.column}[{picture.item}]"
    if isinstance(picture, ParquetCell):
        return picture.column
    return picture.name


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row of a table, or a sample of an archive, before its layout is applied.

    Attributes:
        cells: columns whose pictures stay in the parquet file, by our names, with theirs; others name files, or hold
            archive members.
        root: the folder that every file lies in; `under` are folders of it in which to look, in this order.
    """

    id: str
    values: Mapping[str, Any]
    file: Path | ZipMember
    row: int
    cells: Mapping[str, str] = field(default_factory=dict)
    root: Path | ZipFolder = Path()
    under: tuple[str, ...] = ("",)

    def prompt(self) -> str:
        """The prompt; RowError if there is none."""
        prompt = chat_text(next((self.values[name] for name in PROMPT_COLUMNS if name in self.values), None))
        fault = prompt_fault(prompt)
        if fault is not None or not isinstance(prompt, str):
            raise RowError(str(fault))
        return prompt

    def picture(self, column: str) -> StoredPicture:
        """The picture of a column; RowError if there is none."""
        if column in self.cells and isinstance(self.file, Path):
            return ParquetCell(self.file, self.row, self.cells[column])
        return self._find(self.values.get(column), column)

    def pictures(self, column: str, count: int) -> list[StoredPicture]:
        """The `count` pictures that a parquet column lists, or all that another lists; RowError if it is no list."""
        if column in self.cells and isinstance(self.file, Path):
            return [ParquetItem(self.file, self.row, self.cells[column], item, count) for item in range(count)]
        names = self.values.get(column)
        if not isinstance(names, list):
            keys = ", ".join(map(repr, list(self.values)[:8]))
            raise RowError(f"is no ranking: a list {column!r} is missing; it has {keys}")
        return [self._find(name, f"{column}[{place}]") for place, name in enumerate(names)]

    def _find(self, name: Any, what: str) -> StoredPicture:
        if isinstance(name, TarMember | ZipMember):
            return name
        found = [find_picture(self.root, f"{folder}/{name}" if folder else name, what) for folder in self.under]
        path = next((path for path in found if not isinstance(path, str)), None)
        if path is None:
            raise RowError(str(found[0]))
        return path


def prompt_fault(prompt: Any) -> str | None:
    """Why this cannot be a prompt; None if it can."""
    if not isinstance(prompt, str):
        return f"the prompt is {type(prompt).__name__}, not text"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt holds a lone surrogate, which is no text in UTF-8"
    return None


def chat_text(prompt: Any) -> Any:
    """The text of a chat with one message of a user, as trl has it; other prompts as they are.

    Raises:
        RowError: a chat with other messages than that one and those of the system, or with several texts.
    """
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) and "role" in m for m in prompt):
        return prompt
    users = [message.get("content") for message in prompt if message["role"] == "user"]
    others = [message["role"] for message in prompt if message["role"] not in ("user", "system")]
    if len(users) != 1 or others:
        raise RowError(
            f"the prompt is a chat of {len(prompt)} messages, of which one text cannot be told: give a text as prompt"
        )
    content = users[0]
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) != 1:
            raise RowError(f"the prompt is a chat message of {len(texts)} texts: give one text as prompt")
        return texts[0]
    return content
