"""What a plan counts is what a run does: steps with noise, network evaluations, and optimizer steps."""

import pytest
from helpers_online import METHODS, Toy
from helpers_plan import evaluations, planned_tables, rounds_of

from diffusion_align.commands.model_facts import SCHEDULE
from diffusion_align.methods.shared.rollout_plan import RunTables, describe_rounds, run_tables
from diffusion_align.options import VERBS, UsageError, resolve
from diffusion_align.options.train.online import noisy_steps, window_starts
from diffusion_align.options.train.spo import notes_spo
from diffusion_align.samplers import noise_window
from diffusion_align.schedule import Schedule


def options(method, **settings):
    record = VERBS[f"train {method}"]
    given = {"prompts": "tiny", "reward": "judge", "model": "tiny", **settings}
    resolved = resolve(record.options, record.words, settings=list(given.items()))
    record.check(resolved.options)
    return resolved.options


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "lu", "exponential", "ays"])
def test_options_and_table_agree_on_the_steps_with_noise(spacing, solver, final):
    """The tables of all samplers, on Stable Diffusion's schedule, whose offset is 1: where the options' count is more
    than the table's a window would start too late, where it is less a step would never be learnt from."""
    o = options("d3po", model="nowhere/sd", steps=10, spacing=spacing, solver=solver, final=final)
    tables = planned_tables(o)
    assert noisy_steps(o) == tables.noisy
    assert len(tables.whole) == (tables.noisy if final == "sigma_min" else tables.noisy + 1)
    o = options("d3po", model="nowhere/sd", steps=10, spacing=spacing, solver=solver, final=final, noise_window=2)
    places = [table.stochastic.nonzero().flatten().tolist() for table in planned_tables(o).of_rounds]
    assert places == [[k, k + 1] for k in window_starts(o)] and places[-1][-1] == tables.noisy - 1


def test_a_model_without_offset_has_a_leading_step_less():
    """Its leading grid reaches t = 0 by itself: the table knows, and with it the last place of a window."""
    schedule = Schedule.from_config({key: value for key, value in SCHEDULE.items() if key != "steps_offset"})
    settings = {"steps": 10, "spacing": "leading", "final": "sigma_min", "noise_window": 2}
    o = options("d3po", **settings)
    tables = run_tables(o, schedule)
    assert tables.noisy == len(tables.whole) == 9 and noisy_steps(o) == 10
    assert tables.of_rounds[-1].stochastic.nonzero().flatten().tolist() == [7, 8]
    with pytest.raises(ValueError, match="9 of 10 have noise: a noise_window of 2 starts at 7 at the latest, not at 8"):
        run_tables(options("d3po", window_first=8, **settings), schedule)


@pytest.mark.parametrize(
    "more", [{}, {"window": (2, 1)}, {"window": (5, 1), "final": "sigma_min"}, {"final": "sigma_min"}]
)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_planned_evaluations_are_those_that_are_made(name, order, more):
    """Counted at the network, for one prompt; the toy's tables are handed to the plan."""
    toy = Toy(order=order, guidance=1.0, **more)
    whole = Toy(order=order, **({"final": more["final"]} if "final" in more else {})).table
    quiet, window = toy.quiet, more.get("window")
    tables = RunTables(whole, quiet, [noise_window(whole, quiet, *window) if window else whole])
    settings = {"steps": 6, "guidance": 1, "solver": "dpmpp", "order": order, "final": more.get("final", "zero")}
    if window is not None:
        settings |= {"noise_window": window[1], "window_first": window[0], "window_last": window[0]}
    if name == "spo":
        settings |= {"children": 3, "start": 2}
    planned = evaluations(options(name, **settings), tables)
    method = toy.method(name)
    drawn = method.collect([(0, 1)], 0)
    before = toy.policy_calls.plain
    method.learn(drawn, 1.0)
    assert planned["rollout"] == before
    assert planned["policy with gradient"] == toy.policy_calls.grad
    assert planned["reference"] == toy.reference_calls.plain


@pytest.mark.parametrize("lookahead", [0, 1, 2, 9])
@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_planned_evaluations_of_segments_and_looks(final, segment, lookahead):
    toy = Toy(guidance=1.0, final=final)
    settings = {"steps": 6, "guidance": 1, "solver": "dpmpp", "order": 1, "final": final, "children": 3, "start": 2}
    planned = evaluations(
        options("spo", segment=segment, lookahead=lookahead, **settings), RunTables(toy.table, toy.quiet, [toy.table])
    )
    pairs = toy.branch([(0, 1)], segment=segment, lookahead=lookahead)
    assert planned["rollout"] == toy.policy_calls.plain
    toy.method("spo").learn(pairs, 1.0)
    assert planned["policy with gradient"] == toy.policy_calls.grad


def test_the_steps_of_a_round_of_pairs():
    """40 prompts x 16 comparisons, 40 pairs a step: at most 16 steps a round (train_spo.py, 10 on each of 4 GPUs)."""
    spo = {
        "model": "nowhere/sd",
        "steps": 20,
        "spacing": "leading",
        "final": "sigma_min",
        "prompts_per_round": 40,
        "start": 4,
    }
    o = options("spo", children=4, sample_chunk=8, pairs_per_step=40, num_rounds=1000, **spo)
    plan = rounds_of(o, 4, planned_tables(o))
    assert (plan.steps_per_round, plan.steps, plan.rounds, plan.max_rounds, plan.batch) == (16, 16000, 1000, 1000, 40)
    assert describe_rounds(plan)[1].startswith("steps            up to 16000, up to 16 per round, of 40 pairs")
    o = options("spo", children=4, sample_chunk=8, pairs_per_step=40, max_train_steps=1000, **spo)
    plan = rounds_of(o, 4, planned_tables(o))
    assert (plan.steps, plan.rounds, plan.max_rounds) == (1000, 63, None)
    assert describe_rounds(plan)[0].startswith("rounds           at least 63")
    # All six pairs of a state's four children, learnt from twice.
    o = options("spo", children=4, sample_chunk=8, pairs_per_step=40, pairs="all", passes=2, num_rounds=3, **spo)
    assert rounds_of(o, 1, planned_tables(o)).steps_per_round == 2 * 96
    with pytest.raises(ValueError, match="40 prompts per round cannot be divided equally among 3 processes"):
        rounds_of(o, 3, planned_tables(o))
    with pytest.raises(
        UsageError, match="pairs_per_step and train.prompts_per_step each say what a step takes: give one"
    ):
        options("spo", pairs_per_step=40, prompts_per_step=8)


def test_a_decaying_rate_over_an_unknown_number_of_steps_causes_a_note():
    def notes(**more):
        return notes_spo(options("spo", pairs_per_step=4, **more), more)

    assert "covers the most steps" in notes(lr_scheduler="linear")[0]
    assert notes() == notes(lr_scheduler="linear", max_train_steps=9) == []
