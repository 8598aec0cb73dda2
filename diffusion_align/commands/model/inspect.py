"""`model inspect`: what a model's folder or file is, and what is missing, without loading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_align.commands.model.base import CURES, names_options
from diffusion_align.commands.printed_commands import command_line
from diffusion_align.commands.sources import present_model
from diffusion_align.models.diffusers_folder.weights import Weights, choose_weights, weights_in
from diffusion_align.models.hub import COMPONENTS, SECOND_ENCODER, asset, on_hub, read_index
from diffusion_align.models.single_file.architecture import Architecture, architecture_of
from diffusion_align.models.single_file.contents import Contents, Entry, read_contents
from diffusion_align.models.single_file.kinds import canonical, has_vae
from diffusion_align.models.single_file.names import OPEN_CLIP, SDXL_CLIP, SDXL_OPEN_CLIP, UNET, VAE
from diffusion_align.options.model import ModelInspect
from diffusion_align.system.printable import printable

PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
LICENCES = ("modelspec.license", "license")


def model_inspect(options: ModelInspect) -> int:
    """Print family, precision, prediction type, noise levels, components, what is missing, and the licence.

    Raises:
        FileNotFoundError: no such model here. NotAModel: the file is something else, which the message names.
    """
    name = present_model(options.pretrained_model_name_or_path or "")
    place = asset("tiny") if name == "tiny" else Path(name).expanduser()
    if not place.exists():
        cure = f": `hf download {name}` fetches it, then give its folder" if on_hub(name) else ""
        raise FileNotFoundError(f"no model at {name}{cure}")
    with names_options():
        lines = list(describe_file(place) if place.is_file() else describe_folder(place))
    print("\n".join(map(printable, lines)))
    return 0


def describe_file(path: Path) -> Iterator[str]:
    """The report on a single file, line by line."""
    contents = read_contents(path)
    kind = architecture_of(contents)
    yield f"format     single file, {len(contents.entries):,} tensors in the original code's names"
    yield f"family     {kind.family}"
    parts = _parts_of_file(contents)
    yield from _parts(parts)
    yield f"predicts   {_told_by(contents, kind)}"
    yield _noise(kind.scheduler(kind.prediction_type or "epsilon"))
    yield f"pictures   {kind.resolution} pixels"
    missing = [] if has_vae(contents) else [f"vae ({CURES['no VAE']} gives one)"]
    yield f"missing    {', '.join(missing) or 'nothing'}"
    licence = next((contents.metadata[key] for key in LICENCES if contents.metadata.get(key)), "not told in the file")
    yield f"licence    {licence}"
    needed = [] if kind.prediction_type else ["--prediction_type", "v_prediction"]
    yield f"use        {command_line('train', 'dpo', '--model', path, *needed, '--train_data_dir', 'PAIRS')}"


def _parts_of_file(contents: Contents) -> dict[str, list[Entry]]:
    prefixes = {UNET: "unet", VAE: "vae", SDXL_CLIP: "text_encoder", SDXL_OPEN_CLIP: "text_encoder_2"}
    prefixes |= {OPEN_CLIP: "text_encoder", "cond_stage_model.transformer.": "text_encoder"}
    found: dict[str, list[Entry]] = {}
    for key, entry in contents.entries.items():
        part = next((part for prefix, part in prefixes.items() if canonical(key).startswith(prefix)), None)
        if part is not None:
            found.setdefault(part, []).append(entry)
    return found


def _told_by(contents: Contents, kind: Architecture) -> str:
    if kind.prediction_type is None:
        return f"not told: {CURES['prediction']} (v_prediction for 768 pixels, epsilon for 512)"
    if "v_pred" in contents.entries:
        return f"{kind.prediction_type}, by the mark v_pred"
    if any(key in contents.metadata for key in ("modelspec.prediction_type", "modelspec.architecture")):
        return f"{kind.prediction_type}, by the file's metadata"
    return f"{kind.prediction_type}, as usual for {kind.family}"


def describe_folder(folder: Path) -> Iterator[str]:
    """The report on a folder in diffusers' format, line by line."""
    index = read_index(folder)
    sdxl = "text_encoder_2" in index
    needed = [*COMPONENTS, *(SECOND_ENCODER if sdxl else []), "scheduler"]
    unet = _config(folder / "unet" / "config.json")
    yield f"format     folder in diffusers format, {index.get('_class_name', 'of an unnamed class')}"
    yield f"family     {_family(sdxl, unet)}"
    missing = [name for name in needed if not (folder / name).is_dir()]
    chosen: dict[str, Weights] = {}
    for name in needed:
        networks = not name.startswith(("tokenizer", "scheduler"))
        if name in missing or not networks:
            continue
        try:
            chosen[name] = choose_weights(folder / name)
        except FileNotFoundError:
            others = sorted({variant for variant, _ in weights_in(folder / name) if variant})
            missing.append(f"weights of {name}" + (f" (--variant {others[0]} takes those)" if others else ""))
    yield from _parts({name: _entries(weights) for name, weights in chosen.items()})
    for name, weights in chosen.items():
        more = sorted({variant or "plain" for variant, _ in weights_in(folder / name)} - {weights.variant or "plain"})
        if more:
            yield f"           {name} also as {', '.join(more)}"
    scheduler = _config(folder / "scheduler" / "scheduler_config.json")
    told = "as the scheduler's file says" if "prediction_type" in scheduler else "as the scheduler's file is silent"
    yield f"predicts   {scheduler.get('prediction_type', 'epsilon')}, {told}"
    yield _noise(scheduler)
    reduction = 2 ** (len(_config(folder / "vae" / "config.json").get("block_out_channels", [0] * 4)) - 1)
    yield f"pictures   {unet.get('sample_size', 0) * reduction} pixels"
    yield f"missing    {', '.join(missing) or 'nothing'}"
    yield f"licence    {_licence(folder)}"
    if not missing:
        yield f"use        {command_line('train', 'dpo', '--model', folder, '--train_data_dir', 'PAIRS')}"


def _family(sdxl: bool, unet: Mapping[str, Any]) -> str:
    if sdxl:
        return "SDXL"
    return "SD 2.x" if unet.get("use_linear_projection") else "SD 1.x"


def _entries(weights: Weights) -> list[Entry]:
    return [entry for file in weights.files for entry in read_contents(file).entries.values()]


def _parts(parts: Mapping[str, list[Entry]]) -> Iterator[str]:
    """A line for each network: how many weights, in which precisions."""
    for number, (name, entries) in enumerate(parts.items()):
        counts: Counter[str] = Counter()
        for entry in entries:
            counts[PRECISIONS.get(entry.dtype, entry.dtype)] += entry.count
        precision = ", ".join(word for word, _ in counts.most_common(2))
        yield f"{'' if number else 'parts':11}{name:15} {sum(counts.values()) / 1e6:9.1f} M weights, {precision}"


def _noise(scheduler: Mapping[str, Any]) -> str:
    zero = ", to zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    betas = f"{scheduler.get('beta_start', 1e-4):g} to {scheduler.get('beta_end', 0.02):g}"
    return f"noise      {scheduler.get('beta_schedule', 'linear')}, betas {betas}{zero}"


def _config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _licence(folder: Path) -> str:
    """The licence in the model card's header, which the hub shows."""
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:50]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
    return "not told in the folder"
