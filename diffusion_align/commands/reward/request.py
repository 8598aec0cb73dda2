"""Check and decode a request to `reward serve`: JSON, counts, sizes, base64, PNG, in this order."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.data.images import ImageError, decode_image
from diffusion_align.options.reward import RewardServe

PROMPT_LIMIT = 10_000  # characters


class BadRequest(Exception):
    """A request that is answered with this status and this sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def read_request(body: bytes, limits: RewardServe) -> tuple[list[str], list[Tensor]]:
    """Prompts and 8-bit pictures [3,H,W] of a request.

    Raises:
        BadRequest: not the protocol's JSON, too many pictures, or one that cannot be decoded or is too large.
    """
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body is not JSON") from None
    prompts, images = (content.get(name) if isinstance(content, dict) else None for name in ("prompts", "images"))
    if not isinstance(prompts, list) or not isinstance(images, list) or len(prompts) != len(images):
        raise BadRequest(400, 'the body is {"prompts": [B texts], "images": [B PNGs in base64]}')
    if len(images) > limits.max_pictures:
        raise BadRequest(413, f"{len(images)} pictures; at most {limits.max_pictures} (server.max_pictures)")
    for prompt in prompts:
        if not isinstance(prompt, str) or len(prompt) > PROMPT_LIMIT:
            raise BadRequest(400, f"a prompt is a text of at most {PROMPT_LIMIT} characters")
    return prompts, [_picture(number, image, limits.max_side) for number, image in enumerate(images)]


def _picture(number: int, text: object, side: int) -> Tensor:
    if not isinstance(text, str):
        raise BadRequest(400, f"picture {number} is not a text in base64")
    try:
        data = base64.b64decode(text, validate=True)
        if _png_size(data) > side:  # read from the header, before anything is decoded
            raise BadRequest(413, f"picture {number} has a side of more than {side} pixels (server.max_side)")
        return torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)
    except binascii.Error:
        raise BadRequest(400, f"picture {number} is not base64") from None
    except ImageError as error:
        raise BadRequest(400, f"picture {number} {error}") from None


def _png_size(data: bytes) -> int:
    """The longer side in a PNG's header; BadRequest for anything else."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        raise BadRequest(400, "a picture is not a PNG")
    return max(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))
