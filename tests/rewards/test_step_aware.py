"""The step-aware model against plain open_clip: equal before training, and with a modulation in open_clip's weights."""

import copy
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from helpers_machine import HANG, assert_rounded
from open_clip.transformer import Transformer
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_align import rng
from diffusion_align.rewards import clip_scorer
from diffusion_align.rewards.step_aware_load import latent_scorer, load_step_aware, step_aware_scorer
from diffusion_align.rewards.step_aware_model import (
    StepAware,
    save_step_aware,
    start_step_aware,
)
from diffusion_align.rewards.time_conditioned import (
    TimeConditioning,
    encode,
    fit_patches,
    picture_transform,
    sinusoid,
    take_latents,
)

WIDTH, SIDE, LAYERS = 32, 32, 2
VISION = {"image_size": SIDE, "patch_size": 8, "width": WIDTH, "layers": LAYERS, "head_width": 16}
TEXT = {"context_length": 6, "vocab_size": 50, "width": 24, "heads": 2, "layers": 1}
PREPROCESS = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
TOWERS = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.5},
    "average pool": {"pool_type": "avg"},
    "norm after pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "no norm before": {"no_ln_pre": True},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "patch dropout": {"patch_dropout": 0.5},
    "custom blocks": {"qk_norm": True, "scale_attn": True, "scale_fc": True, "scale_heads": True},
    "tokens first": {},
}


def make_clip(tower="plain", dtype=torch.float64):
    """An open_clip model whose every weight is random, zero-initialised biases too; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(16, VISION | TOWERS[tower], TEXT)
        if tower == "tokens first":
            turned = Transformer(WIDTH, LAYERS, WIDTH // 16, batch_first=False)
            turned.load_state_dict(clip.visual.transformer.state_dict())
            clip.visual.transformer = turned
        for weight in clip.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn_like(weight)
    return clip.to(dtype).eval()


def make_model(tower="plain", dtype=torch.float64, shaken=False, **settings):
    def tokenizer(prompts):
        rows = [[49, *[ord(c) % 40 for c in p[:3].ljust(3)], 48, 0] for p in prompts]
        return torch.tensor(rows)

    config = {"model_cfg": {}, "preprocess_cfg": PREPROCESS}
    model = StepAware(make_clip(tower, dtype), tokenizer, config, **settings).to(dtype)
    return shake(model) if shaken else model


def shake(model):
    """Give every modulation a random weight and bias."""
    with torch.no_grad():
        for number, weight in enumerate(model.time.parameters()):
            weight += 0.1 * rng.normal(weight.shape, 1, "shake", number, dtype=weight.dtype)
    return model


def pictures(n, side=SIDE, dtype=torch.float64):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(side), dtype=dtype)


def test_sinusoid_is_diffusers_own_and_by_hand():
    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(t), expected, atol=2e-5, rtol=0)
    # 4 dims: frequencies 1 and 1/100.
    by_hand = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    assert sinusoid(torch.tensor([3]), 4)[0].tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("tower", TOWERS)
def test_at_the_start_the_tower_is_open_clips_bit_for_bit_at_every_time(tower):
    visual = make_clip(tower).visual
    time = TimeConditioning(WIDTH, LAYERS).double()
    pixels = pictures(4) * 4 - 2
    with torch.no_grad():
        plain = visual(pixels)
        for t in ([0.0] * 4, [1.0, 250.5, 500.0, 999.0]):
            assert torch.equal(encode(visual, time, pixels, torch.tensor(t)), plain)
        # In training mode no patch is dropped, but torch computes attention another way, with other last bits.
        assert torch.allclose(encode(visual.train(), time, pixels, torch.tensor(t)), plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)


def test_untrained_model_scores_as_the_embedded_reward():
    """Against `clip_scorer`, whose pixels come from PIL: on 8-bit pictures the same numbers to float32's last bit."""
    model = start_step_aware("tiny", device="cpu")
    images = (pictures(6, 64, torch.float32) * 255).round() / 255
    prompts = ["a small red circle", "two large blue squares on a gray background", "?"] * 2
    scale = model.clip.logit_scale.exp().item()
    expected = clip_scorer("tiny", device="cpu", scale=scale)(images, prompts)
    for start in (0, 437):
        found = step_aware_scorer(model)(images, prompts, torch.arange(start, start + 6))
        torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)  # a cosine in float32, some 80 ulps
    assert torch.equal(found, step_aware_scorer("tiny-init", device="cpu")(images, prompts, torch.zeros(6)))
    assert expected.std() > 0.1


@pytest.mark.parametrize("tower", ["plain", "layer scale", "norm after pool", "custom blocks", "tokens first"])
def test_modulation_is_what_folds_into_open_clips_own_weights(tower):
    """At one time the modulation is constant. Then LN(x)(1+scale)+shift is a layer norm with other weights, and a gate
    multiplies the last Linear of its branch (or the norm after it): plain open_clip with these must agree."""
    model = make_model(tower, shaken=True)
    folded, pixels, t = copy.deepcopy(model.clip.visual), pictures(3), 437.0
    first, _, second = model.time.embed
    freqs = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    wave = torch.cat([(t * freqs).cos(), (t * freqs).sin()])
    # The model's sinusoid is float32: 437 times a frequency that is off by some ulps. The rest is compared in float64.
    single = sinusoid(torch.tensor([t]))[0].double()
    torch.testing.assert_close(single, wave, rtol=0, atol=437 * 8 * 2**-24)
    wave = single
    hidden = F.silu(second.weight @ F.silu(first.weight @ wave + first.bias) + second.bias)

    def refit(norm, shift, scale):
        norm.weight.data, norm.bias.data = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift

    with torch.no_grad():
        for block, linear in zip(folded.transformer.resblocks, model.time.blocks, strict=True):
            row = (linear.weight @ hidden + linear.bias).view(6, WIDTH)
            refit(block.ln_1, row[0], row[1])
            refit(block.ln_2, row[3], row[4])
            last = block.ln_attn if tower == "custom blocks" else block.attn.out_proj
            for layer, gate in ((last, row[2]), (block.mlp.c_proj, row[5])):
                layer.weight.mul_(gate[:, None] if layer.weight.ndim == 2 else gate)
                layer.bias.mul_(gate)
        refit(folded.ln_post, *(model.time.final.weight @ hidden + model.time.final.bias).view(2, WIDTH))
        expected, plain = folded(pixels), model.clip.visual(pixels)
        found = encode(model.clip.visual, model.time, pixels, torch.full((3,), t))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - plain).abs().max() > 0.1


def test_score_by_hand_and_each_row_at_its_own_time():
    model = make_model(shaken=True)
    images, prompts, t = pictures(4), ["ab", "cd", "ab", "x"], torch.tensor([0, 100, 500, 900])
    found = model(images, prompts, t)
    pixels = (images - torch.tensor(PREPROCESS["mean"]).view(3, 1, 1)) / torch.tensor(PREPROCESS["std"]).view(3, 1, 1)
    for row in range(4):
        a = encode(model.clip.visual, model.time, pixels[row : row + 1], t[row : row + 1])[0]
        b = model.clip.encode_text(model.tokenizer(prompts[row : row + 1]))[0]
        cosine = (a @ b) / (a.norm() * b.norm())
        assert found[row].item() == pytest.approx((model.clip.logit_scale.exp() * cosine).item(), rel=1e-6)
    assert torch.allclose(model(images, model.tokenizer(prompts), t), found, rtol=1e-12)
    assert not torch.allclose(model(images, prompts, t.flip(0)), found, rtol=1e-3)


def test_gradients_are_right_and_reach_pictures_and_all_weights():
    model = make_model(shaken=True)
    images, t = pictures(2).requires_grad_(), torch.tensor([10, 800])
    weights = [model.time.blocks[0].bias, model.time.final.weight, model.clip.visual.class_embedding]

    def score(*_):
        return model(images, ["ab", "cd"], t)

    score().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in model.parameters())
    assert torch.autograd.gradcheck(score, (images, *weights), fast_mode=True)


def test_gradients_are_not_zero_at_the_start():
    """If the embedding were zero, neither it nor the zero weights after it would get a gradient."""
    model = make_model()
    model(pictures(2), ["ab", "cd"], torch.tensor([10, 800])).sum().backward()
    assert all(linear.weight.grad.abs().sum() > 0 for linear in (*model.time.blocks, model.time.final))
    assert torch.equal(model.time.embed[0].weight, make_model().time.embed[0].weight)
    assert not torch.equal(model.time.embed[0].weight, make_model(seed=1).time.embed[0].weight)


def test_without_a_resize_pixels_are_open_clips_up_to_the_rounding():
    transform = picture_transform((SIDE, SIDE), PREPROCESS)
    config = open_clip.transform.PreprocessCfg(size=SIDE, **PREPROCESS)
    of_files = open_clip.transform.image_transform_v2(config, is_train=False)
    images = pictures(2)
    levels = (images * 255).round()
    files = [Image.fromarray(picture.permute(1, 2, 0).numpy().astype(np.uint8)) for picture in levels]
    expected = torch.stack([of_files(file) for file in files]).double()
    assert torch.allclose(transform(levels / 255), expected, atol=1e-6)
    assert (transform(images) - expected).abs().max() <= 0.5001 / 255 / min(PREPROCESS["std"])


@pytest.mark.parametrize(("mode", "height", "width"), [("shortest", 80, 48), ("shortest", 20, 24), ("squash", 40, 80)])
def test_with_a_resize_pixels_are_near_to_open_clips(mode, height, width):
    """Filters agree. PIL rounds and clips between its two passes, so levels (of 255) differ by one or two; by more at
    single pixels of noise, where the resampling overshoots."""
    config = PREPROCESS | {"resize_mode": mode}
    of_files = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=(SIDE, SIDE), **config), is_train=False
    )
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise[..., :4, :4], size=(height, width), mode="bilinear")
    for picture, largest, mean in ((smooth, 2, 0.5), (noise, 30, 0.5)):
        levels = (picture * 255).round()
        file = Image.fromarray(levels[0].permute(1, 2, 0).numpy().astype(np.uint8))
        gap = picture_transform((SIDE, SIDE), config)(levels / 255)[0] - of_files(file)
        gap = (gap * torch.tensor(PREPROCESS["std"]).view(3, 1, 1) * 255).abs()
        assert gap.max() < largest and gap.mean() < mean


def test_saved_folder_loads_exactly_without_other_files(tmp_path):
    model = shake(start_step_aware("tiny", device="cpu"))
    images, prompts, t = (
        pictures(3, 64, torch.float32),
        ["a red circle", "two blue squares", "?"],
        torch.arange(3) * 400,
    )
    save_step_aware(model, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = load_step_aware(tmp_path / "b", device="cpu")
    assert torch.equal(again(images, prompts, t), model(images, prompts, t))
    assert torch.equal(step_aware_scorer(tmp_path / "b", device="cpu")(images, prompts, t), model(images, prompts, t))
    assert {path.suffix for path in (tmp_path / "b").iterdir()} == {".json", ".safetensors"}
    assert not again.training and all(p.requires_grad for p in again.parameters())
    save_step_aware(again, tmp_path / "c")
    assert torch.equal(load_step_aware(tmp_path / "c", device="cpu")(images, prompts, t), model(images, prompts, t))


def test_loading_is_strict(tmp_path):
    save_step_aware(start_step_aware("tiny", device="cpu"), tmp_path)
    file = tmp_path / "step_aware.safetensors"
    good = load_file(file)
    shorter = {name: weight for name, weight in good.items() if name != "time.final.bias"}
    broken = good | {"time.final.bias": torch.full_like(good["time.final.bias"], math.nan)}
    for weights, message in ((shorter, "Missing key"), (good | {"x": torch.ones(1)}, "Unexpected"), (broken, "finite")):
        save_file(weights, file)
        with pytest.raises(ValueError, match=message):
            load_step_aware(tmp_path, device="cpu")
    file.write_bytes(b"not a file")
    with pytest.raises(ValueError, match="does not fit"):
        load_step_aware(tmp_path, device="cpu")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no step_aware.safetensors"):
        load_step_aware(tmp_path, device="cpu")


def test_saved_config_states_what_the_model_name_implies(tmp_path):
    """An architecture with a tag may imply QuickGELU and open_clip's own tokenizer."""
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}, "quick_gelu": True}
    (tmp_path / "Step-Test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Step-Test.json")
    with torch.random.fork_rng(devices=[]):
        torch.save(open_clip.create_model("Step-Test").state_dict(), tmp_path / "weights.pt")
    model = start_step_aware(f"Step-Test:{tmp_path / 'weights.pt'}", device="cpu")
    again = load_step_aware(save_step_aware(model, tmp_path / "saved"), device="cpu")
    images, t = pictures(2, SIDE, torch.float32), torch.tensor([1, 2])
    assert torch.equal(again(images, ["a cat", "a dog"], t), model(images, ["a cat", "a dog"], t))
    assert type(again.clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_scorer_chunks_keeps_rows_apart_and_has_no_gradient():
    model = make_model(shaken=True, dtype=torch.float32)
    images, prompts, t = pictures(5, 40, torch.float32), ["ab", "cd", "ab", "x", "y"], torch.arange(5) * 200
    score = step_aware_scorer(model, chunk=2)
    found = score(images, prompts, t)
    assert_rounded(found, model(images, prompts, t), depth=60)
    assert found.dtype == torch.float32 and not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(images, prompts, t), found)
    images[1, 0, 0, 0], images[3, 0, 0, 0] = math.nan, math.inf
    spoilt = score(images, prompts, t)
    assert spoilt.isnan().tolist() == [False, True, False, True, False]
    assert_rounded(spoilt[[0, 2, 4]], found[[0, 2, 4]], depth=60)
    assert score(images[:0], [], t[:0]).shape == (0,)
    for wrong in ((images, prompts[:4], t), (images, prompts, t[:4]), (images[:, :2], prompts, t), (images[0], [], t)):
        with pytest.raises(ValueError, match="expected"):
            score(*wrong)


def test_a_latent_tower_fitted_to_a_linear_decoder_is_the_picture_tower():
    """If latents are the pictures, shifted and scaled by channel, the fit must find the old convolution."""
    visual = make_clip().visual
    images = pictures(16)
    latents, pixels = (images - 0.3) * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1), images * 4 - 2
    old = copy.deepcopy(visual)
    take_latents(visual, (3, SIDE, SIDE))
    assert visual.conv1.weight.shape == old.conv1.weight.shape  # the same grid and the same patches
    assert torch.equal(visual.positional_embedding, old.positional_embedding)
    assert not torch.allclose(visual(latents), old(pixels), atol=0.1)
    fit_patches(visual.conv1, latents, old.conv1(pixels))
    assert torch.allclose(visual(latents), old(pixels), atol=1e-8)
    with pytest.raises(ValueError, match="more examples"):
        fit_patches(visual.conv1, latents[:8], old.conv1(pixels[:8]))


def test_positions_are_resampled_where_the_grid_changes():
    """A side of 5 becomes 5 rows and one of 6 becomes 3 columns, nearest to the tower's 4 x 4. Positions that are a
    plane, 1 + 2y + 5x over the unit square, keep its middle, 4.5, and its slopes: 5 * 2/3 and 2 * 4/5 end to end."""
    visual = make_clip().visual
    middle = (torch.arange(4).double() + 0.5) / 4
    visual.positional_embedding.data[1:] = (1 + 2 * middle[:, None] + 5 * middle).flatten()[:, None]
    token = visual.positional_embedding[0].clone()
    take_latents(visual, (4, 5, 6))
    assert visual.grid_size == (5, 3) and visual.conv1.kernel_size == visual.conv1.stride == (1, 2)
    found = visual.positional_embedding[1:, 0].view(5, 3)
    assert found[2, 1].item() == pytest.approx(4.5)
    assert (found[2, 2] - found[2, 0]).item() == pytest.approx(10 / 3, abs=0.3)
    assert (found[4, 1] - found[0, 1]).item() == pytest.approx(8 / 5, abs=0.2)
    assert torch.equal(visual.positional_embedding[0], token)
    assert visual(pictures(2, 6)[:, :1, :5].expand(-1, 4, -1, -1)).shape == (2, 16)


def test_latent_models_load_score_and_refuse_pictures(tmp_path):
    shape = (4, 16, 16)
    examples = (rng.normal((40, *shape), 0, "latents"), pictures(40, 64, torch.float32))
    fitted = start_step_aware("tiny", device="cpu", latents=shape, examples=examples)
    random = start_step_aware("tiny", device="cpu", latents=shape)
    latents, prompts, t = examples[0][:3], ["a red circle", "two blue squares", "?"], torch.arange(3) * 400
    assert not torch.allclose(fitted(latents, prompts, t), random(latents, prompts, t), atol=1e-3)
    again = load_step_aware(save_step_aware(shake(fitted), tmp_path), device="cpu")
    assert torch.equal(again(latents, prompts, t), fitted(latents, prompts, t))
    assert torch.equal(latent_scorer(tmp_path, device="cpu")(latents, prompts, t), fitted(latents, prompts, t))
    with pytest.raises(ValueError, match=r"expected \[B,4,16,16\]"):
        again(pictures(3, 64, torch.float32), prompts, t)
    again(latents, prompts, t).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_a_latent_scorer_of_a_picture_model_decodes_first():
    model = make_model(dtype=torch.float32, shaken=True)
    latents = pictures(2, SIDE, torch.float32)
    score = latent_scorer(model, decode=lambda z: 1 - z)
    t = torch.tensor([5, 6])
    assert torch.equal(score(latents, ["a", "b"], t), step_aware_scorer(model)(1 - latents, ["a", "b"], t))
    with pytest.raises(ValueError, match="reads pictures: give decode"):
        latent_scorer(model)


def test_unsupported_towers_are_refused():
    for vision, message in (
        ({"attentional_pool": True}, "attentional pooling"),
        ({"pool_type": "none"}, "pooling 'none'"),
        ({"layers": (1, 1, 1, 1), "width": 16}, "ModifiedResNet"),
    ):
        with torch.random.fork_rng(devices=[]):
            clip = open_clip.CLIP(16, VISION | vision, TEXT)
        with pytest.raises(ValueError, match=message):
            StepAware(clip, lambda p: torch.zeros(1), {"preprocess_cfg": PREPROCESS})
    with pytest.raises(ValueError, match="longest"):
        picture_transform((32, 32), {"resize_mode": "longest"})
    with pytest.raises(ValueError, match="only squares"):
        picture_transform((32, 48), {})


def test_open_clip_is_not_imported_with_the_module():
    code = "import sys, diffusion_align.rewards.step_aware_model; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG).returncode == 0
