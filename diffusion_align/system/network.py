"""Whether the hub may be asked."""

import os


def offline() -> bool:
    """HF_HUB_OFFLINE, read as the hub's own client reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES")
