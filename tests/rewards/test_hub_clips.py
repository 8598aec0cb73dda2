"""PickScore, HPS and CLIPScore from files in their published layout, at toy size, against transformers' CLIP."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from diffusion_align.rewards import load, to_uint8
from diffusion_align.rewards.clip import clip_of
from diffusion_align.rewards.clip_keys import from_transformers
from diffusion_align.rewards.load import hps, load_reward, pickscore

NAME = "Toy-H"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 3},
}
PROMPTS = ["a small red circle", "two large blue squares", "", "a cat & a <dog>"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(autouse=True, scope="module")
def architecture(tmp_path_factory):
    path = tmp_path_factory.mktemp("architectures") / f"{NAME}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def reference():
    """A CLIPModel with PickScore's layout at toy size; every bias, norm and scale has a value of its own."""
    common = {"num_attention_heads": 2, "projection_dim": 16, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**common, "num_hidden_layers": 3, "vocab_size": 49408, "hidden_size": 24, "intermediate_size": 96,
                     "max_position_embeddings": 77, "eos_token_id": 49407},
        vision_config={**common, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 128, "image_size": 28,
                       "patch_size": 14},
        projection_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return model


def published(model):
    return {key: weight.detach().clone().contiguous() for key, weight in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """PickScore_v1's folder, counters of old releases included."""
    path = tmp_path_factory.mktemp("PickScore_v1")
    weights = published(reference)
    weights |= {"text_model.embeddings.position_ids": torch.arange(77)[None],
                "vision_model.embeddings.position_ids": torch.arange(5)[None]}  # fmt: skip
    save_file(weights, path / "model.safetensors")
    return path


def pictures(n, size=(28, 28), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def embeddings(model, images):
    pixels = (to_uint8(images).float() / 255 - MEAN) / STD
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(NAME)(PROMPTS)
        text = model.get_text_features(input_ids=tokens).pooler_output
        image = model.get_image_features(pixel_values=pixels).pooler_output
    return image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)


def test_converted_embeddings_are_those_of_transformers(reference):
    clip = clip_of(NAME, from_transformers(published(reference)), source="test", device="cpu")
    images = pictures(4)
    image, text = embeddings(reference, images)
    torch.testing.assert_close(clip.embed_pictures(to_uint8(images), 3), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_prompts(PROMPTS, 3), text, atol=1e-5, rtol=0)
    # Agreement is not trivial: the embeddings differ between pictures and between prompts.
    assert (image @ image.T).min() < 0.999 and (text @ text.T).min() < 0.9


def test_pickscore_is_the_scaled_cosine(reference, folder):
    images = pictures(4)
    image, text = embeddings(reference, images)
    expected = float(reference.logit_scale.detach().exp()) * (image * text).sum(-1)
    reward = pickscore(str(folder), device="cpu", architecture=NAME)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-4, rtol=0)
    assert abs(float(reference.logit_scale.detach().exp()) - 1) > 5


def test_pickscore_takes_safetensors_before_a_pickle(reference, folder, tmp_path):
    torch.save({"whatever": 1}, folder / "pytorch_model.bin")
    pickscore(str(folder), device="cpu", architecture=NAME)
    (folder / "pytorch_model.bin").unlink()
    torch.save(published(reference), tmp_path / "pytorch_model.bin")
    pickscore(str(tmp_path), device="cpu", architecture=NAME)
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors, pytorch_model.bin"):
        pickscore(str(tmp_path / ".."), device="cpu", architecture=NAME)


@pytest.fixture
def hps_file(reference, tmp_path):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    halved = {key: weight.half() for key, weight in from_transformers(published(reference)).items()}
    torch.save({"epoch": 1, "name": "x", "state_dict": halved}, path)
    return path


def test_hps_is_the_plain_cosine_of_a_training_checkpoint(reference, hps_file):
    images = pictures(4)
    image, text = embeddings(reference, images)
    scores = hps("hpsv2.1", str(hps_file), device="cpu", architecture=NAME)(images, PROMPTS)
    torch.testing.assert_close(scores, (image * text).sum(-1), atol=5e-3, rtol=0)  # the weights were stored in float16
    assert scores.dtype == torch.float32


def test_hps_pads_what_is_not_square_and_pickscore_crops_it(hps_file, folder, monkeypatch):
    seen = []

    def encode_image(model, pixels, normalize):
        seen.append(pixels)
        return torch.ones(len(pixels), 16)

    monkeypatch.setattr(open_clip.CLIP, "encode_image", encode_image)
    white = torch.ones(1, 3, 28, 56)
    hps("hpsv2.1", str(hps_file), device="cpu", architecture=NAME)(white, ["x"])
    pickscore(str(folder), device="cpu", architecture=NAME)(white, ["x"])
    padded, cropped = seen
    black, full = (0 - MEAN) / STD, (1 - MEAN) / STD
    assert padded.shape == cropped.shape == (1, 3, 28, 28)
    torch.testing.assert_close(padded[0, :, 0], black[:, :, 0].expand(3, 28))
    torch.testing.assert_close(padded[0, :, 14], full[:, :, 0].expand(3, 28))
    torch.testing.assert_close(cropped[0], full.expand(3, 28, 28))


def test_names_load_the_right_reward(monkeypatch, folder, hps_file, tmp_path):
    calls = []
    monkeypatch.setattr(load, "CLIP_H", NAME)
    for name in ("pickscore", "hps", "load_aesthetic", "load_image_reward"):
        monkeypatch.setattr(load, name, lambda *args, name=name, **kw: calls.append((name, *args, kw.get("revision"))))
    monkeypatch.setattr(load, "clip_scorer", lambda source, **kw: calls.append((source, kw.get("scale"))))
    texts = [
        f"pickscore={folder}", "pickscore@abc", "hpsv2", f"hpsv2.1={hps_file}", "aesthetic", "imagereward@v1",
        "clipscore", f"clipscore={hps_file}", f"clipscore={folder}", "ViT-B-32:x",
    ]  # fmt: skip
    for text in texts:
        load_reward(text, device="cpu")
    assert calls == [
        ("pickscore", str(folder), None), ("pickscore", "", "abc"), ("hps", "hpsv2", "", None),
        ("hps", "hpsv2.1", str(hps_file), None), ("load_aesthetic", "", None), ("load_image_reward", "", "v1"),
        ("ViT-L-14-quickgelu:openai", 100.0), (f"ViT-L-14-quickgelu:{hps_file}", 100.0), (str(folder), 100.0),
        ("ViT-B-32:x", None),
    ]  # fmt: skip


def test_openai_weights_get_the_activation_they_were_trained_with(monkeypatch):
    asked = {}

    def create(name, pretrained, device, force_quick_gelu):
        asked[name, pretrained] = force_quick_gelu
        raise KeyboardInterrupt

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for source in ("ViT-L-14:openai", "ViT-L-14:laion2b_s32b_b82k", "ViT-L-14:weights.pt"):
        with pytest.raises(KeyboardInterrupt):
            load.clip_scorer(source, device="cpu")
    assert list(asked.values()) == [True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual_projection.weight"), "key 'visual.proj' is missing"),
        (lambda w: w.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"), "has only q, v of q, k and v"),
        (lambda w: w.update({"text_model.extra": torch.zeros(1)}), "unknown key 'text_model.extra'"),
        (
            lambda w: w.update({"vision_model.encoder.layers.0.mlp.fc3.bias": torch.zeros(1)}),
            "unknown key 'vision_model.encoder.layers.0.mlp.fc3.bias'",
        ),
        (
            lambda w: w.update({"vision_model.encoder.layers.7.mlp.fc1.bias": torch.zeros(1)}),
            "unknown key 'visual.transformer.resblocks.7.mlp.c_fc.bias'",
        ),
        (lambda w: w.update({"logit_scale": torch.zeros(2)}), r"'logit_scale' has shape \[2\], not \[\]"),
        (lambda w: w["visual_projection.weight"].fill_(torch.nan), "'visual.proj' is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_wrong_key(reference, tmp_path, change, message):
    weights = published(reference)
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        pickscore(str(tmp_path), device="cpu", architecture=NAME)
    assert "model.safetensors" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_without_network_or_cache_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="model.safetensors of yuvalkirstain/PickScore_v1 could not be fetched.*"
                       "HF_HUB_OFFLINE is set.*NAME=PATH") as caught:  # fmt: skip
        load_reward("pickscore", device="cpu")
    assert len(str(caught.value).splitlines()) == 1
