"""The CLIP reward against transformers' own CLIP, against hand arithmetic, its preprocessing against open_clip's."""

import io
import json
import math
import shutil

import numpy as np
import open_clip
import pytest
import torch
from helpers_machine import HANG
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusion_align.data.images import encode_png
from diffusion_align.rewards import clip_scorer, spec, to_uint8
from diffusion_align.rewards.clip import _tells_colours

WIDTH, TEXT_WIDTH, LAYERS, EMBED, LENGTH = 32, 24, 2, 16, 20
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
# A cosine in float32: some 20 products of up to 64 terms each, some of an ulp of 1 (1.2e-7) a product.
COSINE = 1e-5
PROMPTS = ["a small red circle", "two large blue squares", "a cat & a <dog>", "", "ünïcode 😀"]


def make_clip_folder(path, *, seed=0, image_size=32):
    """An open_clip folder with random weights and a byte-level vocabulary, so no character is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[("r", "e"), ("re", "d</w>")])  # type: ignore
    tokenizer.save_pretrained(path)
    vision = {"image_size": image_size, "patch_size": 8, "width": WIDTH, "layers": LAYERS, "head_width": 16}
    text = {"context_length": LENGTH, "vocab_size": len(tokens), "width": TEXT_WIDTH, "heads": 2, "layers": LAYERS}
    model_cfg = {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = open_clip.CLIP(**model_cfg).state_dict()
        # Zero-initialised biases would hide a bias in the wrong place.
        for key, weight in weights.items():
            if key.endswith(("bias", "ln_final.weight")):
                weight += 0.05 * torch.randn_like(weight)
    save_file({k: v.contiguous() for k, v in weights.items()}, path / "open_clip_model.safetensors")
    text["hf_tokenizer_name"] = "in this folder"
    preprocess = {"mean": MEAN, "std": STD}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder):
    return clip_scorer(folder, device="cpu", chunk=2)


def pictures(n, size=(32, 32), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def transformers_clip(folder):
    """The same weights in transformers' CLIPModel, an implementation that shares no code with open_clip."""
    w = load_file(folder / "open_clip_model.safetensors")
    vocabulary = w["token_embedding.weight"].shape[0]
    common = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "projection_dim": EMBED, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**common, "vocab_size": vocabulary, "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH,
                     "max_position_embeddings": LENGTH, "eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2,
                     "pad_token_id": vocabulary - 1},
        vision_config={**common, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": 32,
                       "patch_size": 8},
        projection_dim=EMBED,
    )  # fmt: skip
    out = {
        "logit_scale": w["logit_scale"],
        "visual_projection.weight": w["visual.proj"].T,
        "text_projection.weight": w["text_projection"].T,
        "vision_model.embeddings.class_embedding": w["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": w["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": w["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": w["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": w["positional_embedding"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}  # fmt: skip
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for k in range(LAYERS):
        for source, target in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            old, new = f"{source}.resblocks.{k}", f"{target}.encoder.layers.{k}"
            norms |= {f"{old}.{a}": f"{new}.{b}" for a, b in parts.items()}
            for kind in ("weight", "bias"):
                for name, part in zip("qkv", w[f"{old}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    out[f"{new}.self_attn.{name}_proj.{kind}"] = part
    for old, new in norms.items():
        out |= {f"{new}.weight": w[f"{old}.weight"], f"{new}.bias": w[f"{old}.bias"]}
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(config).eval()
    model.load_state_dict(out, strict=True)
    return model


def test_scores_equal_those_of_transformers_clip(folder, scorer):
    images = pictures(len(PROMPTS))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    levels = to_uint8(images).float() / 255
    pixels = (levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        reference = transformers_clip(folder)(input_ids=tokens, pixel_values=pixels)
        expected = (reference.image_embeds * reference.text_embeds).sum(-1)
    torch.testing.assert_close(scorer(images, PROMPTS), expected, atol=COSINE, rtol=0)
    assert expected.std() > 0.01  # so that agreement is not trivial


def spy_on_pixels(monkeypatch):
    """A list that collects the inputs of the image tower."""
    seen = []

    def encode_image(model, pixels, normalize):
        seen.append(pixels)
        return torch.ones(len(pixels), EMBED)

    monkeypatch.setattr(open_clip.CLIP, "encode_image", encode_image)
    return seen


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 80), (33, 31), (24, 24)])
def test_the_pixels_that_the_model_sees_are_open_clips_own(folder, monkeypatch, size):
    seen = spy_on_pixels(monkeypatch)
    with torch.random.fork_rng(devices=[]):
        _, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    rng = np.random.default_rng(sum(size))
    raw = rng.integers(0, 256, (24, *size, 3), dtype=np.uint8)
    clip_scorer(folder, device="cpu")(torch.from_numpy(raw).permute(0, 3, 1, 2) / 255, ["x"] * 24)
    expected = torch.stack([transform(Image.fromarray(picture)) for picture in raw])
    assert torch.equal(torch.cat(seen), expected)


def test_preprocessing_without_resize_is_plain_arithmetic(folder, monkeypatch):
    seen = spy_on_pixels(monkeypatch)
    level = torch.zeros(1, 3, 32, 32)
    level[:, 1] = 51 / 255  # 0.2
    clip_scorer(folder, device="cpu")(level, ["x"])
    expected = [(0 - 0.48) / 0.27, (0.2 - 0.46) / 0.26, (0 - 0.41) / 0.28]
    assert seen[0].amax((0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_saved_png_scores_exactly_as_the_picture_in_memory(scorer, tmp_path):
    images = pictures(6, seed=3) * 1.2 - 0.1
    back = []
    for i, levels in enumerate(to_uint8(images)):
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        back.append(torch.from_numpy(np.array(Image.open(tmp_path / f"{i}.png"))).permute(2, 0, 1) / 255)
    assert torch.equal(scorer(images, ["a"] * 6), scorer(torch.stack(back), ["a"] * 6))


def test_levels_are_those_of_the_png_writer():
    images = torch.cat([pictures(40, (64, 64)), (torch.arange(3 * 64 * 64) / 510 % 1).view(1, 3, 64, 64)])
    for levels, picture in zip(to_uint8(images), images, strict=True):
        written = np.array(Image.open(io.BytesIO(encode_png(picture))))
        assert np.array_equal(levels.permute(1, 2, 0).numpy(), written)


def test_levels_are_rounded_and_clamped():
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 7.0, math.nan, math.inf, -math.inf])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255, 0, 255, 0]
    with pytest.raises(ValueError, match="floating point"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


def test_scale_multiplies_the_cosine_and_chunks_and_order_do_not_matter(folder, scorer):
    images = pictures(5)
    base = scorer(images, PROMPTS)
    assert base.dtype == torch.float32 and base.shape == (5,) and not base.requires_grad
    hundred = clip_scorer(folder, device="cpu", scale=100.0)(images, PROMPTS)
    torch.testing.assert_close(hundred, 100 * base, rtol=0, atol=100 * COSINE)
    torch.testing.assert_close(scorer(images.flip(0), PROMPTS[::-1]).flip(0), base, rtol=0, atol=COSINE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(images, PROMPTS), base)
    assert scorer(images[:0], []).shape == (0,)


def test_a_prompt_shared_by_several_pictures_is_encoded_once(folder, monkeypatch):
    rows = []
    original = open_clip.CLIP.encode_text
    monkeypatch.setattr(
        open_clip.CLIP, "encode_text", lambda m, t, normalize: (rows.append(len(t)), original(m, t, normalize))[1]
    )
    score = clip_scorer(folder, device="cpu")
    grouped = score(pictures(6), ["a", "b", "a", "b", "a", "a"])
    assert sum(rows) == 2
    torch.testing.assert_close(grouped[2], score(pictures(6)[2:3], ["a"])[0], atol=COSINE, rtol=0)


def test_a_picture_that_is_not_finite_scores_nan_and_changes_no_other_score(scorer):
    images = pictures(3)
    clean = scorer(images, ["a"] * 3)
    images[1, 0, 0, 0] = math.nan
    assert torch.equal(scorer(images, ["a"] * 3).isnan(), torch.tensor([False, True, False]))
    assert torch.equal(scorer(images, ["a"] * 3)[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(("shape", "prompts"), [((2, 3, 8), 2), ((2, 1, 8, 8), 2), ((2, 3, 8, 8), 3)])
def test_wrong_shapes_are_refused(scorer, shape, prompts):
    with pytest.raises(ValueError, match="prompts"):
        scorer(torch.zeros(shape), ["x"] * prompts)


def test_sources_as_open_clip_names(folder, monkeypatch, tmp_path):
    assert spec.resolve_source(folder) == (f"local-dir:{folder}", None)
    assert spec.resolve_source("hf-hub:owner/name") == ("hf-hub:owner/name", None)
    assert spec.resolve_source("ViT-H-14:laion2b_s32b_b79k") == ("ViT-H-14", "laion2b_s32b_b79k")
    monkeypatch.setattr(spec, "TINY_FOLDER", folder)
    assert spec.resolve_source("tiny") == (f"local-dir:{folder}", None)
    with pytest.raises(ValueError, match="needs weights"):
        spec.resolve_source("ViT-H-14")
    with pytest.raises(ValueError, match="not an open_clip folder"):
        spec.resolve_source(tmp_path)
    monkeypatch.setattr(spec, "TINY_FOLDER", tmp_path / "none")
    with pytest.raises(ValueError, match="build_tiny"):
        spec.resolve_source("tiny")


def test_an_architecture_with_a_weight_file_loads(folder, monkeypatch, scorer, tmp_path):
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    (tmp_path / "Tiny-Test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Tiny-Test.json")
    torch.save({"state_dict": load_file(folder / "open_clip_model.safetensors")}, tmp_path / "weights.pt")
    other = clip_scorer(f"Tiny-Test:{tmp_path / 'weights.pt'}", device="cpu")(pictures(2), PROMPTS[:2])
    assert other.isfinite().all()  # the preprocessing differs (no mean in an architecture), so the numbers do


def test_broken_weights_are_refused(tmp_path):
    path = make_clip_folder(tmp_path)
    weights = load_file(path / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = math.nan
    save_file(weights, path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="not finite: visual.proj is the first"):
        clip_scorer(path, device="cpu")
    (path / "open_clip_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="could not be loaded"):
        clip_scorer(path, device="cpu")


def test_open_clip_is_not_imported_with_the_package():
    import subprocess
    import sys

    code = "import sys, diffusion_align.rewards; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG).returncode == 0


def test_colours_that_a_clip_does_not_tell_are_said_to_be_assumed(folder, tmp_path, caplog):
    """A folder without mean and deviation, and a bare file; a folder that has them says nothing."""
    words = "those of OpenAI's CLIP are assumed"
    clip_scorer(folder, device="cpu")
    assert words not in caplog.text
    silent = shutil.copytree(folder, tmp_path / "silent")
    config = json.loads((silent / "open_clip_config.json").read_text())
    for left in ({}, {"mean": MEAN}):
        (silent / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": left}))
        caplog.clear()
        images, prompts = pictures(2), ["red", "re"]
        scores = clip_scorer(silent, device="cpu")(images, prompts)
        assert caplog.text.count(words) == 1 and str(silent) in caplog.text
    assert (scores - clip_scorer(folder, device="cpu")(images, prompts)).abs().max() > 1e-4  # it matters
    assert not _tells_colours("ViT-B-32", str(folder / "open_clip_model.safetensors"))
    assert _tells_colours("ViT-B-32", "openai") and _tells_colours("hf-hub:owner/name", None)
