"""LAION's aesthetic head: the arithmetic by hand, the published file by its digest, CLIP's embedding by its norm."""

import numpy as np
import pytest
import torch
from helpers_machine import assert_rounded
from helpers_rewards import make_clip_folder, pictures

from diffusion_align.rewards import aesthetic, to_uint8
from diffusion_align.rewards.aesthetic import FILE, WIDTHS, aesthetic_scorer, apply_head, head_shapes, load_aesthetic
from diffusion_align.rewards.clip import open_clip_model

NARROW = (16, 5, 4, 3, 2, 1)


def head(widths=WIDTHS, seed=0, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=source, dtype=dtype) / 4 for key, shape in head_shapes(widths).items()}


def test_the_head_is_five_linear_layers():
    weights = head(NARROW, dtype=torch.float64)
    features = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    by_hand, negative = features.numpy(), []
    for place in (0, 2, 4, 6, 7):
        by_hand = by_hand @ weights[f"layers.{place}.weight"].numpy().T + weights[f"layers.{place}.bias"].numpy()
        negative.append(bool((by_hand < 0).any()))
    np.testing.assert_allclose(apply_head(weights, features).numpy(), by_hand[:, 0], rtol=1e-12)
    assert all(negative[:4])  # a rectifier would change them


def test_keys_and_shapes_are_those_of_the_published_file():
    assert head_shapes() == {
        "layers.0.weight": (1024, 768), "layers.0.bias": (1024,), "layers.2.weight": (128, 1024),
        "layers.2.bias": (128,), "layers.4.weight": (64, 128), "layers.4.bias": (64,), "layers.6.weight": (16, 64),
        "layers.6.bias": (16,), "layers.7.weight": (1, 16), "layers.7.bias": (1,),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


def test_the_score_is_the_head_of_a_normalised_embedding(folder):
    clip, weights, images = open_clip_model(folder, device="cpu"), head(NARROW), pictures(5, (40, 32))
    with torch.no_grad():
        raw = clip.model.encode_image(clip.prepare(to_uint8(images)))
    assert (raw.norm(dim=-1) - 1).abs().min() > 0.05
    expected = apply_head(weights, raw / raw.norm(dim=-1, keepdim=True))
    reward = aesthetic_scorer(clip, weights, chunk=2)
    assert_rounded(reward(images, ["a"] * 5), expected, depth=60)
    assert torch.equal(reward(images, ["a"] * 5), reward(images, ["b", "c", "d", "e", ""]))  # prompts are not read
    images[2, 0, 0, 0] = torch.inf
    assert reward(images, ["a"] * 5).isnan().tolist() == [False, False, True, False, False]


def test_a_head_of_another_width_than_the_clip_is_refused(folder):
    with pytest.raises(ValueError, match="the head reads 768 numbers, not the 16 of this CLIP"):
        aesthetic_scorer(open_clip_model(folder, device="cpu"), head())


def test_published_file_must_have_the_published_digest(tmp_path, monkeypatch):
    torch.save(head(), tmp_path / FILE)
    with pytest.raises(ValueError, match="is not the file that was published: its sha256 is"):
        load_aesthetic(str(tmp_path), device="cpu")
    # The digest of a head under another name is not checked, its keys and shapes are.
    torch.save(head(), tmp_path / "mine.pth")
    opened = []
    monkeypatch.setattr(aesthetic, "open_clip_model", lambda source, device: opened.append(source))
    monkeypatch.setattr(aesthetic, "aesthetic_scorer", lambda clip, weights, chunk: weights)
    assert set(load_aesthetic(str(tmp_path / "mine.pth"), device="cpu")) == set(head_shapes())
    torch.save(head() | {"layers.8.bias": torch.zeros(1)}, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match="unknown key 'layers.8.bias'"):
        load_aesthetic(str(tmp_path / "mine.pth"), device="cpu")
    assert opened == ["ViT-L-14-quickgelu:openai"]


def test_a_folder_may_hold_the_clip_as_well(tmp_path, monkeypatch):
    torch.save(head(), tmp_path / FILE)
    (tmp_path / "open_clip_config.json").write_text("{}")
    opened = []
    monkeypatch.setattr(aesthetic, "require_digest", lambda path, sha256: None)
    monkeypatch.setattr(aesthetic, "open_clip_model", lambda source, device: opened.append(source))
    monkeypatch.setattr(aesthetic, "aesthetic_scorer", lambda clip, weights, chunk: weights)
    load_aesthetic(str(tmp_path), device="cpu")
    assert opened == [str(tmp_path)]
