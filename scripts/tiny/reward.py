"""Stage 3: the reward, a small CLIP in open_clip's format, trained on captions and on simulated choices of people.

Half of every batch is contrastive: rendered pictures against the batch's captions and one caption with a single wrong
word. The other half is preferences, as for PickScore: two of the base model's own pictures for one prompt, of which the
judge chooses the better; a few choices are flipped. So the reward knows the model's pictures, and errs as real ones do.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffusion_align.rng import generator
from diffusion_align.shapes import Thing, parse
from diffusion_align.shapes.caption import BACKGROUNDS, COLOURS, COUNT_WORDS, RELATIONS, SHAPES, SIZES

from .fit import fit
from .unet import tokenize

RENDERED, PAIRS = 48, 32  # per batch
FLIPPED = 0.1  # fraction of choices that contradict the judge
TEMPERATURE = 1 / 20


def new_clip(seed: int, tokenizer: CLIPTokenizer) -> tuple[open_clip.CLIP, dict]:
    """The network and its open_clip model config."""
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32},
        "text_cfg": {
            "context_length": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "width": 64,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "local",  # any name: open_clip reads the tokenizer from the folder
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(**config), config


def wrong_caption(text: str, rng: np.random.Generator) -> str:
    """The caption with exactly one attribute changed."""
    caption = parse(text)

    def other(words: tuple[str, ...], word: str) -> str:
        return str(rng.choice([w for w in words if w != word]))

    def change(thing: Thing, attribute: str) -> Thing:
        words = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}[attribute]
        return dataclasses.replace(thing, **{attribute: other(words, getattr(thing, attribute))})

    choices = ["size", "colour", "shape", "background"] + (["relation"] if caption.relation else ["count"])
    attribute = str(rng.choice(choices))
    if attribute == "background":
        return str(dataclasses.replace(caption, background=other(BACKGROUNDS, caption.background)))
    if attribute == "relation":
        return str(dataclasses.replace(caption, relation=other(RELATIONS, caption.relation or "")))
    if attribute == "count":
        counts = [n for n in COUNT_WORDS if n != caption.count]
        return str(dataclasses.replace(caption, count=int(rng.choice(counts))))
    if caption.second and rng.random() < 0.5:
        return str(dataclasses.replace(caption, second=change(caption.second, attribute)))
    return str(dataclasses.replace(caption, first=change(caption.first, attribute)))


def train_clip(
    folder: Path,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    pictures: Tensor,
    prompts: list[str],
    own: Tensor,
    marks: Tensor,
    *,
    seed: int,
    steps: int,
) -> tuple[open_clip.CLIP, dict]:
    """`pictures [N,3,64,64]` uint8 show `captions`; `own [P,K,3,64,64]` uint8 are K samples for each of P `prompts`,
    with the judge's `marks [P,K]` (the fraction of attributes that are right)."""
    model, config = new_clip(seed, tokenizer)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    tokens, prompt_tokens = tokenize(tokenizer, captions), tokenize(tokenizer, prompts)
    choices = [(p, i, j) for p in range(len(own)) for i in range(own.shape[1]) for j in range(own.shape[1])]
    choices = torch.tensor([(p, i, j) for p, i, j in choices if marks[p, i] > marks[p, j]])
    if not len(choices):
        raise ValueError("the judge tells no two pictures of a prompt apart: the model has not learnt to draw")

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, "reward", step)
        words = np.random.default_rng([seed, step])
        rows = torch.randint(len(pictures), (RENDERED,), generator=rng)
        wrong = tokenize(tokenizer, [wrong_caption(captions[row], words) for row in rows])
        p, better, worse = choices[torch.randint(len(choices), (PAIRS,), generator=rng)].unbind(1)
        flip = torch.rand(PAIRS, generator=rng) < FLIPPED
        better, worse = torch.where(flip, worse, better), torch.where(flip, better, worse)

        shown = torch.cat([pictures[rows], own[p, better], own[p, worse]]).float() / 255
        image = model.encode_image((shown - mean) / std, normalize=True)
        text = model.encode_text(torch.cat([tokens[rows], wrong, prompt_tokens[p]]), normalize=True)
        picture, best, worst = image.split([RENDERED, PAIRS, PAIRS])
        right, false, prompt = text.split([RENDERED, RENDERED, PAIRS])
        truth = torch.arange(RENDERED)
        contrast = F.cross_entropy(picture @ right.T / TEMPERATURE, truth)
        contrast = contrast + F.cross_entropy(right @ picture.T / TEMPERATURE, truth)
        hard = F.softplus(-((picture * (right - false)).sum(-1)) / TEMPERATURE).mean()
        chosen = F.softplus(-((best - worst) * prompt).sum(-1) / TEMPERATURE).mean()
        return contrast / 2 + hard + chosen

    fit("reward", folder, {"reward": model}, loss_at, steps=steps, learning_rate=1e-3)
    return model, config


def save_clip(model: open_clip.CLIP, config: dict, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A folder that open_clip loads by `local-dir:`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")
    tokenizer.save_pretrained(folder)
