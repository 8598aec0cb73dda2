"""ImageReward's port against the published network written out by hand, under the published names of its weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import BertTokenizer

from diffusion_align.rewards import to_uint8
from diffusion_align.rewards.aesthetic import WIDTHS, head_shapes
from diffusion_align.rewards.image_reward import (
    TEXT,
    VISION,
    bert_tokenizer,
    build,
    image_reward_scorer,
    load_image_reward,
    split_keys,
)

SMALL_VISION = VISION | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "image_size": 32}  # fmt: skip
SMALL_TEXT = TEXT | {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
                     "num_attention_heads": 3, "max_position_embeddings": 35, "encoder_hidden_size": 16}  # fmt: skip
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def shapes(vision=SMALL_VISION, text=SMALL_TEXT):
    """Keys and shapes of ImageReward.pt, from THUDM/ImageReward's vit.py and med.py."""
    d, f, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    w, g, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    patches = (vision["image_size"] // side) ** 2
    out = {
        "visual_encoder.cls_token": (1, 1, d),
        "visual_encoder.pos_embed": (1, patches + 1, d),
        "visual_encoder.patch_embed.proj.weight": (d, 3, side, side),
        "visual_encoder.patch_embed.proj.bias": (d,),
    }

    def linear(name, to, of):
        out.update({f"{name}.weight": (to, of), f"{name}.bias": (to,)})

    def norm(name, width):
        out.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for k in range(vision["num_hidden_layers"]):
        at = f"visual_encoder.blocks.{k}"
        norm(f"{at}.norm1", d)
        linear(f"{at}.attn.qkv", 3 * d, d)
        linear(f"{at}.attn.proj", d, d)
        norm(f"{at}.norm2", d)
        linear(f"{at}.mlp.fc1", f, d)
        linear(f"{at}.mlp.fc2", d, f)
    norm("visual_encoder.norm", d)
    out["text_encoder.embeddings.word_embeddings.weight"] = (text["vocab_size"], w)
    out["text_encoder.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], w)
    norm("text_encoder.embeddings.LayerNorm", w)
    for k in range(layers):
        at = f"text_encoder.encoder.layer.{k}"
        for kind, of in (("attention", w), ("crossattention", d)):
            linear(f"{at}.{kind}.self.query", w, w)
            linear(f"{at}.{kind}.self.key", w, of)
            linear(f"{at}.{kind}.self.value", w, of)
            linear(f"{at}.{kind}.output.dense", w, w)
            norm(f"{at}.{kind}.output.LayerNorm", w)
        linear(f"{at}.intermediate.dense", g, w)
        linear(f"{at}.output.dense", w, g)
        norm(f"{at}.output.LayerNorm", w)
    out = {f"blip.{key}": shape for key, shape in out.items()}
    return out | {f"mlp.{key}": shape for key, shape in head_shapes((w, *WIDTHS[1:])).items()}


def published(seed=0):
    """Seeded weights, with the unused ones of the published file."""
    source = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(shape, generator=source) * 0.2 for key, shape in shapes().items()}
    # Vision states of a small variance tell the two epsilons of layer norms apart.
    for key in weights:
        if key.startswith(("blip.visual_encoder.patch_embed", "blip.visual_encoder.cls", "blip.visual_encoder.pos")):
            weights[key] *= 0.01
    unused = {"blip.vision_proj.weight": torch.zeros(4, 16), "blip.text_proj.bias": torch.zeros(4)}
    return weights | unused | {"blip.text_encoder.embeddings.position_ids": torch.arange(35)[None]}


def by_hand(weights, pixels, tokens, mask):
    """Scores [B] in float64: BLIP's vision transformer, BERT with cross-attention, the head."""
    w = {key: weight.double() for key, weight in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attend(q, k, v, heads, seen=None):
        def split(x):
            return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

        scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)
        if seen is not None:
            scores = scores.masked_fill(seen[:, None, None] == 0, -math.inf)
        return (scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(q.shape)

    at = "blip.visual_encoder"
    patch = w[f"{at}.patch_embed.proj.weight"]
    x = F.unfold(pixels.double(), 16, stride=16).transpose(1, 2) @ patch.flatten(1).T + w[f"{at}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{at}.cls_token"].expand(len(x), 1, -1), x], 1) + w[f"{at}.pos_embed"]
    for k in range(2):
        q, key, v = linear(norm(x, f"{at}.blocks.{k}.norm1", 1e-6), f"{at}.blocks.{k}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, key, v, 4), f"{at}.blocks.{k}.attn.proj")
        inner = gelu(linear(norm(x, f"{at}.blocks.{k}.norm2", 1e-6), f"{at}.blocks.{k}.mlp.fc1"))
        x = x + linear(inner, f"{at}.blocks.{k}.mlp.fc2")
    seen = norm(x, f"{at}.norm", 1e-6)

    at = "blip.text_encoder"
    positions = w[f"{at}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = w[f"{at}.embeddings.word_embeddings.weight"][tokens] + positions
    y = norm(y, f"{at}.embeddings.LayerNorm", 1e-12)
    for k in range(3):
        layer = f"{at}.encoder.layer.{k}"
        for kind, other, where in (("attention", None, mask), ("crossattention", seen, None)):
            states = y if other is None else other
            q, key, v = (linear(z, f"{layer}.{kind}.self.{name}") for z, name in
                         ((y, "query"), (states, "key"), (states, "value")))  # fmt: skip
            out = linear(attend(q, key, v, 3, where), f"{layer}.{kind}.output.dense")
            y = norm(out + y, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        inner = linear(gelu(linear(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        y = norm(inner + y, f"{layer}.output.LayerNorm", 1e-12)
    score = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        score = linear(score, f"mlp.layers.{place}")
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tokenize(prompts):
    """[CLS] 2, a letter a token, [SEP] 3, padded with 0 to 35."""
    rows = [[2, *(4 + ord(letter) % 40 for letter in prompt[:33]), 3] for prompt in prompts]
    tokens = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return tokens, (tokens != 0).long()


PROMPTS = ["a cat", "two dogs on a red table", "", "x" * 60]


def pictures(n, size=(32, 32)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(3))


def test_network_equals_the_published_one():
    weights, images = published(), pictures(4)
    model = build(weights, "test", vision=SMALL_VISION, text=SMALL_TEXT, device="cpu")
    single = image_reward_scorer(model, tokenize, chunk=3)(images, PROMPTS)
    pixels = (to_uint8(images).double() / 255 - MEAN.double()) / STD.double()
    expected = by_hand(weights, pixels, *tokenize(PROMPTS))
    scale = expected.abs().max().item()

    # In float64 the networks agree to the rounding of the pixels, which stay float32: 2^-24 each, of values up to 2.3.
    seen = []

    def widen(module, args, given):
        seen.append(given["pixel_values"].double())
        return args, given | {"pixel_values": seen[-1]}

    model.vision.double().register_forward_pre_hook(widen, with_kwargs=True)
    head = {key: weight.double() for key, weight in model.head.items()}
    double = image_reward_scorer(replace(model, text=model.text.double(), head=head), tokenize, chunk=3)
    found = double(images, PROMPTS)  # and the score is rounded to float32 at the end
    torch.testing.assert_close(torch.cat(seen), pixels, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.double(), by_hand(weights, torch.cat(seen), *tokenize(PROMPTS)), rtol=1e-6, atol=0)

    # In float32, as it is run: about 60 products, each followed by a norm or a sum, of some ulps (1.2e-7) each. On one
    # processor they came to 5e-6 of the largest score, on another to 1.7e-5.
    torch.testing.assert_close(single.double(), expected, atol=3e-4 * scale, rtol=0)
    # Picture and prompt both count, well above the tolerance.
    swapped = by_hand(weights, pixels.flip(0), *tokenize(PROMPTS))
    assert (expected - swapped).abs().min() > 1e-3 * scale
    assert expected.std() > 1e-3 * scale


def test_it_keeps_the_interface_of_rewards():
    model = build(published(), "test", vision=SMALL_VISION, text=SMALL_TEXT, device="cpu")
    reward, images = image_reward_scorer(model, tokenize), pictures(3, (48, 40))
    base = reward(images, PROMPTS[:3])
    assert base.shape == (3,) and base.dtype == torch.float32 and not base.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images, PROMPTS[:3]), base)
    images[1, 0, 0, 0] = torch.nan
    assert reward(images, PROMPTS[:3]).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="B prompts"):
        reward(images, PROMPTS[:2])


def test_every_published_key_has_a_place_at_full_size():
    full = {key: torch.empty(shape, device="meta") for key, shape in shapes(VISION, TEXT).items()}
    vision, text, head = split_keys(full, "x")
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    with torch.device("meta"):
        eyes = BlipVisionModel(BlipVisionConfig(**VISION))
        reader = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
    for model, weights in ((eyes, vision), (reader, text)):
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert {key: tuple(weight.shape) for key, weight in head.items()} == head_shapes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"blip.visual_encoder.blocks.0.attn.q.bias": torch.zeros(1)}), "unknown key .*attn.q.bias"),
        (lambda w: w.update({"temp": torch.zeros(1)}), "unknown key 'temp' for ImageReward"),
        (lambda w: w.pop("mlp.layers.7.bias"), "key 'layers.7.bias' is missing"),
        (lambda w: w.pop("blip.visual_encoder.norm.bias"), r"\(vision\): key 'post_layernorm.bias' is missing"),
        (
            lambda w: w.update({"blip.text_encoder.pooler.dense.bias": torch.zeros(1)}),
            r"\(text\): unknown key 'pooler.dense.bias'",
        ),
        (lambda w: w["blip.visual_encoder.cls_token"].fill_(torch.inf), "'embeddings.class_embedding' is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    weights = published()
    change(weights)
    with pytest.raises(ValueError, match=message):
        build(weights, "ImageReward.pt", vision=SMALL_VISION, text=SMALL_TEXT, device="cpu")


def test_a_folder_brings_its_own_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]) + "\n")
    tokens, mask = bert_tokenizer(str(tmp_path))(["A cat", "cat " * 50])
    assert tokens.shape == mask.shape == (2, 35)
    assert tokens[0, :5].tolist() == [2, 5, 6, 3, 0] and mask[0].sum() == 4
    assert tokens[1, 0] == 2 and tokens[1, -1] == 3 and mask[1].all()
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda name: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(FileNotFoundError, match="vocab.txt and ImageReward.pt in one folder"):
        bert_tokenizer()


def test_a_file_loads_from_its_path(tmp_path, monkeypatch):
    from diffusion_align.rewards import image_reward

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]) + "\n")
    torch.save(published(), tmp_path / "ImageReward.pt")
    small = image_reward.build
    monkeypatch.setattr(
        image_reward, "build", lambda w, s, device: small(w, s, vision=SMALL_VISION, text=SMALL_TEXT, device=device)
    )
    assert load_image_reward(str(tmp_path), device="cpu")(pictures(2), ["a cat", "cat"]).isfinite().all()
