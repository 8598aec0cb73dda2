"""The published numbers of the online methods, as literals from papers and authors' configurations, beside the presets.

How many updates a round has, and how many steps of a run are learnt from, follows from several options and the run's
table together. No model is loaded; what is assumed is Stable Diffusion's schedule.
"""

import pytest
from helpers_plan import evaluations, planned_tables, rounds_of

from diffusion_align.methods.shared.branch_plan import compared
from diffusion_align.options import VERBS, resolve


def preset(name):
    method, _, bare = name.partition("/")
    record = VERBS[f"train {method}"]
    given = [("prompts", "somewhere"), ("reward", "judge")]
    options = resolve(record.options, record.words, preset=bare, settings=given).options
    record.check(options)
    return options


# name: pictures of a round, optimizer steps of a round, of the run, rounds, steps learnt from, of so many
RUNS = {
    "d3po/sd15": (80, 20, 8000, 400, 20, 20),  # 10 x 2 pairs on each of 2 GPUs, a pair a GPU and step, 400 epochs
    "d3po/sdxl": (80, 20, 8000, 400, 20, 20),
    "ddpo/sd15": (256, 2, 400, 200, 50, 50),  # dgx.py, aesthetic: 8 x 4 x 8 GPUs; 4 x 4 x 8 a step; 200 epochs
    "ddpo/sdxl": (256, 2, 400, 200, 50, 50),
    "ddpo/sd15-grpo": (512, 2, 600, 300, 49, 50),  # config_sd/dgx.py, hpsv2: 4 x 16 x 8 GPUs; 4 x 8 x 8 a step
    "ddpo/sdxl-grpo": (512, 2, 600, 300, 49, 50),
    "ddpo/sd15-dpok": (10, 5, 10000, 2000, 50, 50),  # README and p_step, max_train_steps 10000: 20,000 pictures
    "ddpo/sdxl-dpok": (10, 5, 10000, 2000, 50, 50),
    "prdp/sd15": (512, 10, 1000, 100, 49, 50),  # N 32, B 16, K 10, E 100
    "prdp/sd15-large": (512, 1, 1000, 1000, 49, 50),  # N 64, B 8, K 1, E 1000
    "prdp/sdxl": (512, 1, 1000, 1000, 49, 50),
}


@pytest.mark.parametrize("name", RUNS)
def test_updates_and_trained_steps_are_the_published_ones(name):
    o = preset(name)
    tables = planned_tables(o)
    plan = rounds_of(o, 1, tables)
    learnt = tables.noisy if o.learn_steps is None else min(o.learn_steps, tables.noisy)
    pictures = o.prompts_per_round * o.group_size
    found = (pictures, plan.steps_per_round, plan.steps, plan.rounds, learnt, len(tables.whole))
    assert found == RUNS[name]
    # What learning asks the network about says the same: learnt steps, twice for guidance, of each picture.
    asked = evaluations(o, tables)["policy with gradient"]
    spared = 2 * (o.group_size - 1) * o.passes if o.share_initial_noise else 0
    assert asked == 2 * learnt * o.group_size * o.passes - spared


@pytest.mark.parametrize(
    ("name", "per_round", "in_all", "rounds"),
    [
        ("spo/sd15", 16, 16_000, 1000),  # 40 prompts x 16 pairs over 10 x 4 GPUs; 4000 / 40 x 10 epochs
        ("spo/sdxl", 8, 40_000, 5000),  # 8 prompts x 16 pairs over 2 x 4 GPUs x accumulation 2; 4000 / 8 x 10 epochs
    ],
)
def test_spo_steps_for_each_mini_batch_of_pairs(name, per_round, in_all, rounds):
    o = preset(name)
    tables = planned_tables(o)
    plan = rounds_of(o, 4, tables)
    assert (plan.steps_per_round, plan.steps, plan.max_rounds) == (per_round, in_all, rounds)
    assert rounds * o.prompts_per_round == 10 * o.num_prompts == 40_000
    assert compared(o, tables.whole) == list(range(4, 20))


# The constants that decide what an update is, as printed by papers and configurations.
CONSTANTS = {
    "d3po/sd15": {"beta": 0.1, "clip": 0.1, "learning_rate": 3e-5, "guidance": 5, "eta": 1, "rank": 4},
    "spo/sd15": {
        "beta": 10,
        "clip": 0.1,
        "learning_rate": 6e-5,
        "threshold": 0.3,
        "children": 4,
        "segment": 1,
        "rank": 4,
    },
    "spo/sdxl": {
        "beta": 10,
        "clip": 0.1,
        "learning_rate": 1e-5,
        "threshold": 0.4,
        "children": 2,
        "segment": 4,
        "rank": 64,
    },
    "prdp/sd15": {"beta": 3e-5, "clip": 1e-6, "learning_rate": 1e-5, "passes": 10, "mode": "full"},
    "prdp/sd15-large": {"beta": 3e-6, "clip": 1e-4, "learning_rate": 7e-6, "passes": 1, "mode": "full"},
    "ddpo/sd15": {"clip": 1e-4, "learning_rate": 3e-4, "kl_weight": 0, "guidance": 5, "mode": "lora", "rank": 4},
    "ddpo/sd15-grpo": {"clip": 1e-4, "learning_rate": 1e-5, "kl_weight": 0, "guidance": 5, "mode": "full"},
    "ddpo/sd15-dpok": {"clip": 1e-4, "learning_rate": 1e-5, "guidance": 7.5, "max_grad_norm": 0.1},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_the_published_ones(name):
    o = preset(name)
    assert {key: getattr(o, key) for key in CONSTANTS[name]} == CONSTANTS[name]
    assert (o.adam_weight_decay, o.max_grad_norm) == ((0, 0.1) if name.endswith("dpok") else (1e-4, 1.0))
    assert (o.solver, o.spacing, o.final) == ("ddim", "leading", "zero" if name.startswith("prdp") else "sigma_min")


@pytest.mark.parametrize(("name", "dims", "median"), [("sd15", 16384, 0.176), ("sdxl", 65536, 0.176)])
def test_the_kl_weight_of_dpok_is_its_mean_square_in_nats(name, dims, median):
    """0.01 times the mean square of the noise predictions' difference beside 10 times the reward. Nats of a step are
    (exp(2h) - 1) / 2 times its sum over dims; at the median step of the run the two weigh the same."""
    o = preset(f"ddpo/{name}-dpok")
    weight = (2 * planned_tables(o).whole.half_log_snr.diff()).expm1().median()
    assert float(weight) == pytest.approx(median, abs=1e-3)
    assert o.kl_weight == pytest.approx(0.01 / 10 / dims / (float(weight) / 2), rel=0.05)
