"""Whether the network may be used."""

import os


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, read as the hub's own client reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES")
