"""The LoRA of --lora: merged for drawing, or what a training starts from; a run keeps a copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.options import UsageError
from diffusion_align.options.lora import GivenLora, NewLora

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage
    from diffusion_align.models.lora.start import Start

KEPT = "starting_lora"  # in a run folder


def require_lora(o: Any) -> None:
    """Check the file of --lora before anything is loaded.

    Raises:
        UsageError: nothing is there, or this command would delete it.
    """
    place = getattr(o, "lora", None)
    if place is None:
        return
    if not Path(place).exists():
        raise UsageError(f"--lora {place} is not there: give a file, a folder of peft, or a run; nothing is downloaded")
    run = Path(getattr(o, "output_dir", None) or ".").resolve()
    if getattr(o, "overwrite_output_dir", False) and run in (Path(place).resolve(), *Path(place).resolve().parents):
        raise UsageError(f"--overwrite_output_dir deletes --lora {place}: give another --output_dir")


@contextmanager
def with_cures() -> Iterator[None]:
    """Name the options that help in errors about a file of adapters."""
    from diffusion_align.models.lora.plain import OnlyMergeable
    from diffusion_align.models.lora.tensors import Incomplete, UnknownAlpha

    try:
        yield
    except Incomplete as error:
        raise ValueError(f"{error.fact}; --lora_partial true takes what fits") from error
    except UnknownAlpha as error:
        raise ValueError(f"{error.fact}, or give --lora_file_alpha NUMBER") from error
    except OnlyMergeable as error:
        raise ValueError(f"{error}: --lora_mode merge trains on the merged model") from error


def merge_given(model: TextToImage, place: str | Path, o: GivenLora) -> None:
    """Merge an adapter into a model."""
    from diffusion_align.models import merge_lora

    with with_cures():
        kinds = merge_lora(model, place, allow_partial=o.lora_partial, alpha=o.lora_file_alpha)
    print(f"lora {place}: {', '.join(kinds)}, merged")


def start_from(model: TextToImage, o: GivenLora, place: str | Path, mode: str) -> Start:
    """Make the model what a training with this LoRA starts from."""
    from diffusion_align.models import apply_start

    with with_cures():
        return apply_start(model, place, mode, allow_partial=o.lora_partial, alpha=o.lora_file_alpha)


def add_trained(model: TextToImage, new: NewLora, seed: int = 0) -> None:
    """Add the LoRA that is trained."""
    from diffusion_align.models import add_lora
    from diffusion_align.models.lora.rank import require_layers

    shapes = {name.replace(".base_layer.", "."): tuple(w.shape) for name, w in model.unet.named_parameters()}
    require_layers(shapes, new.own_names)
    add_lora(model.unet, new.rank, new.alpha, new.layers, seed=seed, dora=new.use_dora)


def lora_identity(o: Any) -> dict[str, str]:
    """The content of --lora, for the identity of a run; nothing without it."""
    from diffusion_align.models.lora.opening import adapter_digest

    return {KEPT: adapter_digest(o.lora)} if getattr(o, "lora", None) is not None else {}


def kept_lora(run: Path, config: dict[str, Any]) -> Path | None:
    """The copy of the LoRA that a run started from; None if it started from none.

    Raises:
        FileNotFoundError: it started from one, and the copy is gone.
    """
    given = (config.get("adapter") or {}).get("lora")
    if given is None:
        return None
    if not (run / KEPT).is_dir():
        raise FileNotFoundError(f"{run / KEPT} is missing: copy the LoRA that the run started from there, {given}")
    return run / KEPT


def saved_lora_options(config: dict[str, Any]) -> GivenLora:
    """The options of --lora in a run's configuration."""
    adapter = config.get("adapter") or {}
    return GivenLora(adapter.get("lora"), adapter.get("lora_partial", False), adapter.get("lora_file_alpha"))


def keep_lora(o: Any, run: Path) -> None:
    """Copy the files of --lora into the run folder, so that it can be evaluated when they are gone."""
    from diffusion_align.models.lora.opening import LORA_FILE, PEFT_CONFIG, PEFT_FILE, adapter_files

    place = getattr(o, "lora", None)
    if place is None:
        return
    for path in adapter_files(place):
        copy = run / KEPT / (path.name if path.name in (PEFT_FILE, PEFT_CONFIG) else LORA_FILE)
        if copy.exists() and copy.samefile(path):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
