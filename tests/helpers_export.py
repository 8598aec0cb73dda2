"""What an export is compared with: networks with the blocks of SD1.5 and SDXL, and the key rules of other programs.

The rules are written down from what the programs do, as functions from a file's tensors to `{layer: update}`, where a
layer has diffusers' name and its update is `alpha / rank * up @ down` in float64. A rule raises for a key that its
program would leave out.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from helpers_sdxl import POOLED, TIME_WIDTH, make_tiny_sdxl_folder
from helpers_tiny import LATENT_SHAPE, make_tiny_folder
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_align.commands.trained_weights import LORA_FILE
from diffusion_align.rng import normal

Updates = dict[str, Tensor]
RANK = 4
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
CONV = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv")


@dataclass(frozen=True)
class Family:
    """A model's folder. depths: transformer blocks of the attentions at each level, from the outside in; 0: none."""

    name: str
    folder: Path
    depths: tuple[int, ...]

    @cache  # noqa: B019
    def unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(self.folder, subfolder="unet")


def sd15(folder: Path) -> Family:
    """All blocks of SD1.5's UNet, with few channels, in the folder of the tests' tiny model."""
    unet = {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 2,
    }
    return _with_unet(Family("SD1.5", make_tiny_folder(folder), (1, 1, 1, 0)), unet)


def sdxl(folder: Path) -> Family:
    """The same for SDXL, with 1 and 2 transformer blocks in place of 2 and 10."""
    unet = {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 2048,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": 6 * TIME_WIDTH + POOLED,
    }
    return _with_unet(Family("SDXL", make_tiny_sdxl_folder(folder), (0, 1, 2)), unet)


def _with_unet(family: Family, config: dict) -> Family:
    shutil.rmtree(family.folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=LATENT_SHAPE[1], norm_num_groups=4, **config)
    unet.save_pretrained(family.folder / "unet")
    return family


def make_run(
    family: Family, folder: Path, alpha: float, targets: tuple[str, ...] = (*LINEAR, *CONV), size: float = 0.1
) -> dict[str, tuple[Tensor, Tensor]]:
    """The folder of a finished run, and the LoRA in it as {layer: (down, up)}."""
    pairs = {}
    for key, weight in family.unet().state_dict().items():
        layer = key.removesuffix(".weight")
        if weight.ndim > 1 and f".{layer}".endswith(tuple(f".{target}" for target in targets)):
            shapes = (RANK, *weight.shape[1:]), (len(weight), RANK, *[1] * (weight.ndim - 2))
            pairs[layer] = tuple(normal(shape, 7, layer, i) * size for i, shape in enumerate(shapes))
    assert len(pairs) > 3
    tensors = {
        f"unet.{layer}.lora.{part}.weight": tensor
        for layer, pair in pairs.items()
        for part, tensor in zip(("down", "up"), pair, strict=True)
    }
    about = {"unet.r": RANK, "unet.lora_alpha": alpha, "unet.target_modules": sorted(targets)}
    folder.mkdir()
    save_file(tensors, folder / LORA_FILE, {"lora_adapter_metadata": json.dumps(about)})
    (folder / "config.yaml").write_text(
        f"verb: train dpo\nmodel:\n  pretrained_model_name_or_path: {family.folder}\ntrain:\n  seed: 3\n"
    )
    return pairs


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def update_of(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The change of a layer's weight, in its shape."""
    shape = [len(up), *down.shape[1:]]
    return scale * (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)


@cache
def original_layers(family: Family) -> dict[str, str]:
    """{name in the first release's code: layer}, by building the network's list of blocks as that code does."""
    levels, names = len(family.depths), {}
    inputs = [[("conv_in", "")]]
    for level, depth in enumerate(family.depths):
        for number in range(2):
            block = [(f"down_blocks.{level}.resnets.{number}", "resnet")]
            inputs.append(block + ([(f"down_blocks.{level}.attentions.{number}", "attention")] if depth else []))
        if level < levels - 1:
            inputs.append([(f"down_blocks.{level}.downsamplers.0", "down")])
    middle = [
        ("mid_block.resnets.0", "resnet"),
        ("mid_block.attentions.0", "attention"),
        ("mid_block.resnets.1", "resnet"),
    ]
    outputs = []
    for level, depth in enumerate(reversed(family.depths)):
        for number in range(3):
            block = [(f"up_blocks.{level}.resnets.{number}", "resnet")]
            block += [(f"up_blocks.{level}.attentions.{number}", "attention")] if depth else []
            last = number == 2 and level < levels - 1
            outputs.append(block + ([(f"up_blocks.{level}.upsamplers.0", "up")] if last else []))
    layers = [name for name, module in family.unet().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for place, blocks in (("input_blocks.{}.{}", inputs), ("output_blocks.{}.{}", outputs)):
        for number, block in enumerate(blocks):
            for i, (ours, kind) in enumerate(block):
                names |= _inside(place.format(number, i), ours, kind, layers)
    for i, (ours, kind) in enumerate(middle):
        names |= _inside(f"middle_block.{i}", ours, kind, layers)
    names |= {"out.2": "conv_out", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    if family.name == "SDXL":
        names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    return names


def _inside(theirs: str, ours: str, kind: str, layers: list[str]) -> dict[str, str]:
    inner = {
        "resnet": {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj",
                   "skip_connection": "conv_shortcut"},
        "down": {"op": "conv"},
        "up": {"conv": "conv"},
        "": {"": ""},
    }.get(kind)  # fmt: skip
    if inner is None:  # the layers of an attention block have one name everywhere
        inner = {
            name.removeprefix(ours + "."): name.removeprefix(ours + ".")
            for name in layers
            if name.startswith(ours + ".")
        }
    made = {f"{theirs}.{a}".rstrip("."): f"{ours}.{b}".rstrip(".") for a, b in inner.items()}
    return {a: b for a, b in made.items() if b in layers}


def comfyui(family: Family, tensors: dict[str, Tensor]) -> Updates:
    """ComfyUI: it lists its own layers under all the names that it knows, and looks for these names in the file."""
    places = {}
    for original, layer in original_layers(family).items():
        places[f"lora_unet_{original.replace('.', '_')}"] = layer
        places[f"lora_unet_{layer.replace('.', '_')}"] = layer
        processor = layer.replace(".to_", ".processor.to_").removesuffix(".0" if layer.endswith("to_out.0") else "\0")
        places |= {processor: layer, f"unet.{processor}": layer}
    updates, used = {}, set()
    for name, layer in places.items():
        for up, down in (
            (".lora_up.weight", ".lora_down.weight"),
            ("_lora.up.weight", "_lora.down.weight"),
            (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        ):
            if name + up in tensors:
                found = tensors[name + down]
                alpha = tensors[f"{name}.alpha"].item() if f"{name}.alpha" in tensors else len(found)
                updates[layer] = update_of(found, tensors[name + up], alpha / len(found))
                used |= {name + up, name + down, f"{name}.alpha"}
    assert not tensors.keys() - used, sorted(tensors.keys() - used)[:3]
    return updates


def a1111(family: Family, tensors: dict[str, Tensor]) -> Updates:
    """A1111: what stands before the first dot is a layer, in SD1.x's diffusers names or in the original ones.

    The numbers of blocks are those of SD1.x: three to a level, and an upsampler third in its block but at the first
    level. So SDXL's layers are found under their original names only.
    """
    places = {
        f"diffusion_model_{original.replace('.', '_')}": layer for original, layer in original_layers(family).items()
    }
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        place = _a1111_place(name)
        if place not in places:
            place = name.replace("lora_unet", "diffusion_model")
        assert place in places, key
        parts.setdefault(places[place], {})[part] = tensor
    return {layer: _update_of_parts(of) for layer, of in parts.items()}


def _a1111_place(name: str) -> str:
    inner = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
             "conv_shortcut": "skip_connection"}  # fmt: skip

    def place(match: re.Match[str]) -> str:
        way, level, kind, number, rest = match.groups()
        side, first = ("input", 1 + 3 * int(level)) if way == "down" else ("output", 3 * int(level))
        if kind in ("resnets", "attentions"):
            rest = rest if kind == "attentions" else inner[rest]
            return f"diffusion_model_{side}_blocks_{first + int(number)}_{int(kind == 'attentions')}_{rest}"
        return f"diffusion_model_{side}_blocks_{first + 2}_" + (
            "0_op" if way == "down" else f"{2 if int(level) else 1}_conv"
        )

    name = re.sub(r"lora_unet_(down|up)_blocks_(\d+)_([a-z]+)_(\d+)_(.+)", place, name)
    outside = {"conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding_linear_1": "time_embed_0",
               "time_embedding_linear_2": "time_embed_2"}  # fmt: skip
    if name.removeprefix("lora_unet_") in outside:
        return f"diffusion_model_{outside[name.removeprefix('lora_unet_')]}"
    middle = re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", name)
    if middle is None:
        return name
    if middle[1] == "attentions":
        return f"diffusion_model_middle_block_1_{middle[3]}"
    return f"diffusion_model_middle_block_{2 * int(middle[2])}_{inner[middle[3]]}"


def kohya(family: Family, tensors: dict[str, Tensor]) -> Updates:
    """kohya's scripts: a LoRA for each layer in the blocks of its own network, SDXL's with the original names."""
    blocks = ("attentions", "resnets", "downsamplers", "upsamplers")
    places = {}
    for original, layer in original_layers(family).items():
        if any(f".{block}." in layer for block in blocks):
            places["lora_unet_" + (original if family.name == "SDXL" else layer).replace(".", "_")] = layer
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        parts.setdefault(places[name], {})[part] = tensor
    return {layer: _update_of_parts(of) for layer, of in parts.items()}


def _update_of_parts(parts: dict[str, Tensor]) -> Tensor:
    assert parts.keys() == {"alpha", "lora_down.weight", "lora_up.weight"}
    down = parts["lora_down.weight"]
    return update_of(down, parts["lora_up.weight"], parts["alpha"].item() / len(down))
