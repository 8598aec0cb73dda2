"""`export`: the result of a run in the format of another program."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.commands.adapters import KEPT
from diffusion_align.commands.export.facts import lora_header, title
from diffusion_align.commands.export.place import place_of, replacing, require_replaceable
from diffusion_align.commands.export.result import Result, find_result
from diffusion_align.commands.model.base import load_base
from diffusion_align.commands.model.same_base import require_same_base
from diffusion_align.commands.printed_commands import PROG
from diffusion_align.commands.trained_weights import load_start
from diffusion_align.models.hub import locate
from diffusion_align.options import Export, UsageError
from diffusion_align.options.export import LORA_TARGETS
from diffusion_align.system.printable import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffusion_align.models import TextToImage
    from diffusion_align.models.lora.files import Lora
    from diffusion_align.models.lora.tensors import Source

WHOLE = ("merged", "single-file")


def export(options: Export) -> int:
    """Write the result of a run in another format; see `Export`."""
    o = options
    result = find_result(o)
    if o.to in LORA_TARGETS and not result.is_lora:
        raise UsageError(
            f"{result.place} holds all weights of a UNet, not a LoRA, so there is no {o.to} file of it: --to merged "
            "and --to single-file write the whole model, and a run with --mode lora makes a LoRA"
        )
    if result.is_checkpoint and result.start in ("continue", "beneath"):
        raise UsageError(
            f"{result.place} does not hold the LoRA that its run started from: export the run itself, after its end"
        )
    is_file = o.to not in ("peft", "merged") and (result.is_lora or o.to == "single-file")
    name = f"{result.name}-{o.to}-{o.dtype}"
    path = place_of(o.output, name, is_file=is_file)
    require_replaceable(path, name, is_file=is_file, overwrite=o.overwrite)

    # These imports take seconds, so they follow all checks.
    from diffusion_align.models.export.precision import DTYPES, PrecisionError
    from diffusion_align.models.lora.tensors import Incomplete, UnknownAlpha

    write = _write_whole if o.to in WHOLE else _write_lora if result.is_lora else _write_unet
    with replacing(path) as staged:
        try:
            write(staged, result, o, DTYPES[o.dtype])
        except PrecisionError as error:
            better = "bf16 or --dtype fp32" if o.dtype == "fp16" else "fp32"
            raise ValueError(f"{error}: give --dtype {better}") from error
        except Incomplete as error:
            raise ValueError(f"{error.fact}, and a file is exported completely or not at all") from error
        except UnknownAlpha as error:
            raise ValueError(f"{error.fact}, or give --alpha") from error
    print(f"{path}: {result.name} for {o.to}, {o.dtype}")
    return 0


def _write_lora(path: Path, result: Result, o: Export, dtype: torch.dtype) -> None:
    """Write a LoRA's file, or peft's folder of it. The base's weights are not read, only its configuration."""
    from diffusion_align.models.export import dialects, write
    from diffusion_align.models.export.networks import empty_networks
    from diffusion_align.models.export.precision import cast_lora

    folder = _folder(result)
    networks = empty_networks(folder)
    loras = {network: cast_lora(lora, dtype) for network, lora in _loras(result, o, networks).items()}
    if o.to == "diffusers":
        return write.write_tensors(path, *dialects.diffusers_file(loras, networks))
    if o.to == "peft":
        label = result.base_label
        files = dialects.peft_files(loras["unet"], networks["unet"], label if "/" in label else None)
        return write.write_peft(path, *files)
    sdxl = "text_encoder_2" in networks
    original = sdxl or o.to == "comfyui"
    tensors = dialects.kohya_tensors(loras, networks, original=original)
    write.write_tensors(path, tensors, lora_header(result, loras, tensors, folder, original=original))
    if o.to == "kohya" and (outside := dialects.outside_kohya(loras["unet"].pairs)):
        _note(
            f"{len(outside)} layers, such as {outside[0]}, have no LoRA in kohya's own scripts, which leave them out; "
            "ComfyUI and A1111 read them"
        )


def _loras(result: Result, o: Export, networks: Mapping[str, nn.Module]) -> dict[str, Lora]:
    """The LoRA of each network.

    Raises:
        ValueError: the file holds more than the format can express.
    """
    from diffusion_align.models.lora.files import UNET, as_lora
    from diffusion_align.models.lora.kinds import TRAINABLE
    from diffusion_align.models.lora.plain import OnlyMergeable

    adapter, source = result.adapter(networks)
    whole = "--to merged and --to single-file take it"
    kinds = TRAINABLE if o.to in ("diffusers", "peft") else TRAINABLE[:1]
    if other := sorted(set(adapter.kinds()) - set(kinds)):
        raise ValueError(f"{source.path} is of {' and '.join(other)}, which a file for {o.to} cannot hold: {whole}")
    if o.to == "peft" and list(adapter.layers) != [UNET]:
        raise ValueError(
            f"{source.path} holds layers for {', '.join(sorted(adapter.layers))}, and a folder of peft is for one "
            "network only: --to diffusers, kohya and comfyui take all of them"
        )
    try:
        loras = {network: as_lora(source, layers) for network, layers in adapter.layers.items()}
    except OnlyMergeable as error:
        raise ValueError(f"{error}: {whole}") from error
    _tell_repairs(source)
    if result.start == "merge":
        _note(
            f"{result.name} was trained with the LoRA in {result.run / KEPT} merged into its model, so use that LoRA "
            "beside this file; --to merged and --to single-file hold both"
        )
    return loras


def _write_unet(path: Path, result: Result, o: Export, dtype: torch.dtype) -> None:
    """Write the UNet of a run that trained all of it."""
    from diffusion_align.models.export.networks import empty_unet, fill_unet
    from diffusion_align.models.export.write import write_unet

    unet = empty_unet(_folder(result))
    fill_unet(unet, result.unet(), result.place)
    write_unet(path, unet, dtype)


def _write_whole(path: Path, result: Result, o: Export, dtype: torch.dtype) -> None:
    """Write the whole model, with the trained weights in it."""
    from diffusion_align.models.export.write import write_model

    model = _tuned_model(result, o)
    write_model(path, model, dtype, one_file=o.to == "single-file", title=title(result, "model"))


def _tuned_model(result: Result, o: Export) -> TextToImage:
    """The base in float32 with the trained weights.

    Raises:
        ValueError: the base is not the one that the run was trained from, and nobody named it on the command line.
    """
    from diffusion_align.models.export.networks import fill_unet, merge_exactly
    from diffusion_align.models.lora.opening import networks_of

    name = result.base["pretrained_model_name_or_path"]
    model = load_base(result.base, "cpu")
    require_same_base(model, result.run, name, named=o.pretrained_model_name_or_path is not None)
    if result.start == "merge":
        load_start(model, result.run, result.config)
    if not result.is_lora:
        fill_unet(model.unet, result.unet(), result.place)
        return model
    networks = networks_of(model)
    adapter, source = result.adapter(networks)
    merge_exactly(networks, adapter, source.path)
    _tell_repairs(source)
    return model


def _tell_repairs(source: Source) -> None:
    if source.notes:
        _note(f"{source.path}: {'; '.join(source.notes)}")


def _folder(result: Result) -> Path:
    base: dict[str, Any] = result.base
    return locate(base["pretrained_model_name_or_path"], revision=base["revision"], variant=base["variant"])


def _note(text: str) -> None:
    print(f"{PROG}: note: {printable(text)}", file=sys.stderr)
