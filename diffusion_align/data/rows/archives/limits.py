"""What a member of an archive may be: its suffix, name and size."""

import os

PICTURE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"))
TEXT_SUFFIXES = frozenset(("txt", "json", "caption"))
MAX_NAME = 255
MAX_PICTURE = 256 * 1024 * 1024
MAX_TEXT = 1024 * 1024
MAX_MEMBERS = 1_000_000


def member_fault(name: str, suffix: str, size: int) -> str | None:
    """Why a member is refused; None if it is not."""
    parts = name.replace("\\", "/").split("/")
    if len(os.fsencode(name)) > MAX_NAME:
        return f"has a name of {len(os.fsencode(name))} bytes, over {MAX_NAME}: refused"
    if not name or parts[0] == "" or ".." in parts or "\0" in name or parts[0][1:2] == ":":
        return "has a path that leads outside: refused"
    limit = MAX_PICTURE if suffix in PICTURE_SUFFIXES else MAX_TEXT
    if suffix in PICTURE_SUFFIXES | TEXT_SUFFIXES and size > limit:
        return f"holds {size:,} bytes, over {limit:,}: refused"
    return None
