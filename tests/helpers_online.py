"""A toy for the online methods: a small network with an adapter, a reward one can compute by hand, runs in memory."""

import copy

import torch
from accelerate import Accelerator
from helpers_train import SCHEDULE, SHAPE, TEXT, Network, run_of

from diffusion_align import rng
from diffusion_align.methods.d3po import d3po_method
from diffusion_align.methods.ddpo import policy_gradient_method
from diffusion_align.methods.prdp import prdp_method
from diffusion_align.methods.shared.branches import Branching, resample
from diffusion_align.methods.shared.rollouts import Rollouts
from diffusion_align.methods.shared.runs import Prompted, binder, draw_runs, scored
from diffusion_align.methods.shared.start_checks import along_runs
from diffusion_align.methods.spo import spo_method
from diffusion_align.samplers import noise_window, step_table
from diffusion_align.train.rounds import RoundSizes, run_rounds

PROMPTS = [f"prompt {i}" for i in range(6)]
TEXTS = rng.normal((6, *TEXT), 0, "online text")
EMPTY = torch.zeros(1, *TEXT)


def darkness(latents, prompts):
    """The reward: how dark the end of a run is. Summed in float64: advantages would enlarge an ulp that hangs on the
    number of rows."""
    return -latents.flatten(1).cpu().double().mean(1).to(latents.dtype)


class Counted:
    """A network that counts the rows it is given, with and without gradients."""

    def __init__(self, network):
        self.network, self.plain, self.grad = network, 0, 0

    def __call__(self, x, t, text):
        if torch.is_grad_enabled():
            self.grad += len(x)
        else:
            self.plain += len(x)
        return self.network(x, t, text)


class Toy:
    """Policy, reference and settings; `method(name)` is what a round asks, `rounds(method)` the loop."""

    def __init__(
        self, *, guidance=3.0, order=1, steps=6, group=2, share=True, double=False, reward=darkness, seed=0,
        window=None, final="zero",
    ):  # fmt: skip
        self.network = Network()
        self.network.requires_grad_(False)
        self.network.up.requires_grad_(True)
        self.network.down.requires_grad_(True)
        if double:
            self.network.double()
        frozen = copy.deepcopy(self.network).requires_grad_(False)
        frozen.adapter = False
        self.policy_calls, self.reference_calls = Counted(self.network), Counted(frozen)
        self.dtype = torch.float64 if double else torch.float32
        empty = EMPTY.to(self.dtype)
        self.policy = binder(self.policy_calls, SCHEDULE, "epsilon", empty, guidance)
        self.reference = binder(self.reference_calls, SCHEDULE, "epsilon", empty, guidance)
        self.table = step_table(SCHEDULE, steps, solver="dpmpp", order=order, eta=1.0, final=final)
        self.quiet = step_table(SCHEDULE, steps, solver="dpmpp", order=order, eta=0.0, final=final)
        if window is not None:
            self.table = noise_window(self.table, self.quiet, *window)
        self.group, self.share, self.reward, self.seed = group, share, reward, seed
        self.guidance, self.shape = guidance, SHAPE
        self.parameters = [self.network.up, self.network.down]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        self.dims = 32

    def texts(self, samples):
        rows = [index for _, index in samples]
        return [PROMPTS[i] for i in rows], TEXTS[rows].to(self.dtype)

    def prompted(self, samples):
        return Prompted(*self.texts(samples), samples)

    def draw(self, samples, round=0):
        runs = draw_runs(
            self.policy, self.reference, self.table, self.prompted(samples), group=self.group, share_noise=self.share,
            shape=self.shape, seed=self.seed,
        )  # fmt: skip
        return scored(runs, self.reward)

    def logits(self, x, prompts, t):
        """What SPO compares by: the reward, stretched to logits; what is no tensor stays as it is."""
        values = self.reward(x, prompts)
        return 20 * values if isinstance(values, torch.Tensor) else values

    def branch(self, samples, round=0, children=3, start=2, threshold=0.0, segment=1, lookahead=0, all_pairs=False):
        how = Branching(children, start, threshold, segment, all_pairs, lookahead)
        return resample(
            self.policy, self.table, self.prompted(samples), self.logits, how, shape=self.shape, seed=self.seed,
            quiet=self.quiet,
        )  # fmt: skip

    def method(self, name, *, allowed=None, score=None, ahead=False, **more):
        allowed = allowed or along_runs("no", self.table, self.dims, self.guidance, "epsilon")
        draw = self.branch if name == "spo" else self.draw
        rollouts = Rollouts(draw, self.policy, self.reference, self.dims, allowed, score, ahead)
        if name == "d3po":
            return d3po_method(rollouts, **{"beta": 5.0, "clip": 0.1, "per_dim": True} | more)
        if name == "prdp":
            return prdp_method(rollouts, **{"beta": 0.05, "clip": None, "mean": False, "fresh": True} | more)
        if name == "ddpo":
            settings = {"clip": 0.1, "std": "group", "kl_weight": 0.0, "per_dim": True} | more
            return policy_gradient_method(rollouts, **settings)
        return spo_method(rollouts, self.table, **{"beta": 10.0, "clip": 0.1, "per_dim": True, "at_once": 5} | more)

    def rounds(self, method, *, accelerator=None, **more):
        settings = {
            "n": len(PROMPTS), "prompts_per_round": 4, "prompts_per_step": 4, "prompts_per_chunk": 2, "passes": 1,
            "lr_scheduler": None, "seed": self.seed, "max_steps": 3, "max_grad_norm": None,
            "parameters": self.parameters, "optimizer": self.optimizer,
            "accelerator": accelerator or Accelerator(cpu=True),
        } | more  # fmt: skip
        run = run_of(settings)
        return run_rounds(method, run, RoundSizes(**settings))

    def weights(self):
        return [p.detach().clone() for p in self.parameters]

    def gradients(self):
        """What the parameters' gradients are, in one row; they are empty again."""
        found = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return found

    def move(self, size=0.05):
        """The policy a little away from its reference."""
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p += size * rng.normal(p.shape, 9, "move", i).to(p)


METHODS = ("d3po", "prdp", "ddpo", "spo")
