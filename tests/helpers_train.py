"""A toy to train on: a small network in place of the UNet, pairs in memory in place of the cache."""

import copy
import os
import traceback
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from helpers_machine import free_port
from torch import nn

from diffusion_align import rng
from diffusion_align.methods.dpo import pairs_method
from diffusion_align.methods.kto import pictures_method
from diffusion_align.methods.rankdpo import RankingLoss, rankings_method
from diffusion_align.methods.shared import noising
from diffusion_align.methods.shared.noising import Networks
from diffusion_align.methods.shared.pair_losses import on_margin
from diffusion_align.methods.shared.preferences import PreferencePairs, preference_method
from diffusion_align.objectives import logistic
from diffusion_align.schedule import Schedule
from diffusion_align.train import ema as ema_module
from diffusion_align.train import run as open_run
from diffusion_align.train import steps
from diffusion_align.train.ema import Ema
from diffusion_align.train.method import OfflineMethod
from diffusion_align.train.optimizer import lr_schedule

SHAPE = (2, 4, 4)
TEXT = (3, 5)
BETA = 0.5
SD_CONFIG = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCHEDULE = Schedule.from_config(SD_CONFIG)


class MemoryPairs:
    """What the loop asks of a cache. Winners are a little darker than losers, so there is something to learn."""

    def __init__(self, count=10):
        self.latents = rng.normal((count, 2, *SHAPE), 0, "toy latents")
        self.latents[:, 0] -= 0.5
        self.text = rng.normal((count, *TEXT), 0, "toy text")
        self.empty_text = rng.normal((1, *TEXT), 0, "toy empty")

    def __len__(self):
        return len(self.latents)

    groups, variants = None, 1

    def batch(self, indices, variants=None):
        rows = torch.as_tensor(indices)
        return self.latents[rows], self.text[rows]


class Network(nn.Module):
    """A frozen or trainable base, with an adapter that starts at zero, in the shape of a UNet's call."""

    def __init__(self):
        super().__init__()
        dims, width = 2 * 4 * 4, TEXT[1]
        self.base = nn.Parameter(rng.normal((dims, dims + width + 1), 1, "base") / dims**0.5)
        self.down = nn.Parameter(rng.normal((4, dims + width + 1), 1, "down") / dims**0.5)
        self.up = nn.Parameter(torch.zeros(dims, 4))
        self.adapter = True

    def forward(self, x, t, text):
        inputs = torch.cat([x.flatten(1), text.mean(1), t[:, None] / 1000], 1)
        out = inputs @ self.base.T
        if self.adapter:
            out = out + inputs @ self.down.T @ self.up.T
        return torch.tanh(out).view_as(x)


def run_of(settings):
    """The open run of these settings, which are taken out of them."""
    names = (
        "parameters", "optimizer", "lr_scheduler", "accelerator", "seed", "max_steps", "progress", "max_grad_norm",
        "spike", "max_skipped_in_row", "round", "stop_requested",
    )  # fmt: skip
    given = {name: settings.pop(name) for name in names if name in settings}
    if given.get("progress", 0) is None:
        del given["progress"]
    return open_run.Run(**given)


def run_steps(micro_batch, summarise, *, n, batch_size, accumulation, check_first=None, survey=None, **settings):
    """The offline engine on bare functions."""
    method = OfflineMethod(n, micro_batch, summarise, check_first, survey)
    return steps.run_steps(method, run_of(settings), batch_size=batch_size, accumulation=accumulation)


def noised_lists(latents, text, samples, schedule, prediction_type, seed, **options):
    """`noising.noised_lists` without networks."""
    networks = Networks(None, None, schedule, prediction_type)
    return noising.noised_lists(latents, text, samples, networks, seed, **options)


def trains(make):
    """A loop out of `make(cache, networks, run, *more, **constants)` and settings in one heap."""

    def train(cache, *more, schedule, prediction_type, batch_size, accumulation=1, **settings):
        named = [settings.pop(name) for name in ("relevance",) if name in settings]
        both = [settings.pop(name) for name in ("predict_policy", "predict_reference") if name in settings]
        *more, policy, reference = [*more, *named, *both]
        run = run_of(settings)
        method = make(cache, Networks(policy, reference, schedule, prediction_type), run, *more, **settings)
        return steps.run_steps(method, run, batch_size=batch_size, accumulation=accumulation)

    return train


def _rankings(cache, networks, run, relevance, *, loss, pair_weights, beta, **settings):
    return rankings_method(cache, networks, run, relevance, loss=RankingLoss(loss, pair_weights, beta), **settings)


train_pairs, train_pictures, train_rankings = trains(pairs_method), trains(pictures_method), trains(_rankings)


def train_step_aware(cache, prompts, scorer, predict_clean, decode, *, schedule, batch_size, labels=None, **settings):
    """The loop of a step-aware scorer."""
    pairs = PreferencePairs(cache, prompts, predict_clean, decode, schedule, labels)
    accumulation, run = settings.pop("accumulation", 1), run_of(settings)
    assert not settings
    method = preference_method(pairs, scorer, run)
    return steps.run_steps(method, run, batch_size=batch_size, accumulation=accumulation)


@dataclass
class Run:
    """All that a script would hold."""

    network: Network
    parameters: dict
    reference: object
    optimizer: torch.optim.Optimizer
    lr_scheduler: object
    ema: Ema | None
    settings: dict

    def steps(self, progress=None, **changes):
        """Records of the loop; the average is updated as a script would."""
        arguments = self.settings | {"predict_policy": self.network} | changes
        records = train_pairs(
            arguments.pop("cache"),
            arguments.pop("predict_policy"),
            self.reference,
            parameters=list(self.parameters.values()),
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            progress=progress,
            **arguments,
        )
        for record in records:
            if self.ema is not None and record.updated:
                self.ema.update(self.parameters)
            yield record

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def make_run(mode="lora", ema=False, optimizer="adamw", warmup=2, total=20, **settings):
    """A run at its start: `mode` "lora" trains the adapter, "full" the base against a frozen copy."""
    network = Network()
    names = ["down", "up"] if mode == "lora" else ["base"]
    network.requires_grad_(False)
    parameters = {name: getattr(network, name).requires_grad_(True) for name in names}
    frozen = copy.deepcopy(network).requires_grad_(False)
    frozen.adapter = False
    made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](list(parameters.values()), lr=0.02)
    defaults = {
        "cache": MemoryPairs(),
        "schedule": SCHEDULE,
        "prediction_type": "epsilon",
        "loss": on_margin(partial(logistic, beta=BETA)),
        "beta": BETA,
        "accelerator": Accelerator(cpu=True),
        "batch_size": 4,
        "seed": 3,
        "max_steps": 12,
    }
    return Run(
        network,
        parameters,
        frozen,
        made,
        lr_schedule(made, "cosine", warmup=warmup, total=total),
        ema_module.start_ema(parameters, 0.9) if ema else None,
        defaults | settings,
    )


def in_processes(count, work):
    """Run `work(rank)` in forked processes joined by gloo; True when all of them ended well."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _join(rank, count, port)
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()  # the child ends without unwinding, so nobody else would tell
            finally:
                os._exit(code)
        children.append(child)
    return all(os.waitpid(child, 0)[1] == 0 for child in children)


def _join(rank, count, port):
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)  # the parent's pool of threads does not live on in a fork, and waiting for it hangs
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    names = {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
