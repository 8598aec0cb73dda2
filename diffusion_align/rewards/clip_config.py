"""An open_clip model of a folder or of the hub, looked at before open_clip loads it.

open_clip hands what a configuration writes under `tokenizer_kwargs` on to transformers, `trust_remote_code` included,
so that a folder could bring its own program along.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..system.plain_json import read_json, require_modest, require_no_code
from .clip_fetch import fetched
from .containers import require_container
from .weights import hub_file

CONFIG_FILE = "open_clip_config.json"
_PICKLES = (".bin", ".pt", ".pth")


def require_plain_clip(name: str, pretrained: str | None) -> None:
    """Check what `open_clip.create_model_from_pretrained(name, pretrained)` is about to read.

    Raises:
        ValueError: it asks for code, is absurdly large, or its weights are no file that torch wrote.
        FileNotFoundError: the hub does not give its configuration.
    """
    scheme, _, place = name.partition(":")
    folder = Path(place) if scheme == "local-dir" else None
    if scheme in ("local-dir", "hf-hub"):
        repo, _, revision = place.partition("@")
        from_hub = partial(hub_file, repo, CONFIG_FILE, revision or None)
        file = folder / CONFIG_FILE if folder else fetched(name, pretrained, from_hub)
        content = read_json(file)
        require_no_code(file, content)
        require_modest(file, content)
    for path in [*(folder.iterdir() if folder else ()), *([Path(pretrained)] if pretrained else ())]:
        if path.suffix in _PICKLES and path.is_file():
            require_container(path)
