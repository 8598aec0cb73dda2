"""Hostile models, for `sample`."""

import json
import os
import shutil
import struct
from pathlib import Path

import torch

from stress.hostile.cases import ROOT, case, write


def sample(home: Path, *more: str) -> list[str]:
    words = "sample --prompt circle --steps 1 --guidance 1 --device cpu --out".split()
    return [*words, str(home / "out"), *more]


def model(home: Path) -> Path:
    """The embedded model as links, which `write` replaces."""
    return Path(shutil.copytree(ROOT / "assets" / "tiny", home / "model", copy_function=os.link))


def with_json(home: Path, name: str, **changes: object) -> list[str]:
    """The command for a model with changed values in one JSON file."""
    file = model(home) / name
    content = json.loads(file.read_text()) if file.exists() else {}
    write(file, content | changes)
    return sample(home, "--model", str(home / "model"))


@case
def a_model_with_pickled_weights(home, trap):
    folder = model(home)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": trap}, folder / "unet/diffusion_pytorch_model.bin")
    return sample(home, "--model", str(folder))


@case
def a_text_encoder_with_pickled_weights(home, trap):
    folder = model(home)
    (folder / "text_encoder/model.safetensors").unlink()
    torch.save({"x": trap}, folder / "text_encoder/pytorch_model.bin")
    return sample(home, "--model", str(folder))


@case
def a_text_encoder_with_a_program(home, trap):
    write(home / "model/text_encoder/evil.py", trap.python)
    shutil.rmtree(home / "model")
    command = with_json(home, "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}, trust_remote_code=True)
    write(home / "model/text_encoder/evil.py", trap.python)
    return command


@case
def a_network_of_another_class(home, trap):
    command = with_json(home, "unet/config.json", _class_name="evil.Evil")
    write(home / "model/unet/evil.py", trap.python)
    return command


@case
def a_part_from_another_library(home, trap):
    command = with_json(home, "model_index.json", unet=["evil", "UNet2DConditionModel"], vae=["os", "system"])
    write(home / "model/evil.py", trap.python)
    return command


@case
def a_pipeline_of_its_own(home, trap):
    command = with_json(home, "model_index.json", _class_name=["pipeline", "Evil"], custom_pipeline="./pipeline.py")
    write(home / "model/pipeline.py", trap.python)
    return command


@case
def a_kernel_from_elsewhere(home, trap):
    return with_json(home, "text_encoder/config.json", attn_implementation="evil/kernel", _attn_implementation="evil/k")


@case
def a_billion_layers(home, trap):
    return with_json(home, "text_encoder/config.json", num_hidden_layers=10**9)


@case
def a_layer_of_a_trillion_channels(home, trap):
    return with_json(home, "unet/config.json", block_out_channels=[10**12, 10**12])


@case
def layers_nested_without_end(home, trap):
    folder = model(home)
    write(folder / "vae/config.json", '{"a":' + "[" * 200_000)
    return sample(home, "--model", str(folder))


@case
def weights_in_a_file_outside(home, trap):
    folder = model(home)
    os.rename(folder / "unet/diffusion_pytorch_model.safetensors", home / "outside.safetensors")
    write(folder / "unet/diffusion_pytorch_model.safetensors.index.json",
          {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}})  # fmt: skip
    return sample(home, "--model", str(folder))


@case
def an_index_without_end(home, trap):
    folder = model(home)
    write(folder / "model_index.json", "[" * 200_000)
    return sample(home, "--model", str(folder))


@case
def an_index_of_nothing(home, trap):
    return with_json(home, "model_index.json", unet=[], vae="x", text_encoder={"a": 1}, tokenizer=[None])


@case
def weights_of_an_absurd_shape(home, trap):
    folder = model(home)
    text = b'{"conv_in.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    write(folder / "unet/diffusion_pytorch_model.safetensors", struct.pack("<Q", len(text)) + text)
    return sample(home, "--model", str(folder))


@case
def a_tokenizer_with_a_program(home, trap):
    named = {"AutoTokenizer": ["evil.Evil", None]}
    command = with_json(home, "tokenizer/tokenizer_config.json", auto_map=named, tokenizer_class="Evil")
    write(home / "model/tokenizer/evil.py", trap.python)
    return command


@case
def a_prompt_padded_to_a_trillion_tokens(home, trap):
    return with_json(home, "tokenizer/tokenizer_config.json", model_max_length=10**12)


@case
def a_schedule_of_a_trillion_steps(home, trap):
    return with_json(home, "scheduler/scheduler_config.json", num_train_timesteps=10**12)


@case
def a_name_that_clears_the_screen(home, trap):
    return with_json(home, "model_index.json", unet=["diffusers", "\x1b[2J\x1b]0;owned\x07\n"])
