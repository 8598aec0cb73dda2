"""The judge: decides without a network, attribute by attribute, whether a caption holds for a picture of the embedded
world. It is the held-out metric, similar to GenEval, and the training reward only if a run chooses it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from .caption import BACKGROUNDS, COLOURS, SHAPES, Caption, Thing, parse
from .render import DIAMETERS, PALETTE, PIXELS, render

ATTRIBUTES = ("count", "colour", "shape", "size", "relation", "background", "all")

_NAMES = tuple(PALETTE)
_COLOURS = np.array([PALETTE[name] for name in _NAMES], dtype=np.float32)
_MAX_COLOUR_DISTANCE = 90.0  # in 8-bit RGB; the two nearest colours of the palette are 115 apart
_MIN_AREA = 30  # pixels; the smallest thing that is ever drawn covers about 75
_SIZE_CUT = (DIAMETERS["small"][1] + DIAMETERS["large"][0]) / 2
_MIN_OFFSET = 4.0  # pixels between centres along a relation's axis
_MIN_OVERLAP = 0.6  # intersection over union with the nearest template, below which a blob is no shape
_GRID = 24
_SQUARE = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Seen:
    """One object found in a picture; `shape` is None for a blob that resembles no known shape. Centre in pixels."""

    colour: str
    shape: str | None
    size: str
    x: float
    y: float


def _normalise(mask: np.ndarray) -> np.ndarray:
    """A blob cropped to its bounding box and sampled on a fixed grid, so that shapes of all sizes can be compared."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pick = [(np.arange(_GRID) * n) // _GRID for n in box.shape]
    return box[np.ix_(*pick)]


@functools.cache
def _templates(size: str) -> tuple[np.ndarray, list[str]]:
    """Blobs of every shape in every colour on every background, `[N,_GRID,_GRID]` bool, and the shape of each.

    They come from the judge's own segmentation, because the rims that it keeps depend on both colours.
    """
    masks, shapes = [], []
    for shape, colour, background in itertools.product(SHAPES, COLOURS, BACKGROUNDS):
        picture = render(Caption(Thing(size, colour, shape), background), len(masks))
        blobs, _ = _blobs(np.asarray(picture))
        masks.append(_normalise(blobs[0][1]))
        shapes.append(shape)
    return np.stack(masks), shapes


def _nearest_shape(blob: np.ndarray, size: str) -> str | None:
    """The shape whose template overlaps the blob most (intersection over union), or None if all overlap too little."""
    masks, shapes = _templates(size)
    grid = _normalise(blob)
    overlap = (masks & grid).sum((1, 2)) / (masks | grid).sum((1, 2))
    best = int(overlap.argmax())
    return shapes[best] if overlap[best] >= _MIN_OVERLAP else None


def _nearest_colour(pixels: np.ndarray) -> np.ndarray:
    """Index into the palette of each pixel `[..., 3]`, or -1 if no colour of the palette is near."""
    distance = np.linalg.norm(pixels[..., None, :].astype(np.float32) - _COLOURS, axis=-1)
    return np.where(distance.min(-1) <= _MAX_COLOUR_DISTANCE, distance.argmin(-1), -1)


def _blobs(picture: np.ndarray) -> tuple[list[tuple[str, np.ndarray]], str | None]:
    """Connected regions of an object colour in an `[H,W,3]` uint8 picture, and the colour of its border."""
    index = _nearest_colour(picture)
    border = np.concatenate([index[0], index[-1], index[:, 0], index[:, -1]])
    votes = [(border == _NAMES.index(name)).sum() for name in BACKGROUNDS]
    background = BACKGROUNDS[int(np.argmax(votes))] if max(votes) > border.size / 2 else None
    blobs = []
    for colour in COLOURS:
        # An opening with a 3x3 square removes the one- or two-pixel rims that smooth edges leave in a third colour.
        mask = index == _NAMES.index(colour)
        labels = np.zeros(mask.shape, dtype=np.int32)
        ndimage.label(ndimage.binary_opening(mask, structure=_SQUARE), output=labels)
        for k in range(1, labels.max() + 1):
            # The opening also removes thin arms; a dilation within the colour restores them.
            blob = ndimage.binary_dilation(labels == k, structure=_SQUARE, iterations=3) & mask
            if blob.sum() >= _MIN_AREA:
                blobs.append((colour, blob))
    return blobs, background


def read_picture(picture: np.ndarray) -> tuple[list[Seen], str | None]:
    """Objects and background of a `[64,64,3]` uint8 picture; the background is None if its border has many colours."""
    blobs, background = _blobs(picture)
    seen = []
    for colour, mask in blobs:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        size = "small" if extent < _SIZE_CUT else "large"
        seen.append(Seen(colour, _nearest_shape(mask, size), size, float(columns.mean()), float(rows.mean())))
    return seen, background


def _relation_holds(relation: str, first: Seen, second: Seen) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along >= _MIN_OFFSET and along >= abs(across)


def _verdict(caption: Caption, seen: list[Seen], background: str | None) -> dict[str, float]:
    """Attributes of one picture, 1 or 0, under the assignment of seen objects to wanted things that agrees best."""
    wanted = caption.things
    candidates: list[Seen | None] = [*seen, *[None] * len(wanted)]
    best: tuple[tuple[float, ...], dict[str, float]] | None = None
    # A picture with many blobs is bad anyway; six of them are enough to find the best partial agreement.
    for chosen in itertools.permutations(candidates[: max(6, len(wanted))], len(wanted)):
        pairs = list(zip(wanted, chosen, strict=True))
        marks = {
            name: float(all(c is not None and getattr(c, name) == getattr(w, name) for w, c in pairs))
            for name in ("colour", "shape", "size")
        }
        if caption.relation:
            a, b = chosen
            marks["relation"] = float(a is not None and b is not None and _relation_holds(caption.relation, a, b))
        matches = sum(
            c is not None and getattr(c, name) == getattr(w, name)
            for w, c in pairs
            for name in ("colour", "shape", "size")
        )
        key = (float(matches), sum(marks.values()))
        if best is None or key > best[0]:
            best = (key, marks)
    assert best is not None  # at least one permutation exists
    result = {
        "count": float(len(seen) == len(wanted)),
        **best[1],
        "background": float(background == caption.background),
    }
    return {**result, "all": float(all(result.values()))}


def judge(images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
    """Whether each caption holds for its picture.

    Args:
        images: `[B,3,64,64]` in [0, 1].
        captions: B captions of the grammar.

    Returns:
        A float32 tensor `[B]` for each of `ATTRIBUTES`: 1 holds, 0 does not, NaN does not apply (no relation in it).
        "all" is 1 only where every attribute that applies holds.

    Raises:
        ValueError: wrong shapes, or a text that is no caption of the grammar.
    """
    if images.ndim != 4 or images.shape[1:] != (3, PIXELS, PIXELS) or len(captions) != len(images):
        raise ValueError(
            f"the judge reads [B,3,{PIXELS},{PIXELS}] pictures with B captions, "
            f"not {tuple(images.shape)} with {len(captions)}"
        )
    # NaN pictures are black to the judge: they fail rather than crash.
    levels = (images.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    pictures = levels.permute(0, 2, 3, 1).cpu().numpy()
    verdicts = [_verdict(parse(text), *read_picture(picture)) for text, picture in zip(captions, pictures, strict=True)]
    return {
        name: torch.tensor([verdict.get(name, float("nan")) for verdict in verdicts], dtype=torch.float32)
        for name in ATTRIBUTES
    }
