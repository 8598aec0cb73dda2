"""A row of a table, or a sample of an archive, as its file has it: values by name, and where the pictures are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.data.layouts import ParquetItem, Picture, find_picture, prompt_fault
from diffusion_align.data.raw_rows import ParquetCell
from diffusion_align.data.rows import Row, RowError
from diffusion_align.data.tar_rows import TarMember

PROMPTS = ("prompt", "caption", "text", "original_prompt")


@dataclass(frozen=True, slots=True)
class Record:
    """A row as its file has it: small values by name, and where its pictures are.

    Attributes:
        cells: names of columns whose pictures stay in the parquet file; others name files, or hold archive members.
        root: the folder that every file lies in; `under` are folders of it where they are looked for, in this order.
    """

    id: str
    values: Mapping[str, Any]
    file: Path
    row: int
    cells: frozenset[str] = frozenset()
    root: Path = Path()
    under: tuple[str, ...] = ("",)

    def picture(self, column: str) -> Picture:
        """The picture of a column; RowError when there is none."""
        if column in self.cells:
            return ParquetCell(self.file, self.row, column)
        return self._find(self.values.get(column), column)

    def pictures(self, column: str, count: int) -> list[Picture]:
        """The `count` pictures that a column lists, or as many as it has; RowError when it is no list."""
        if column in self.cells:
            return [ParquetItem(self.file, self.row, column, item, count) for item in range(count)]
        names = self.values.get(column)
        if not isinstance(names, list):
            keys = ", ".join(map(repr, list(self.values)[:8]))
            raise RowError(f"is no ranking: a list {column!r} is missing; it has {keys}")
        return [self._find(name, f"{column}[{place}]") for place, name in enumerate(names)]

    def _find(self, name: Any, what: str) -> Picture:
        if isinstance(name, TarMember):
            return name
        found = [find_picture(self.root, f"{folder}/{name}" if folder else name, what) for folder in self.under]
        path = next((path for path in found if isinstance(path, Path)), None)
        if path is None:
            raise RowError(str(found[0]))
        return path

    def row_of(
        self,
        pictures: Sequence[Picture],
        relevance: Sequence[float] = (),
        scores: tuple[tuple[float, ...], ...] = (),
        weight: float = 1.0,
        models: Sequence[Any] = (),
    ) -> Row:
        """The Row with this record's prompt and id; RowError when the prompt is none."""
        prompt = next((self.values[name] for name in PROMPTS if name in self.values), None)
        fault = prompt_fault(prompt)
        if fault is not None or not isinstance(prompt, str):
            raise RowError(str(fault))
        source = self.values.get("source")
        named = tuple(_text(model) for model in models) if any(isinstance(model, str) for model in models) else ()
        return Row(self.id, prompt, tuple(pictures), tuple(relevance), scores, weight, _text(source), named)


def _text(value: Any) -> str:
    """Text that can be written down again; anything else is none."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
