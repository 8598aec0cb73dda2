"""What ships: small enough, loadable by the plain libraries, imperfect as meant, and with labels that mean
something."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny.pictures import rendered
from tiny.reward import wrong_caption

from diffusion_align.data import read_pairs, read_rankings
from diffusion_align.data.frames import load_picture
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.evaluation import Drawing, evaluation_table, generate
from diffusion_align.models import load_pipeline
from diffusion_align.rewards import clip_scorer
from diffusion_align.shapes import held_out, judge, parse, sample_captions

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="module")
def model():
    return load_pipeline("tiny", device="cpu")


@pytest.fixture(scope="module")
def pairs():
    pairs, counts = read_pairs(ASSETS / "tiny_pairs.parquet")
    assert counts.used == len(pairs) == 800 and counts.ties == counts.broken == 0
    return pairs


def test_no_file_says_on_which_machine_it_was_made():
    """diffusers writes the folder that a part was loaded from into its configuration."""
    told = [path for path in ASSETS.rglob("*.json") if '"_name_or_path"' in path.read_text(encoding="utf-8")]
    assert told == []


def test_everything_together_stays_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 12e6


def test_the_rankings_hold_the_pairs_and_are_ordered_by_their_scores(pairs):
    """Four pictures a prompt, of which the pair is the best and the worst; relevance is one scorer's share of wins."""
    rankings, counts = read_rankings(ASSETS / "tiny_rankings.parquet")
    assert counts.used == len(rankings) == 800 and counts.ties == counts.broken == 0
    for pair, ranking in zip(pairs, rankings, strict=True):
        pictures = [read_bytes(picture) for picture in ranking.pictures]
        best, worst = max(ranking.relevance), min(ranking.relevance)
        assert pair.prompt == ranking.prompt and len(pictures) == 4
        assert read_bytes(pair.winner) == pictures[ranking.relevance.index(best)]
        assert read_bytes(pair.loser) == pictures[ranking.relevance.index(worst)]
        (scores,) = ranking.scores
        assert ranking.relevance == pytest.approx([sum(s > other for other in scores) / 3 for s in scores])


def test_plain_diffusers_loads_and_draws():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a large red circle on a white background"] * 8
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=10, guidance_scale=2.0, generator=generator, output_type="pt").images
    assert judge(images, prompts)["colour"].mean() >= 0.5


def test_held_out_accuracy_leaves_room(model):
    """The share of whole captions, unguided, on prompts of another seed than those that the docs' figures use."""
    prompts = sample_captions(192, 77, split="held-out")
    table = evaluation_table(model.schedule, 10)
    parts = [im for _, im in generate(model, prompts, Drawing(table, guidance=1.0, seed=1, batch_size=64))]
    marks = judge(torch.cat(parts), prompts)
    assert 0.28 <= marks["all"].mean() <= 0.75
    assert marks["background"].mean() >= 0.9 and marks["colour"].mean() >= 0.6


def test_pairs_are_of_training_prompts_and_labelled_by_the_reward(pairs):
    some = pairs[::8]
    assert not any(held_out(parse(pair.prompt)) for pair in pairs)
    prompts = [pair.prompt for pair in some]
    winners = torch.stack([load_picture(pair.winner.read(), 64) for pair in some])
    losers = torch.stack([load_picture(pair.loser.read(), 64) for pair in some])
    reward = clip_scorer("tiny", device="cpu")
    # The file's pictures are compressed, so a close call may turn.
    assert (reward(winners, prompts) > reward(losers, prompts)).float().mean() >= 0.95
    better, worse = judge(winners, prompts)["all"].mean(), judge(losers, prompts)["all"].mean()
    assert better > worse + 0.1


def test_the_reward_tells_right_captions_from_wrong_ones():
    captions = sample_captions(200, 78, split="held-out")
    pictures = rendered(captions, 78).float() / 255
    rng = np.random.default_rng(0)
    wrong = [wrong_caption(caption, rng) for caption in captions]
    reward = clip_scorer("tiny", device="cpu")
    right = (reward(pictures, captions) > reward(pictures, wrong)).float().mean()
    assert 0.7 <= right < 1.0  # good, and fallible
