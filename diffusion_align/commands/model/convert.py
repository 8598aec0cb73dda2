"""`model convert` and `model merge`: a model in another format, with a LoRA added to its weights."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.commands.model.base import as_given, load_base
from diffusion_align.commands.printed_commands import command_line
from diffusion_align.commands.sources import present_model
from diffusion_align.options import UsageError
from diffusion_align.options.model import ModelConvert, ModelMerge


def model_convert(options: ModelConvert) -> int:
    """Write a model as a folder or as a single file."""
    o = options
    name = present_model(o.pretrained_model_name_or_path or "")
    place = _place(o, name)

    import torch

    from diffusion_align.models.convert import write_model
    from diffusion_align.models.lora.merge import merge_lora

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[o.dtype]
    # A sum of rounded numbers would be rounded twice, so a LoRA is added in float32.
    read_in = torch.float32 if isinstance(o, ModelMerge) else dtype
    model = load_base(as_given({"pretrained_model_name_or_path": name}, o), "cpu", read_in)
    if isinstance(o, ModelMerge):
        kinds = merge_lora(model, o.lora or "", scale=o.scale)
        print(f"merged {o.lora}: {', '.join(kinds)}" + ("" if o.scale == 1 else f", times {o.scale:g}"))
    write_model(model, place, dtype, one_file=o.to == "single-file", title=place.stem)
    print(f"{place}: {o.dtype}, predicts {model.prediction_type}")
    print(f"next: {command_line('model', 'inspect', place)}")
    return 0


def _place(o: ModelConvert, name: str) -> Path:
    """The file or folder to write. Raises UsageError if something is there already."""
    folder = Path(o.output_dir or "")
    stem = Path(name).stem if Path(name).is_file() else Path(name).name
    stem += f"-{Path(o.lora or '').stem}" if isinstance(o, ModelMerge) else ""
    place = folder / f"{stem}.safetensors" if o.to == "single-file" else folder
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise UsageError(f"{place} is there already: give another --output_dir, or remove it")
    return place
