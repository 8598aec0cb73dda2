"""LoRA files in the formats of many programs, and faults of such files.

A format writes the LoRA of a network as some program would; a fault changes tensors or header of the file.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion_align.models import save_lora
from diffusion_align.models.lora.files import METADATA
from diffusion_align.rng import normal

RANK, ALPHA = 4, 8.0
FILE = "pytorch_lora_weights.safetensors"
Tensors = dict[str, torch.Tensor]


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def write(path: Path, tensors: Tensors, header: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header or None)
    return path


def _renamed(unet: Any, folder: Path, name: Callable[[str], str], keep_header: bool = False) -> Path:
    tensors, header = read(save_lora(unet, folder))
    return write(folder / FILE, {name(key): value for key, value in tensors.items()}, header if keep_header else None)


def _old_diffusers(unet: Any, folder: Path) -> Path:
    """The names before 0.21, for attention only: `attn1.processor.to_out_lora`."""
    return _renamed(
        unet, folder, lambda key: re.sub(r"\.(to_(?:q|k|v|out))(?:\.0)?\.lora\.", r".processor.\1_lora.", key)
    )


def _peft(unet: Any, folder: Path) -> Path:
    """What `PeftModel.save_pretrained` writes: weights without alpha, and a configuration file."""
    config = unet.peft_config["default"]
    tensors = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    path = write(folder / "adapter_model.safetensors", tensors)
    about = {"peft_type": "LORA", "r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": False}
    about |= {"target_modules": sorted(config.target_modules), "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return path


def _kohya(unet: Any, folder: Path) -> Path:
    """By diffusers' own converter, which always writes the rank as alpha; replaced here by the real one."""
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    alpha = torch.tensor(float(unet.peft_config["default"].lora_alpha))
    tensors = convert_state_dict_to_kohya(state)
    tensors = {key: alpha.clone() if key.endswith(".alpha") else value for key, value in tensors.items()}
    return write(folder / "kohya.safetensors", tensors, {"ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA)})


def _kohya_sdxl(unet: Any, folder: Path) -> Path:
    """The same in the names of Stability's own network, which numbers all blocks in one series. Written by hand for the
    tiny SDXL: down block 0 is inputs 1 (a resnet) and 2 (downsampler), block 1 is input 3; up blocks have two resnets.
    """
    tensors, header = read(_kohya(unet, folder))
    return write(folder / "kohya.safetensors", {first_release(key): value for key, value in tensors.items()}, header)


def first_release(key: str) -> str:
    """A kohya key for the tiny SDXL in the names of Stability's own network."""
    inner = (("_conv1.", "_in_layers_2."), ("_conv2.", "_out_layers_3."), ("_time_emb_proj.", "_emb_layers_1."),
             ("_conv_shortcut.", "_skip_connection."))  # fmt: skip
    places = {"down_blocks_0_resnets_0": "input_blocks_1_0", "down_blocks_1_resnets_0": "input_blocks_3_0",
              "down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_resnets_0": "middle_block_0",
              "mid_block_attentions_0": "middle_block_1", "mid_block_resnets_1": "middle_block_2"}  # fmt: skip
    for block in (0, 1):
        for layer in (0, 1):
            for family, slot in (("resnets", 0), ("attentions", 1)):
                places[f"up_blocks_{block}_{family}_{layer}"] = f"output_blocks_{2 * block + layer}_{slot}"
    for old, new in (*places.items(), *inner):
        key = key.replace(old, new)
    return key


# Of each: the writer, whether the file gives alpha, whether its names need repair, the layers that it can hold.
FORMATS: dict[str, tuple[Callable[[Any, Path], Path], bool, bool, str]] = {
    "diffusers": (lambda unet, folder: save_lora(unet, folder), True, False, "wide"),
    "diffusers, no header": (lambda unet, folder: _renamed(unet, folder, str), False, False, "wide"),
    "diffusers, no prefix": (
        lambda unet, folder: _renamed(unet, folder, lambda key: key.removeprefix("unet."), True), True, True, "wide"),
    "old diffusers": (_old_diffusers, False, True, "attention"),
    "peft": (_peft, True, True, "wide"),
    "kohya": (_kohya, True, True, "wide"),
    "kohya for SDXL": (_kohya_sdxl, True, True, "wide"),
}  # fmt: skip


def _first(tensors: Tensors, half: str = r"lora_A|lora\.down|lora_down") -> str:
    return next(key for key in sorted(tensors) if re.search(half, key))


def _change(tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[_first(tensors)] = change(tensors[_first(tensors)].clone())


def _drop(tensors: Tensors, keys: list[str]) -> None:
    for key in keys:
        del tensors[key]


def _layer(tensors: Tensors) -> list[str]:
    stem = re.split(r"[._]lora[._]|_lora\.|\.lora_", _first(tensors))[0]
    return [key for key in tensors if key.startswith(stem + ".") or key.startswith(stem + "_lora")]


def _prefixed(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[re.sub(r"^(unet\.|lora_unet_|base_model\.model\.)?", "transformer.", key)] = tensors.pop(key)


def _poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([0]), value)


def _extra(tensors: Tensors) -> None:
    key = _first(tensors)
    tensors[re.sub(r"\d+", "77", key, count=1)] = tensors[key].clone()


def _text(*names: str) -> Callable[[Tensors], None]:
    def add(tensors: Tensors) -> None:
        for name in names:
            for half, shape in (("down", (RANK, 32)), ("up", (32, RANK))):
                tensors[name.format(half, "AB"[half == "up"])] = normal(shape, 0, "text", name)

    return add


# Each damages the tensors so that the file must be refused. The text encoders have no layer 77.
DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "wrong prefix": _prefixed,
    "one half of a layer missing": lambda t: _drop(t, [_first(t)]),
    "one layer missing": lambda t: _drop(t, _layer(t)),
    "half of the keys missing": lambda t: _drop(t, sorted(t)[::2]),
    "all keys missing": lambda t: t.clear(),
    "an extra layer": _extra,
    "a key that is no LoRA's": lambda t: t.__setitem__(_first(t) + ".hada_w1_a", torch.zeros(2, 2)),
    "wrong rank": lambda t: _change(t, lambda v: v[:2]),
    "wrong shape": lambda t: _change(t, lambda v: torch.cat([v, v], 1)),
    "NaN": lambda t: _change(t, _poison(float("nan"))),
    "infinite": lambda t: _change(t, _poison(float("-inf"))),
    "whole numbers": lambda t: _change(t, lambda v: v.to(torch.int8)),
    "text encoder, kohya": _text("lora_te1_text_model_encoder_layers_77_self_attn_q_proj.lora_{0}.weight"),
    "text encoder, diffusers": _text(
        "text_encoder.text_model.encoder.layers.77.self_attn.q_proj.lora_linear_layer.{0}.weight"),
    "text encoder, transformers 5.6": _text(
        "text_encoder_2.encoder.layers.77.self_attn.q_proj.lora_{1}.weight",
        "encoder.layers.77.mlp.fc1.lora_{1}.weight"),
}  # fmt: skip


def without_alpha(path: Path) -> None:
    """Remove everything that gives alpha: header, alpha tensors, and peft's configuration."""
    tensors, header = read(path)
    header.pop(METADATA, None)
    write(path, {key: value for key, value in tensors.items() if not key.endswith(".alpha")}, header)
    (path.parent / "adapter_config.json").unlink(missing_ok=True)


def in_half(path: Path) -> None:
    """Convert to float16, as in most shared files."""
    tensors, header = read(path)
    write(path, {key: value.half() for key, value in tensors.items()}, header)


def damaged(path: Path, damage: Callable[[Tensors], None]) -> None:
    tensors, header = read(path)
    damage(tensors)
    write(path, tensors, header)
