"""Training that starts from a trained LoRA: the start changes nothing, the reference keeps it, one file holds all."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers_machine import assert_rounded
from stress.lora.families import families
from stress.lora.faults import write
from stress.lora.kinds import KINDS, Dice

from diffusion_align.models import add_lora, apply_start, load_lora, merge_lora, reference, save_lora, save_with_start
from diffusion_align.models.lora.plain import OnlyMergeable
from diffusion_align.rng import normal

MODES = ("merge", "continue", "beneath")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return families(tmp_path_factory.mktemp("families"))


def fresh(family):
    model = family.fresh()
    model.text_encoder, model.second = copy.deepcopy(model.text_encoder), copy.deepcopy(model.second)
    return model


def kohya_file(family, path, kind="LoRA", layers=("attn1.to_q", "attn2.to_v"), text=True):
    """A kohya file for the UNet and the text encoders."""
    tensors = {}
    networks = {"lora_unet": family.model.unet}
    if text:
        first = "lora_te1_text_model" if family.model.second else "lora_te_text_model"
        networks[first] = family.model.text_encoder
        if family.model.second:
            networks["lora_te2_text_model"] = family.model.second.text_encoder
    for prefix, network in networks.items():
        for layer, module in network.named_modules():
            if layer.endswith((*layers, "mlp.fc1")):
                name = f"{prefix}_{layer.removeprefix('text_model.').replace('.', '_')}"
                parts = KINDS[kind].make(module.weight.detach(), Dice(prefix, layer))
                tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    return write(path, tensors)


def disturb(parameters):
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(normal(parameter.shape, 0, "disturb", i) * 0.1)


def begin(model, path, mode):
    start = apply_start(model, path, mode)
    if mode != "continue":
        add_lora(model.unet, 2, 3.0, ["to_q", "to_k"])
    return start, [p for p in model.unet.parameters() if p.requires_grad]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [0, 1], ids=["SD", "SDXL"])
@torch.no_grad()
def test_the_policy_starts_as_base_plus_lora_and_the_reference_stays_so(both, tmp_path, which, mode):
    family = both[which]
    path = kohya_file(family, tmp_path / "start.safetensors")
    merged = fresh(family)
    merge_lora(merged, path)
    model = fresh(family)
    _, trained = begin(model, path, mode)
    frozen = reference(model, "lora")
    before = frozen(*family.item)
    assert torch.equal(before, model.predict(*family.item))
    assert_rounded(before, family.answer(merged), depth=200)
    assert (before - family.plain).abs().max() > 1e-2
    texts = ["a red circle"]
    assert torch.equal(model.encode_text(texts), merged.encode_text(texts))
    assert model.fingerprint() == merged.fingerprint() != family.model.fingerprint()
    flags = [p.requires_grad for p in model.unet.parameters()]
    disturb(trained)
    assert torch.equal(frozen(*family.item), before)
    assert not torch.allclose(model.predict(*family.item), before, atol=1e-3)
    assert [p.requires_grad for p in model.unet.parameters()] == flags and sum(flags) == len(trained)


@pytest.mark.parametrize("mode", ["continue", "beneath"])
@pytest.mark.parametrize("which", [0, 1], ids=["SD", "SDXL"])
def test_one_file_holds_the_result_and_diffusers_loads_it(both, tmp_path, which, mode):
    family = both[which]
    model = fresh(family)
    start, trained = begin(model, kohya_file(family, tmp_path / "start.safetensors"), mode)
    disturb(trained)
    path = save_with_start(model.unet, start, tmp_path / "run")
    again = fresh(family)
    load_lora(again, path)
    assert_rounded(family.answer(again), family.answer(model), depth=200)
    assert torch.equal(again.encode_text(["a red circle"]), model.encode_text(["a red circle"]))
    assert again.unet.peft_config["default"].r == (3 if mode == "continue" else 5)
    kind = StableDiffusionXLPipeline if family.name == "SDXL" else StableDiffusionPipeline
    theirs = kind.from_pretrained(family.folder)
    with torch.random.fork_rng():  # diffusers draws weights before it fills them
        theirs.load_lora_weights(path.parent)
    other = fresh(family)
    other.unet, other.text_encoder = theirs.unet, theirs.text_encoder
    if other.second:
        other.second.text_encoder = theirs.text_encoder_2
    assert_rounded(family.answer(other), family.answer(model), depth=200)
    assert_rounded(other.encode_text(["a red circle"]), model.encode_text(["a red circle"]), depth=200)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT", "full", "IA3"])
def test_kinds_that_are_no_lora_can_only_be_merged(both, tmp_path, kind):
    path = kohya_file(both[0], tmp_path / "start.safetensors", kind)
    for mode in ("continue", "beneath"):
        model = fresh(both[0])
        with pytest.raises(OnlyMergeable, match="can be merged into the model"):
            apply_start(model, path, mode)
        assert torch.equal(both[0].answer(model), both[0].plain) and model.merged == ()
    assert apply_start(fresh(both[0]), path, "merge").kinds == [KINDS[kind].title]


def test_a_dora_is_continued_and_reloaded(both, tmp_path):
    model = fresh(both[0])
    start, trained = begin(model, kohya_file(both[0], tmp_path / "s.safetensors", "DoRA", text=False), "continue")
    frozen = reference(model, "lora")
    with torch.no_grad():
        assert torch.equal(frozen(*both[0].item), model.predict(*both[0].item))
    disturb(trained)
    again = fresh(both[0])
    load_lora(again, save_with_start(model.unet, start, tmp_path / "run"))
    assert_rounded(both[0].answer(again), both[0].answer(model), depth=200)


def test_a_dora_is_not_put_beneath_another(both, tmp_path):
    model = fresh(both[0])
    with pytest.raises(OnlyMergeable, match="only continued or merged"):
        apply_start(model, kohya_file(both[0], tmp_path / "s.safetensors", "DoRA", text=False), "beneath")
    assert torch.equal(both[0].answer(model), both[0].plain)


def test_a_file_for_text_encoders_only_is_merged_and_not_continued(both, tmp_path):
    path = kohya_file(both[0], tmp_path / "text.safetensors", layers=())
    with pytest.raises(ValueError, match="no tensor for the UNet, only for text_encoder"):
        apply_start(fresh(both[0]), path, "continue")
    model = fresh(both[0])
    assert apply_start(model, path, "merge").kinds == ["LoRA"]
    assert torch.equal(both[0].answer(model), both[0].plain)
    assert not torch.allclose(model.encode_text(["a"]), both[0].model.encode_text(["a"]), atol=1e-3)


def test_a_trained_dora_starts_as_the_base_and_reloads_here_and_in_diffusers(both, tmp_path):
    family, model = both[0], both[0].fresh()
    trained = add_lora(model.unet, 4, 6.0, ["to_q", "conv1"], dora=True)
    with torch.no_grad():
        assert torch.equal(reference(model, "lora")(*family.item), model.predict(*family.item))
    assert_rounded(family.answer(model), family.plain, depth=200)
    disturb(trained)
    path = save_lora(model.unet, tmp_path)
    again = family.fresh()
    load_lora(again, path)
    assert torch.equal(family.answer(again), family.answer(model))
    theirs = StableDiffusionPipeline.from_pretrained(family.folder)
    theirs.load_lora_weights(tmp_path)
    other = family.fresh()
    other.unet = theirs.unet
    assert_rounded(family.answer(other), family.answer(model), depth=200)
    merged = family.fresh()
    assert merge_lora(merged, path) == ["DoRA"]
    assert_rounded(family.answer(merged), family.answer(model), depth=200)
