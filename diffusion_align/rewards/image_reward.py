"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP-L reads picture and prompt together, a small head scores them.

The network is built of transformers' BLIP modules. Sizes, token count, mean, std and the names of the weights are those
of THUDM/ImageReward (Apache-2.0). The text encoder reads a picture's 197 vision states by cross-attention; the state of
its first token goes through the head, and the result is standardised.
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
from .interface import Reward, device_or_default, of_levels, to_pil
from .weight_files import fill, locate, read_weights, require_fit

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on its authors' pictures
TOKENS = 35
TOKENIZER = "google-bert/bert-base-uncased"
SIZE = 224
# transformers' defaults are those of BLIP-base at 384 pixels, with eight heads for text and another epsilon.
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": SIZE, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "encoder_hidden_size": 1024, "is_decoder": True,  # gives the layers cross-attention; attention stays bidirectional
}  # fmt: skip
# The published file also has projections for a training loss, and a counter.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_LAYERS = {
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
    """The two encoders, and the head's weights by key."""

    vision: Any
    text: Any
    head: Mapping[str, Tensor]


def load_image_reward(
    path: str = "", *, revision: str | None = None, device: str | torch.device | None = None, chunk: int = 32
) -> Reward:
    """ImageReward as a reward, in standard deviations over its authors' pictures.

    Args:
        path: ImageReward.pt, or a folder with it. A folder may also hold BERT's tokenizer, as tokenizer.json or
            vocab.txt. "" fetches what is missing.

    Raises:
        FileNotFoundError: a file is missing and cannot be fetched.
        ValueError: weights with another key, shape, or values that are not finite.
    """
    entry = CATALOGUE["imagereward"]
    file = locate(path, entry.files, entry.repo, revision)
    tokenize = bert_tokenizer(path)
    return image_reward_scorer(build(read_weights(file), file, device=device), tokenize, chunk=chunk)


def bert_tokenizer(path: str = "") -> Tokenize:
    """BERT's tokenizer with ImageReward's settings, from the folder `path` or from the hub."""
    from transformers import BertTokenizer

    place = Path(path).expanduser()
    local = path and any((place / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    try:
        tokenizer: Any = BertTokenizer.from_pretrained(str(place) if local else TOKENIZER)
    except Exception as error:  # OSError mostly; the hub's client has more
        raise FileNotFoundError(
            f"BERT's tokenizer ({TOKENIZER}) could not be fetched ({type(error).__name__}): put its vocab.txt and "
            "ImageReward.pt in one folder and name it, imagereward=FOLDER"
        ) from error

    def tokenize(prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return tokens.input_ids, tokens.attention_mask

    return tokenize


def build(
    weights: Mapping[str, Tensor],
    source: object,
    *,
    vision: Mapping[str, Any] = VISION,
    text: Mapping[str, Any] = TEXT,
    device: str | torch.device | None = None,
) -> ImageReward:
    """The network with ImageReward.pt's weights, in float32; tests give other sizes.

    Raises:
        ValueError: weights with another key, shape, or values that are not finite; with the first wrong key.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision_weights, text_weights, head = split_keys(weights, source)
    require_fit(head, head_shapes((text["hidden_size"], *WIDTHS[1:])), source)
    place = device_or_default(device)
    with torch.random.fork_rng(devices=[]):
        vision_model = BlipVisionModel(BlipVisionConfig(**vision))
        text_model = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
    return ImageReward(
        fill(vision_model, vision_weights, f"{source} (vision)", place),
        fill(text_model, text_weights, f"{source} (text)", place),
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
    """transformers' name of a weight of BLIP's vision tower; None if there is no such weight."""
    if key in _VISION_NAMES:
        return _VISION_NAMES[key]
    stem, _, kind = key.rpartition(".")
    if stem in _VISION_NAMES:
        return f"{_VISION_NAMES[stem]}.{kind}"
    block, _, layer = stem.removeprefix("blocks.").partition(".")
    if stem.startswith("blocks.") and block.isdecimal() and layer in _VISION_LAYERS:
        return f"encoder.layers.{block}.{_VISION_LAYERS[layer]}.{kind}"
    return None


def image_reward_scorer(model: ImageReward, tokenize: Tokenize, *, chunk: int = 32) -> Reward:
    """The network as a reward; one forward pass takes `chunk` pictures."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    size: Any = model.vision.config.image_size
    transform: Any = image_transform_v2(PreprocessCfg(size=size), is_train=False)  # CLIP's resize, crop and colours
    place = next(model.vision.parameters()).device

    def score_chunk(levels: Tensor, prompts: list[str]) -> Tensor:
        pixels = torch.stack([transform(picture) for picture in to_pil(levels)]).to(place)
        tokens, mask = (ids.to(place) for ids in tokenize(prompts))
        picture = model.vision(pixel_values=pixels).last_hidden_state
        states = model.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=picture).last_hidden_state
        return (apply_head(model.head, states[:, 0]) - MEAN) / STD

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        rows = range(0, len(prompts), chunk)
        return torch.cat([score_chunk(levels[i : i + chunk], prompts[i : i + chunk]) for i in rows])

    return of_levels(score)
