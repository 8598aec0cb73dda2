"""One PNG of picture pairs, base beside tuned, for a README or a slide."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..rewards import to_uint8
from .markup import LIMIT
from .picture_folder import write_atomically

MARGIN, ROW_GAP, GAP, LINE, FONT = 16, 28, 6, 17, 13  # pixels
PAPER, INK, FAINT = (255, 255, 255), (34, 34, 34), (120, 120, 120)
GOOD, BAD = (30, 132, 73), (192, 57, 43)


def enlarge(picture: Tensor, factor: int) -> Image.Image:
    """A picture [3,H,W] in [0, 1] with every pixel repeated, so nothing is invented between pixels."""
    image = Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().numpy())
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines no wider than `width` pixels; a word too long for one is broken, a very long text ends in an ellipsis."""
    words = (text if len(text) <= LIMIT else text[: LIMIT - 1] + "…").replace("\x00", "␀").split()
    lines = [""]
    for word in words:
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, good: bool) -> None:
    """A tick or a cross in a 12-pixel box: drawn, because few fonts have both."""
    strokes = [[(0, 6), (4, 11), (12, 1)]] if good else [[(1, 1), (11, 11)], [(11, 1), (1, 11)]]
    for stroke in strokes:
        draw.line([(x + a, y + b) for a, b in stroke], fill=GOOD if good else BAD, width=2, joint="curve")


def pairs_picture(
    base_images: Tensor,
    tuned_images: Tensor,
    captions: Sequence[str],
    marks: Sequence[tuple[bool | None, bool | None]],
    path: str | Path,
    *,
    columns: int = 3,
    factor: int = 3,
) -> None:
    """Write one contact sheet: each pair enlarged, a tick or cross over each picture, its caption below.

    Args:
        base_images, tuned_images: [N,3,H,W] in [0, 1].
        captions: N captions, wrapped under their pair.
        marks: N pairs (base, tuned): whether the picture is right, None for no mark.
        path: the PNG to write.
        columns: pairs in a row.
        factor: how many times each pixel is repeated.

    Raises:
        ValueError: no pair, or lengths that differ.
    """
    n = len(captions)
    if n == 0 or base_images.shape != tuned_images.shape or len(base_images) != n or len(marks) != n:
        shapes = f"{list(base_images.shape)}, {list(tuned_images.shape)}, {n} and {len(marks)}"
        raise ValueError(f"expected N pictures twice, N captions and N marks, not {shapes}")
    columns = min(columns, n)
    side_w, side_h = base_images.shape[3] * factor, base_images.shape[2] * factor
    pair_w = 2 * side_w + GAP
    font = ImageFont.load_default(FONT)
    texts = [wrap(caption, pair_w, font) for caption in captions]
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    heights = [LINE + GAP + side_h + GAP + LINE * max(len(texts[i]) for i in row) for row in rows]
    size = (MARGIN + columns * (pair_w + MARGIN), 2 * MARGIN + sum(heights) + ROW_GAP * (len(rows) - 1))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            left = MARGIN + place * (pair_w + MARGIN)
            for side, (name, images) in enumerate((("base", base_images), ("tuned", tuned_images))):
                x = left + side * (side_w + GAP)
                draw.text((x, top), name, fill=FAINT, font=font)
                mark = marks[i][side]
                if mark is not None:
                    _mark(draw, x + font.getlength(name) + GAP, top + 2, mark)
                sheet.paste(enlarge(images[i], factor), (x, top + LINE + GAP))
            for number, line in enumerate(texts[i]):
                draw.text((left, top + LINE + 2 * GAP + side_h + number * LINE), line, fill=INK, font=font)
        top += height + ROW_GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(Path(path), buffer.getvalue())
