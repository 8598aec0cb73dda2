"""LoRA and full training: nothing changes at the start, alpha survives the file, an incomplete file is refused."""

import json
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers_machine import assert_rounded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_align.models import (
    add_lora,
    load_lora,
    load_pipeline,
    load_unet,
    reference,
    save_lora,
    save_unet,
    set_attention,
    trainable,
)
from diffusion_align.models.saved_weights import sort_header
from diffusion_align.rng import generator, normal
from diffusion_align.vocabulary import LORA_TARGETS

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def item(model):
    x = torch.randn(3, 4, 8, 8, generator=generator(0, "x"))
    return x, torch.tensor([1, 500, 999]), model.encode_text(["a red circle", "", "a blue square"])


def disturb(parameters, scale=0.05):
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.add_(normal(p.shape, 0, "disturb", i) * scale)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_policy_equals_reference_exactly_before_training(model, item, mode, half):
    parameters = add_lora(model.unet, 4, 8.0) if mode == "lora" else trainable(model.unet, "full")
    frozen = reference(model, mode)
    before = frozen(*item)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
        assert torch.equal(frozen(*item), model.predict(*item))
    # Where gradients flow torch may take another kernel for the same product of matrices.
    assert_rounded(model.predict(*item), before, depth=200)
    assert not frozen(*item).requires_grad
    disturb(parameters)
    assert torch.equal(frozen(*item), before)
    assert not torch.allclose(model.predict(*item), before, atol=1e-3)


def test_only_the_lora_gets_gradients_and_first_only_its_up_projections(model, item):
    parameters = add_lora(model.unet, 4)
    model.predict(*item).square().sum().backward()
    named = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    assert len(named) == len(parameters) and all("lora_" in name for name in named)
    # B is 0, so the output cannot yet depend on A, but does on B (Hu et al. 2021, sec. 4.1).
    assert not any(bool(p.grad.any()) for name, p in named.items() if "lora_A" in name)
    assert all(bool(p.grad.any()) for name, p in named.items() if "lora_B" in name)


def test_initial_weights_depend_on_seed_and_layer_and_are_gaussian(tiny_folder):
    models = [load_pipeline(tiny_folder, device="cpu") for _ in range(3)]
    first, same, other = (add_lora(g.unet, 8, seed=seed) for g, seed in zip(models, (3, 3, 4), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    downs = torch.cat([p.flatten() for n, p in models[0].unet.named_parameters() if "lora_A" in n]) * 8
    others = torch.cat([p.flatten() for n, p in models[2].unet.named_parameters() if "lora_A" in n]) * 8
    assert len(other) == len(first) and abs(torch.corrcoef(torch.stack([downs, others]))[0, 1]) < 0.05
    assert abs(downs.std() - 1) < 0.05 and abs(downs.mean()) < 0.05


@pytest.mark.parametrize("alpha", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("targets", [LORA_TARGETS["attention"], LORA_TARGETS["wide"]], ids=["attention", "wide"])
def test_plain_diffusers_reloads_the_same_function(model, item, tiny_folder, tmp_path, alpha, targets):
    disturb(add_lora(model.unet, 4, alpha, targets))
    expected = model.predict(*item).detach()
    save_lora(model.unet, tmp_path)
    ours = load_pipeline(tiny_folder, device="cpu")
    load_lora(ours, tmp_path)
    assert torch.equal(ours.predict(*item).detach(), expected)
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder)
    plain.load_lora_weights(tmp_path)
    x, t, text = item
    assert_rounded(plain.unet(x, t, text).sample, expected, depth=200)


def test_lora_weights_are_float32_on_a_half_precision_network(tiny_folder):
    model = load_pipeline(tiny_folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in add_lora(model.unet, 4)} == {torch.float32}
    with pytest.raises(ValueError, match="needs float32"):
        trainable(load_pipeline(tiny_folder, device="cpu", dtype=torch.bfloat16).unet, "full")


def test_wrong_arguments_are_refused(model):
    with pytest.raises(ValueError, match="at least 1"):
        add_lora(model.unet, 0)
    with pytest.raises(ValueError, match="no layer"):
        add_lora(model.unet, 4, targets=["to_nowhere"])
    add_lora(model.unet, 4)
    with pytest.raises(ValueError, match="already has a LoRA"):
        add_lora(model.unet, 4)
    with pytest.raises(ValueError, match="unknown mode"):
        trainable(model.unet, "half")
    with pytest.raises(ValueError, match="unknown mode"):
        reference(model, "half")


def spoil(path, change):
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=header)
    return path


def first(tensors):
    return sorted(tensors)[0]


FAULTS = {
    "prefix": lambda t: [t.__setitem__("text_encoder." + k, t.pop(k)) for k in list(t)],
    "one missing": lambda t: t.pop(first(t)),
    "half missing": lambda t: [t.pop(k) for k in sorted(t)[::2]],
    "all missing": lambda t: t.clear(),
    "extra": lambda t: t.__setitem__("unet.nowhere.lora.down.weight", torch.zeros(4, 4)),
    "shape": lambda t: t.__setitem__(first(t), torch.zeros(4, 5)),
    "rank": lambda t: [t.__setitem__(k, (t[k][:2] if "down" in k else t[k][:, :2]).contiguous()) for k in t],
    "nan": lambda t: t[first(t)].view(-1)[0].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_lora_changes_nothing(model, item, tiny_folder, tmp_path, fault):
    disturb(add_lora(model.unet, 4))
    spoil(save_lora(model.unet, tmp_path), FAULTS[fault])
    fresh = load_pipeline(tiny_folder, device="cpu")
    before = fresh.predict(*item)
    with pytest.raises(ValueError) as error:
        load_lora(fresh, tmp_path)
    assert str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)
    if fault not in ("all missing", "rank", "half missing"):
        assert "lora" in str(error.value).rsplit(FILE, 1)[1]  # the key
    assert torch.equal(fresh.predict(*item), before)


def test_truncated_and_missing_files_are_refused(model, tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="not there"):
        load_lora(model, tmp_path)
    add_lora(model.unet, 4)
    path = save_lora(model.unet, tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors"):
        load_lora(load_pipeline(tiny_folder, device="cpu"), tmp_path)


def test_the_header_holds_rank_and_alpha(model, tmp_path):
    add_lora(model.unet, 4, 16.0)
    with safe_open(save_lora(model.unet, tmp_path), "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["unet.r"] == 4 and header["unet.lora_alpha"] == 16.0


def test_a_file_without_header_loads_with_alpha_as_rank(model, item, tiny_folder, tmp_path):
    disturb(add_lora(model.unet, 4, 4.0))
    path = save_lora(model.unet, tmp_path)
    save_file(load_file(path), path)
    fresh = load_pipeline(tiny_folder, device="cpu")
    load_lora(fresh, tmp_path)
    assert torch.equal(fresh.predict(*item).detach(), model.predict(*item).detach())


def test_full_weights_round_trip_and_wrong_networks_are_refused(model, item, tiny_folder, tmp_path):
    disturb(trainable(model.unet, "full"), 0.01)
    save_unet(model.unet, tmp_path)
    fresh = load_pipeline(tiny_folder, device="cpu")
    load_unet(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.predict(*item), model.predict(*item))
    plain = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    x, t, text = item
    with torch.no_grad():
        assert torch.equal(plain(x, t, text).sample, model.predict(*item))
    with pytest.raises(FileNotFoundError, match="not there"):
        load_unet(fresh, tmp_path / "nowhere")
    with torch.no_grad():
        next(iter(model.unet.parameters())).view(-1)[0] = float("inf")
    save_unet(model.unet, tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        load_unet(fresh, tmp_path)


def test_loading_and_saving_warn_of_nothing(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model.unet, 2)
        save_lora(model.unet, tmp_path)


def test_a_refused_lora_leaves_the_plain_network(model, tiny_folder, tmp_path):
    add_lora(model.unet, 4)
    spoil(save_lora(model.unet, tmp_path), FAULTS["nan"])
    fresh = load_pipeline(tiny_folder, device="cpu")
    names = set(fresh.unet.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        load_lora(fresh, tmp_path)
    assert set(fresh.unet.state_dict()) == names  # so that save_unet writes keys which diffusers knows
    add_lora(fresh.unet, 4)


def test_modes_that_do_not_fit_the_network_are_refused(model):
    with pytest.raises(ValueError, match="no LoRA"):
        trainable(model.unet, "lora")
    with pytest.raises(ValueError, match="no LoRA"):
        reference(model, "lora")
    add_lora(model.unet, 4)
    with pytest.raises(ValueError, match="has a LoRA"):
        trainable(model.unet, "full")


def test_the_reference_changes_no_gradient_and_no_flag(model, item):
    parameters = add_lora(model.unet, 4)
    disturb(parameters)
    set_attention(model.unet, gradient_checkpointing=True)  # recomputes in backward, when the adapter must be on again
    gradients = []
    for between in (False, True):
        loss = model.predict(*item).square().sum()
        if between:
            reference(model, "lora")(*item)
        gradients.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.unet.requires_grad_(False)
    reference(model, "lora")(*item)
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_the_reference_works_on_a_wrapped_network(model, item):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, t, text, return_dict=True):
            return self.module(x, t, text, return_dict=return_dict)

    before = model.predict(*item)
    disturb(add_lora(model.unet, 4))
    model.unet = Wrapper(model.unet)
    assert model.latent_shape() == (4, 8, 8) and torch.equal(reference(model, "lora")(*item), before)


def with_settings(path, **settings):
    """Write further settings of peft into a file's header."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    header |= {f"unet.{key}": value for key, value in settings.items()}
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(header)})


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("use_dora", True, "lora_magnitude_vector of down_blocks"),
        ("rank_pattern", {"to_q": 2}, r"is \[4, 32\], not \[2, 32\], as rank 2 needs"),
        ("rank_pattern", {"to_q": "two"}, "unet.rank_pattern as .* table of numbers"),
        ("lora_bias", True, "unet.lora_bias to True, which is not supported"),
        ("alora_invocation_tokens", [1, 2], "unet.alora_invocation_tokens"),
        ("a_field_of_tomorrow", "on", "unet.a_field_of_tomorrow"),
        ("init_lora_weights", "pissa", "unet.init_lora_weights 'pissa', .* path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_4", "unet.init_lora_weights"),
        ("init_lora_weights", "olora", "unet.init_lora_weights"),
        ("peft_type", "ADALORA", "unet.peft_type 'ADALORA', which cannot be taken: merge it with peft"),
        ("peft_type", "LOHA", "does not give rank, alpha"),
    ],
)
def test_a_header_of_another_kind_of_lora_is_refused_by_its_field(model, tiny_folder, tmp_path, key, value, words):
    add_lora(model.unet, 4)
    path = save_lora(model.unet, tmp_path)
    with_settings(path, **{key: value})
    with pytest.raises(ValueError, match=words):
        load_lora(load_pipeline(tiny_folder, device="cpu"), tmp_path)


def test_fields_that_change_nothing_pass_and_rslora_is_another_strength(model, item, tiny_folder, tmp_path):
    disturb(add_lora(model.unet, 4, 6.0))
    path = save_lora(model.unet, tmp_path)
    nothing = {"alora_invocation_tokens": None, "a_field_of_tomorrow": False, "bias": "none", "lora_dropout": 0.1}
    with_settings(path, **nothing, megatron_core="megatron.core", init_lora_weights="gaussian", peft_version="9.9")
    plain, stabilised = (load_pipeline(tiny_folder, device="cpu") for _ in range(2))
    load_lora(plain, tmp_path)
    assert torch.equal(plain.predict(*item), model.predict(*item))
    with_settings(path, use_rslora=True)  # the strength is 6 / sqrt(4), so as alpha 12 of rank 4
    load_lora(stabilised, tmp_path)
    assert stabilised.unet.peft_config["default"].lora_alpha == 12


@pytest.mark.parametrize("fault", ["one missing", "nan", "shape"])
def test_damaged_full_weights_change_nothing(model, item, tmp_path, fault):
    path = save_unet(model.unet, tmp_path) / "diffusion_pytorch_model.safetensors"
    before = model.predict(*item)
    spoil(path, FAULTS[fault])
    with pytest.raises(ValueError) as error:
        load_unet(model, tmp_path)
    assert "conv_in.bias" in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(model.predict(*item), before)


def test_another_network_is_refused(model, tmp_path):
    with torch.random.fork_rng():
        wider = UNet2DConditionModel.from_config({**model.unet.config, "block_out_channels": (16, 48)})
        heads = UNet2DConditionModel.from_config({**model.unet.config, "attention_head_dim": 4})
    for other, words in ((wider, "the network wants"), (heads, "attention_head_dim is 4")):
        save_unet(other, tmp_path)
        with pytest.raises(ValueError, match=words):
            load_unet(model, tmp_path)


def test_equal_weights_make_equal_files(model, tmp_path):
    """safetensors writes a header's metadata in a random order; half of the 12 files would differ."""
    add_lora(model.unet, 4, 8.0)
    files = [save_lora(model.unet, tmp_path / str(i)) for i in range(12)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert file.metadata()["format"] == "pt" and len(file.metadata()) == 2
    assert sorted(path.name for path in files[0].parent.iterdir()) == [FILE]
    data = files[0].read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    raw = {"é": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    save_file(raw, tmp_path / "raw.safetensors", metadata={"z": '\u00e9 "quoted"\n', "a": "1", "format": "pt"})
    sort_header(tmp_path / "raw.safetensors")
    with safe_open(tmp_path / "raw.safetensors", "pt") as file:
        assert list(file.metadata().items()) and file.metadata() == {"z": '\u00e9 "quoted"\n', "a": "1", "format": "pt"}
    assert all(torch.equal(value, raw[name]) for name, value in load_file(tmp_path / "raw.safetensors").items())
