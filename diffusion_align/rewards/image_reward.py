"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP-L reads picture and prompt together, a small head scores them.

The network is built of transformers' own BLIP modules; facts (sizes, token count, mean and std, names of the weights)
are from THUDM/ImageReward (Apache-2.0). A picture's 197 vision states enter the text encoder by cross-attention; the
state of its first token goes through the head, and the result is standardised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .aesthetic import WIDTHS, apply_head, head_shapes
from .catalogue import CATALOGUE
from .interface import Reward, of_levels, to_pil
from .weight_files import fill, locate, place_of, read_weights, require_fit

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on its authors' pictures
TOKENS = 35
TOKENIZER = "google-bert/bert-base-uncased"
SIZE = 224
# transformers' own defaults are BLIP-base at 384 pixels, with eight heads for text and another epsilon.
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": SIZE, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "encoder_hidden_size": 1024, "is_decoder": True,  # what gives the layers their cross-attention; read both ways
}  # fmt: skip
# What the published file holds besides: projections of a loss that is not computed here, and a counter.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Prompts -> token ids and mask, both [B,TOKENS]."""


@dataclass(frozen=True)
class ImageReward:
    """The network's parts; `head` is its weights by key."""

    vision: Any
    text: Any
    head: Mapping[str, Tensor]


def load_image_reward(
    path: str = "", *, revision: str | None = None, device: str | torch.device | None = None, chunk: int = 32
) -> Reward:
    """ImageReward as a reward, in standard deviations over the pictures that its authors fitted it to.

    Args:
        path: ImageReward.pt, or a folder with it, and with BERT's tokenizer if tokenizer.json or vocab.txt is there
            too; "" fetches what is missing.

    Raises:
        FileNotFoundError: a file is not to be had.
        ValueError: weights with another key, shape, or values that are not finite.
    """
    entry = CATALOGUE["imagereward"]
    file = locate(path, entry.files, entry.repo, revision)
    tokenize = bert_tokenizer(path)
    return image_reward_scorer(build(read_weights(file), file, device=device), tokenize, chunk=chunk)


def bert_tokenizer(path: str = "") -> Tokenize:
    """BERT's tokenizer as ImageReward calls it, from a folder that has it or from the hub."""
    from transformers import BertTokenizer

    place = Path(path).expanduser()
    local = path and any((place / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    try:
        tokenizer: Any = BertTokenizer.from_pretrained(str(place) if local else TOKENIZER)
    except Exception as error:  # OSError mostly; the hub's client has more
        raise FileNotFoundError(
            f"BERT's tokenizer ({TOKENIZER}) could not be fetched ({type(error).__name__}): put its vocab.txt beside "
            "ImageReward.pt in a folder and give that, imagereward=FOLDER"
        ) from error

    def tokenize(prompts: list[str]) -> tuple[Tensor, Tensor]:
        said = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return said.input_ids, said.attention_mask

    return tokenize


def build(
    weights: Mapping[str, Tensor],
    source: object,
    *,
    vision: Mapping[str, Any] = VISION,
    text: Mapping[str, Any] = TEXT,
    device: str | torch.device | None = None,
) -> ImageReward:
    """The network with ImageReward.pt's weights, in float32; other sizes than the published are for tests.

    Raises:
        ValueError: weights with another key, shape, or values that are not finite; with the first wrong key.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    of_vision, of_text, head = split_keys(weights, source)
    require_fit(head, head_shapes((text["hidden_size"], *WIDTHS[1:])), source)
    place = place_of(device)
    with torch.random.fork_rng(devices=[]):
        eyes = BlipVisionModel(BlipVisionConfig(**vision))
        reader = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
    return ImageReward(
        fill(eyes, of_vision, f"{source} (vision)", place),
        fill(reader, of_text, f"{source} (text)", place),
        {key: weight.to(place, torch.float32) for key, weight in head.items()},
    )


def split_keys(weights: Mapping[str, Tensor], source: object) -> tuple[dict[str, Tensor], ...]:
    """ImageReward.pt's weights under transformers' names: vision, text, head.

    Raises:
        ValueError: a key that belongs to none of them.
    """
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if key.startswith(UNUSED):
            continue
        if key.startswith("mlp."):
            head[key.removeprefix("mlp.")] = weight
        elif key.startswith("blip.text_encoder."):  # transformers kept BLIP's own names
            text[key.removeprefix("blip.text_encoder.")] = weight
        elif key.startswith("blip.visual_encoder.") and (name := vision_name(key.removeprefix("blip.visual_encoder."))):
            vision[name] = weight
        else:
            raise ValueError(f"{source}: unknown key {key!r} for ImageReward")
    return vision, text, head


def vision_name(key: str) -> str | None:
    """transformers' name of a weight of BLIP's vision tower; None where there is no such weight."""
    if key in _VISION_NAMES:
        return _VISION_NAMES[key]
    stem, _, kind = key.rpartition(".")
    if stem in _VISION_NAMES:
        return f"{_VISION_NAMES[stem]}.{kind}"
    block, _, part = stem.removeprefix("blocks.").partition(".")
    if stem.startswith("blocks.") and block.isdecimal() and part in _VISION_PARTS:
        return f"encoder.layers.{block}.{_VISION_PARTS[part]}.{kind}"
    return None


def image_reward_scorer(model: ImageReward, tokenize: Tokenize, *, chunk: int = 32) -> Reward:
    """The network as a reward, `chunk` pictures in a forward pass."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    size: Any = model.vision.config.image_size
    transform: Any = image_transform_v2(PreprocessCfg(size=size), is_train=False)  # CLIP's resize, crop and colours
    place = next(model.vision.parameters()).device

    def some(levels: Tensor, prompts: list[str]) -> Tensor:
        pixels = torch.stack([transform(picture) for picture in to_pil(levels)]).to(place)
        tokens, mask = (part.to(place) for part in tokenize(prompts))
        seen = model.vision(pixel_values=pixels).last_hidden_state
        read = model.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (apply_head(model.head, read[:, 0]) - MEAN) / STD

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        rows = range(0, len(prompts), chunk)
        return torch.cat([some(levels[i : i + chunk], prompts[i : i + chunk]) for i in rows])

    return of_levels(score)
