"""A random Stable-Diffusion-format folder small enough to be built and run inside a test.

    folder = make_tiny_folder(tmp_path / "model")          # about 0.2 M random weights, 32x32 pictures, 4x8x8 latents
    model = load_pipeline(folder)

Every part has the classes and file names of a Stable Diffusion 1.5 folder, so plain diffusers loads it too.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 32
LATENT_SHAPE = (4, 8, 8)
TEXT_SHAPE = (16, 32)  # tokens, width
WORDS = (
    "a an and the one two three small large red green blue yellow circle square triangle cross left right above below "
    "of on in gray white black background"
).split()


def tiny_tokenizer() -> CLIPTokenizer:
    """Each of WORDS is one token, all else is bytes. `<|endoftext|>` has the highest id, where CLIP pools."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *("".join(merge) for merge in merges)])
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_SHAPE[0])


def make_tiny_folder(path: str | Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a random pipeline ("epsilon" or "v_prediction") to `path` and return it. Same seed, same weights."""
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_SHAPE[1],
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_SHAPE[0],
        projection_dim=TEXT_SHAPE[1],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(text)
        unet = UNet2DConditionModel(
            sample_size=LATENT_SHAPE[1],
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_SHAPE[1],
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=RESOLUTION,
        )
    # The betas of Stable Diffusion 1.5.
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return Path(path)
