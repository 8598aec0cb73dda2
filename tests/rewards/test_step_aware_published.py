"""SPO's own file layout at toy size, against the authors' forward pass in plain torch on the file's keys."""

import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers_rewards import pictures
from safetensors.torch import save_file

from diffusion_align.rewards import step_aware_load
from diffusion_align.rewards.step_aware_load import (
    latent_scorer,
    load_step_aware,
    step_aware_scorer,
    step_aware_weights,
)
from diffusion_align.rewards.step_aware_model import save_step_aware

NAME = "Toy-SPM"
WIDTH, TEXT, SIDE, PATCH, LAYERS, EMBED = 32, 24, 28, 14, 2, 16
CONFIG = {
    "embed_dim": EMBED,
    "vision_cfg": {"image_size": SIDE, "layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT, "heads": 2, "layers": LAYERS},
}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
PROMPTS = ["a small red circle", "two blue squares", "a cat"]


def shapes():
    """Keys and shapes of the authors' StepAwarePreferenceModel: those of CLIPModel, and the added ones."""

    def linear(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def block(name, width):
        found = norm(f"{name}.layer_norm1", width) | norm(f"{name}.layer_norm2", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{name}.self_attn.{part}", width, width)
        return found | linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)

    vision, text = "vision_model", "text_model"
    found = {
        "logit_scale": (),
        f"{text}.embeddings.token_embedding.weight": (49408, TEXT),
        f"{text}.embeddings.position_embedding.weight": (77, TEXT),
        f"{vision}.embeddings.class_embedding": (WIDTH,),
        f"{vision}.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        f"{vision}.embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual_projection.weight": (EMBED, WIDTH),
        "text_projection.weight": (EMBED, TEXT),
    }
    found |= norm(f"{text}.final_layer_norm", TEXT)
    found |= norm(f"{vision}.pre_layrnorm", WIDTH) | norm(f"{vision}.post_layernorm", WIDTH)
    for i in range(LAYERS):
        found |= block(f"{text}.encoder.layers.{i}", TEXT) | block(f"{vision}.encoder.layers.{i}", WIDTH)
        found |= linear(f"{vision}.encoder.layers.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    found |= linear(f"{vision}.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    found |= linear("t_embedder.mlp.0", WIDTH, 256) | linear("t_embedder.mlp.2", WIDTH, WIDTH)
    return {f"model.{key}": shape for key, shape in found.items()}


@pytest.fixture(scope="module")
def weights():
    draw = torch.Generator().manual_seed(3)
    found = {key: 0.3 * torch.randn(shape, generator=draw) for key, shape in shapes().items()}
    found["model.logit_scale"] = torch.tensor(math.log(100.0))
    return found


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    """As torch.save writes it, with the counters of old releases of transformers."""
    folder = tmp_path_factory.mktemp("published")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    counters = {
        "model.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    path = folder / "sd-v1-5_step-aware_preference_model.bin"
    torch.save({**weights, **counters}, path)
    return path


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(step_aware_load, "ARCHITECTURE", NAME)


class Authors:
    """get_preference_score of the authors' code on one file's keys, float64, without transformers or open_clip."""

    def __init__(self, weights):
        self.w = {key.removeprefix("model."): weight.double() for key, weight in weights.items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def attention(self, name, x, heads, mask):
        batch, tokens, width = x.shape

        def split(part):
            return self.linear(f"{name}.{part}", x).view(batch, tokens, heads, width // heads).transpose(1, 2)

        q, k, v = map(split, ("q_proj", "k_proj", "v_proj"))
        weight = (q @ k.transpose(2, 3) / math.sqrt(width // heads) + mask).softmax(-1)
        return self.linear(f"{name}.out_proj", (weight @ v).transpose(1, 2).reshape(batch, tokens, width))

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def picture(self, images, t):
        """Pictures [B,3,H,W] in [-1, 1], as the authors have them."""
        scale = SIDE / min(images.shape[2:])
        size = [int(length * scale + 0.5) for length in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        top, left = ((length - SIDE) // 2 for length in size)
        images = ((images[..., top : top + SIDE, left : left + SIDE] / 2 + 0.5).clamp(0, 1) - MEAN) / STD
        patches = F.conv2d(images, self.w["vision_model.embeddings.patch_embedding.weight"], stride=PATCH)
        x = patches.flatten(2).transpose(1, 2)
        first = self.w["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.w["vision_model.embeddings.position_embedding.weight"]
        x = self.norm("vision_model.pre_layrnorm", x)
        angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        when = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
        when = F.silu(self.linear("t_embedder.mlp.2", F.silu(when)))
        for i in range(LAYERS):
            name = f"vision_model.encoder.layers.{i}"
            parts = self.linear(f"{name}.adaLN_modulation.1", when)[:, None].chunk(6, -1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
            inner = self.norm(f"{name}.layer_norm1", x) * (1 + scale) + shift
            x = x + gate * self.attention(f"{name}.self_attn", inner, 2, 0)
            x = x + gate_mlp * self.mlp(
                f"{name}.mlp", self.norm(f"{name}.layer_norm2", x) * (1 + scale_mlp) + shift_mlp
            )
        pooled = self.norm("vision_model.post_layernorm", x[:, 0])
        shift, scale = self.linear("vision_model.adaLN_modulation.1", when).chunk(2, -1)
        return self.linear("visual_projection", pooled * (1 + scale) + shift)

    def text(self, tokens):
        x = self.w["text_model.embeddings.token_embedding.weight"][tokens]
        x = x + self.w["text_model.embeddings.position_embedding.weight"]
        mask = torch.full((77, 77), -math.inf, dtype=torch.float64).triu(1)
        for i in range(LAYERS):
            name = f"text_model.encoder.layers.{i}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.layer_norm1", x), 2, mask)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.layer_norm2", x))
        x = self.norm("text_model.final_layer_norm", x)
        return self.linear("text_projection", x[torch.arange(len(x)), tokens.argmax(-1)])

    def score(self, images, prompts, t):
        tokens = open_clip.get_tokenizer(NAME)(prompts)
        a, b = F.normalize(self.picture(images, t), dim=-1), F.normalize(self.text(tokens), dim=-1)
        return self.w["logit_scale"].exp() * (a * b).sum(-1)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (56, 84)])
def test_a_published_file_scores_as_the_authors_forward(file, weights, size):
    """Scores are 100 cosines, in float64 on both sides: 1e-3 would be a cosine of 1e-5."""
    images, t = pictures(3, size).double(), torch.tensor([0, 400, 951])
    model = load_step_aware(file, device="cpu").double()
    with torch.no_grad():
        found = model(images, PROMPTS, t)
        expected = Authors(weights).score(images * 2 - 1, PROMPTS, t)
    assert torch.allclose(found, expected, atol=1e-3, rtol=0), (found, expected)
    assert found.std() > 1 and not torch.allclose(found, model(images, PROMPTS, t.flip(0)), atol=0.1)


def test_time_text_and_scale_all_come_from_the_file(file, weights):
    """Each group of weights in the file changes the score."""
    images, t = pictures(3, (28, 28)), torch.tensor([0, 400, 951])
    plain = step_aware_scorer(file, device="cpu")(images, PROMPTS, t)
    for group in ("t_embedder", "layers.1.adaLN_modulation", "vision_model.adaLN", "text_model", "logit_scale"):
        other = {k: 0.9 * v if group in k else v for k, v in weights.items()}
        path = file.parent / "changed.safetensors"
        save_file(other, path)
        assert not torch.allclose(step_aware_scorer(path, device="cpu")(images, PROMPTS, t), plain, atol=1e-2), group
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, path)
    assert torch.equal(step_aware_scorer(path, device="cpu")(images, PROMPTS, t), plain)


def test_published_model_is_saved_as_a_folder_with_its_resize(file, tmp_path):
    images, t = pictures(3, (64, 64)), torch.tensor([0, 400, 951])
    model = load_step_aware(file, device="cpu")
    save_step_aware(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_step_aware(tmp_path, device="cpu")(images, PROMPTS, t), model(images, PROMPTS, t))
    score = latent_scorer(file, decode=lambda z: F.interpolate(z[:, :3].clamp(0, 1), size=64), device="cpu")
    assert score(torch.zeros(3, 4, 8, 8), PROMPTS, t).shape == (3,)


def test_wrong_files_are_refused_in_one_line(file, weights, tmp_path):
    def refused(changed, message, name="x.bin"):
        torch.save(changed, tmp_path / name)
        with pytest.raises(ValueError, match=message) as error:
            load_step_aware(tmp_path / name, device="cpu")
        assert "\n" not in str(error.value)

    linear = "model.vision_model.encoder.layers.0.adaLN_modulation.1.weight"
    refused({k: v for k, v in weights.items() if k != linear}, "time.blocks.0.weight' is missing")
    refused({**weights, linear: torch.zeros(3, WIDTH)}, r"has shape \[3, 32\], not \[192, 32\]")
    refused({**weights, linear: torch.full((6 * WIDTH, WIDTH), math.nan)}, "is not finite")
    refused({**weights, "model.vision_model.what": torch.zeros(1)}, "unknown key")
    refused({k: v for k, v in weights.items() if "text_model" not in k}, "is missing")
    plain = {k: v for k, v in weights.items() if "adaLN" not in k and "t_embedder" not in k}
    refused(plain, "not a step-aware preference model as SPO's authors publish it")
    refused({"model.logit_scale": print}, "does not hold weights alone")
    with pytest.raises(FileNotFoundError, match="known by name: spo-sd15, spo-sdxl"):
        load_step_aware(tmp_path / "absent.bin", device="cpu")


def test_a_name_is_fetched_from_the_authors_repository(file, monkeypatch):
    asked = []

    def hub_file(repo, name, revision=None):
        asked.append((repo, name))
        return file

    monkeypatch.setattr(step_aware_load, "hub_file", hub_file)
    assert step_aware_weights("spo-sdxl") == file
    assert asked == [
        ("SPO-Diffusion-Models/Step-Aware_Preference_Models", "sdxl_step-aware_preference_model.bin"),
    ]


def test_train_spo_identifies_a_published_file_by_its_content(file, tmp_path):
    from diffusion_align.data.disk import digest
    from diffusion_align.methods.spo import require, weights_digest
    from diffusion_align.options import TrainSpo

    require(TrainSpo(preference_model=str(file)))
    require(TrainSpo())
    assert weights_digest(str(file)) == digest(file.read_bytes())
    for wrong in (tmp_path, tmp_path / "absent.bin"):
        with pytest.raises(FileNotFoundError, match="spo-sd15, spo-sdxl"):
            require(TrainSpo(preference_model=str(wrong)))
