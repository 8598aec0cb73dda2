"""Every method on a device that has no float64: numbers that need it are made on the CPU."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers_device import DEVICE, There, move, without_float64
from helpers_memory import full
from helpers_online import METHODS, Toy
from helpers_tiny import RESOLUTION, make_tiny_folder
from helpers_train import BETA, SCHEDULE, make_run, train_pairs, train_rankings

from diffusion_align import rng
from diffusion_align.evaluation.distances import cmmd, diversity, frechet, kid
from diffusion_align.methods.shared import pair_losses
from diffusion_align.models import load_pipeline
from diffusion_align.objectives import gain_weights, hinge, ipo, logistic, prdp, prdp_clip_fraction, rank_dpo, robust
from diffusion_align.rewards import to_uint8
from diffusion_align.rewards.interface import of_levels, standardised
from diffusion_align.samplers import sample, step_table


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_pipeline(make_tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def device():
    with without_float64():
        yield


def test_the_stand_in_refuses_what_such_a_device_refuses():
    x = torch.ones(3).to(DEVICE)
    assert x.device == DEVICE and (2 * x).device == DEVICE and x.cpu().device.type == "cpu"
    for fault in (
        x.double, lambda: torch.ones(3, dtype=torch.float64).to(DEVICE), lambda: x.to(torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.tensor(1.0, dtype=torch.float64, device=DEVICE),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="no such numbers"):
            fault()
    for fault in (lambda: x + torch.ones(3), lambda: torch.stack([x, torch.ones(3)]), lambda: torch.ones(3)[x.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            fault()
    with pytest.raises(TypeError, match="copy it to the CPU"):
        x.numpy()
    assert (x + torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float32 and x.cpu().double().sum() == 3
    weight = torch.nn.Parameter(x)
    (weight.square().sum() * 2).backward()
    assert weight.grad.cpu().tolist() == [4.0, 4.0, 4.0]


class ToyThere(Toy):
    def __init__(self, **more):
        super().__init__(**more)
        for calls in (self.policy_calls, self.reference_calls):
            move(calls.network)
        self.parameters = [self.network.up, self.network.down]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)

    def texts(self, samples):
        prompts, text = super().texts(samples)
        return prompts, text.to(DEVICE)


@pytest.mark.parametrize("name", [*METHODS, "prdp-clip"])
def test_online_methods(name):
    """Two steps, with memory that runs out, so that predictions are made anew as well."""
    toy = ToyThere(order=2, steps=4)
    more = {"fresh": False, "clip": 0.1, "mean": True} if name == "prdp-clip" else {}
    if name == "ddpo":
        more = {"kl_weight": 0.01}
    method = toy.method(name.removesuffix("-clip"), **more)
    network = toy.policy_calls.network
    # Of SPO's parents five go through the network at a time.
    most = 4 if name == "spo" else 8
    toy.policy_calls.network = lambda x, t, text: (
        full() if torch.is_grad_enabled() and len(x) > most else network(x, t, text)
    )
    settings = {"prompts_per_chunk": 4, "passes": 1 if name == "prdp" else 2, "max_steps": 2}
    records = list(toy.rounds(method, accelerator=There(Accelerator(cpu=True)), **settings))
    assert [record.updated for record in records] == [True, True] and records[-1].progress.halvings >= 1
    assert all(p.device == DEVICE and p.cpu().isfinite().all() for p in toy.parameters)


LOSSES = {
    "sigmoid": pair_losses.on_margin(partial(logistic, beta=BETA)),
    "robust": pair_losses.on_margin(partial(robust, beta=BETA, flip=0.1)),
    "hinge": pair_losses.on_margin(partial(hinge, beta=BETA)),
    "ipo": pair_losses.on_margin(partial(ipo, beta=BETA)),
    "sdpo": pair_losses.on_margin(partial(logistic, beta=BETA), keep=0.9),
    "kto": pair_losses.kto_of_pairs(BETA),
    "mapo": pair_losses.mapo_of_pairs(BETA, 1000),
    "dspo": pair_losses.dspo_of_pairs(BETA, 0.1),
}


def offline_settings(**more):
    run = make_run(max_steps=2, batch_size=4, **more)
    policy, reference = move(run.network), move(run.reference)
    parameters = [policy.up, policy.down]
    return run.settings | {
        "predict_policy": policy, "predict_reference": reference, "parameters": parameters, "lr_scheduler": None,
        "optimizer": torch.optim.AdamW(parameters, lr=1e-3), "accelerator": There(Accelerator(cpu=True)),
        "caption_dropout": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_pairs(loss):
    records = list(train_pairs(**offline_settings(loss=LOSSES[loss], weights=[0.5] * 10)))
    assert [record.updated for record in records] == [True, True]


@pytest.mark.parametrize("one_graph", [False, True])
def test_rankings(one_graph):
    settings = offline_settings() | {
        "relevance": [[1.0, 0.5]] * 10, "loss": partial(rank_dpo, beta=1.0), "pair_weights": gain_weights,
    }  # fmt: skip
    settings["cache"].lengths = [2] * 10
    records = list(train_rankings(**settings, one_graph=one_graph))
    assert [record.updated for record in records] == [True, True]


@pytest.mark.parametrize("solver", [("ddim", 1), ("dpmpp", 2)])
def test_a_real_model_draws_and_encodes(solver, loaded):
    """The same pictures as on the CPU: every stage of the model, pictures in, pictures out."""
    model = copy.copy(loaded)
    table = step_table(model.schedule, 3, solver=solver[0], order=solver[1], eta=1.0)
    start = rng.normal((2, *model.latent_shape(RESOLUTION)), 0, "x")

    def draw():
        text = model.encode_text(["a red circle", "a blue square"])
        sources = [rng.generator(0, "noise", i) for i in range(2)]
        images = model.decode(sample(model.denoiser(text, 3.0), table, start.to(model.device), sources))
        return images, model.encode_images(images, start.to(model.device))

    here = draw()
    for name in ("unet", "vae", "text_encoder"):
        setattr(model, name, move(copy.deepcopy(getattr(model, name))))
    model.device = DEVICE
    vars(model).pop("empty_text", None)
    there = draw()
    assert all(x.device == DEVICE for x in there)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


def test_levels_scores_and_distances():
    images = rng.normal((4, 3, 8, 8), 0, "pictures").sigmoid()
    assert torch.equal(to_uint8(images.to(DEVICE)).cpu(), to_uint8(images))
    reward = standardised(of_levels(lambda levels, prompts: levels.float().mean((1, 2, 3))))
    scores = reward(images.to(DEVICE), ["p"] * 4)
    assert scores.device == DEVICE and torch.equal(scores.cpu(), reward(images, ["p"] * 4))
    features = rng.normal((2, 5, 3), 0, "features")
    for distance in (kid, cmmd, frechet):
        assert distance(*features.to(DEVICE)) == distance(*features)
    groups = torch.tensor([0, 0, 1, 1, 1])
    assert torch.equal(diversity(features[0].to(DEVICE), groups.to(DEVICE)), diversity(features[0], groups))


def test_the_loss_of_prdp():
    now, old = rng.normal((2, 3, 4, 5), 0, "ratios")
    reward, there = rng.normal((3, 4), 0, "rewards"), now.to(DEVICE).requires_grad_()
    loss = prdp(there, old.to(DEVICE), reward.to(DEVICE), 1e-9, 0.5)
    loss.sum().backward()
    now.requires_grad_()
    expected = prdp(now, old, reward, 1e-9, 0.5)
    expected.sum().backward()
    assert loss.device == DEVICE and torch.equal(loss.cpu(), expected) and torch.equal(there.grad.cpu(), now.grad)
    assert prdp_clip_fraction(there, old.to(DEVICE), 0.5).device == DEVICE


def test_levels_of_a_schedule():
    t = torch.tensor([0, 10, 999])
    level = SCHEDULE.alpha(t.to(DEVICE))
    assert level.device.type == "cpu" and level.dtype == torch.float64 and torch.equal(level, SCHEDULE.alpha(t))
    assert torch.equal(SCHEDULE.timestep_at(torch.zeros(2).to(DEVICE)), SCHEDULE.timestep_at(torch.zeros(2)))
