"""`data synth`: rankings against counting by hand, killed and gone on with, in shards, with rewards that fail."""

import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers_tiny import make_tiny_folder
from PIL import Image

from diffusion_align import cli
from diffusion_align.commands.data import synth_chunks
from diffusion_align.commands.data.synth_labels import agreement, relevances, scorer_figures, shuffled_relevance
from diffusion_align.data import read_pairs, read_rankings
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.options import UsageError
from diffusion_align.options.reward import check_reward

PROMPTS = [f"a {size} {colour} circle" for colour in ("red", "blue", "green") for size in ("small", "large")]
TABLES = ("rankings.parquet", "pairs.parquet", "report.json")


def bright(images, prompts):
    return images.mean((1, 2, 3))


def reddish(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def use(monkeypatch, **rewards):
    """Rewards by name; what was asked of each is counted."""
    calls = {name: 0 for name in rewards}

    def by_name(name, *, device, seed):
        def counted(images, prompts):
            calls[name] += len(prompts)
            return rewards[name](images, prompts)

        return counted

    def require(name):
        if name not in rewards:
            raise UsageError(f"there is no reward {name}")
        return name

    monkeypatch.setattr(synth_chunks, "load_reward", by_name)
    monkeypatch.setattr("diffusion_align.options.synth.check_reward", require)
    return calls


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(synth_chunks, "PROMPTS_PER_CHUNK", 2)
    use(monkeypatch, bright=bright, reddish=reddish)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Two random models of 32-pixel pictures, and six prompts."""
    folder = tmp_path_factory.mktemp("synth")
    for name, seed in (("a", 0), ("b", 1)):
        make_tiny_folder(folder / name, seed=seed)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))  # a repeated prompt counts once
    return folder


def argv(toys, out, *more, models=("a",), rewards=("bright", "reddish"), prompts="prompts.txt"):
    flags = f"""data synth --prompts {toys / prompts} --out {out} --steps 2 --guidance 2 --pictures 4 --device cpu
        --batch_size 3""".split()
    for flag, names in (("--models", [str(toys / name) for name in models]), ("--rewards", rewards)):
        flags += itertools.chain.from_iterable((flag, name) for name in names)
    return [*flags, *more]


@pytest.fixture(scope="module")
def whole(toys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth_chunks, "PROMPTS_PER_CHUNK", 2)
        use(patch, bright=bright, reddish=reddish)
        assert cli.main(argv(toys, toys / "whole", models=("a", "b"))) == 0
    return toys / "whole"


def levels(out, number, place):
    return np.asarray(Image.open(synth_chunks.synth_picture(out, number, place))).astype(int)


def same(left, right):
    files = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
    return all((left / file).read_bytes() == (right / file).read_bytes() for file in files)


def test_rankings_pairs_and_report_by_counting(whole):
    rankings, counts = read_rankings(whole / "rankings.parquet")
    pairs, _ = read_pairs(whole / "pairs.parquet")
    report = json.loads((whole / "report.json").read_text())
    assert [ranking.prompt for ranking in rankings] == [pair.prompt for pair in pairs]
    assert counts.used == report["rankings"] == 6 - report["all_tied"] and report["rankings"] >= 3
    agree = both = told = 0
    by_model = [[], []]
    for ranking, pair in zip(rankings, pairs, strict=True):
        number = PROMPTS.index(ranking.prompt)
        pictures = [levels(whole, number, place) / 255 for place in range(4)]
        scores = np.array([[p.mean(), p[..., 0].mean() - p[..., 2].mean()] for p in pictures]).T
        assert np.allclose(ranking.scores, scores, atol=1e-6)
        wins = [sum(row[i] > row[j] for row in scores for j in range(4)) / 6 for i in range(4)]
        assert ranking.relevance == pytest.approx(wins)
        files = [synth_chunks.synth_picture(whole, number, place).read_bytes() for place in range(4)]
        assert [read_bytes(picture) for picture in ranking.pictures] == files
        best, worst = wins.index(max(wins)), wins.index(min(wins))
        assert (read_bytes(pair.winner), read_bytes(pair.loser)) == (files[best], files[worst])
        for i, j in itertools.combinations(range(4), 2):
            told += wins[i] != wins[j]
        for place, win in enumerate(wins):
            by_model[place % 2].append(win)
    for number in range(6):  # tied prompts count too where scorers are compared
        pictures = [levels(whole, number, place) / 255 for place in range(4)]
        scores = np.array([[p.mean(), p[..., 0].mean() - p[..., 2].mean()] for p in pictures]).T.astype(np.float32)
        for i, j in itertools.combinations(range(4), 2):
            both += 1
            agree += (scores[0, i] > scores[0, j]) == (scores[1, i] > scores[1, j])
    assert report["agreement"] == {"bright / reddish": {"pairs": both, "agree": pytest.approx(agree / both)}}
    assert report["decided"] == pytest.approx(told / (6 * len(rankings)))
    for said, mine in zip(report["models"], by_model, strict=True):
        assert said["mean_relevance"] == pytest.approx(np.mean(mine))
    assert report["scorers"]["bright"]["failed"] == 0 and report["scorers"]["bright"]["decides"] == 1
    assert (report["seed"], report["sampler"]["steps"], report["sampler"]["guidance"]) == (0, 2, 2)
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    labels = pq.read_table(whole / "pairs.parquet")["label_0"].to_pylist()
    assert set(labels) <= {0.0, 1.0}


def test_each_picture_has_its_address(toys, whole, tmp_path):
    """The same prompt, model and i: alone, in another order, in another batch; the other seed is another picture."""
    (tmp_path / "p.txt").write_text("\n".join([PROMPTS[4], PROMPTS[1]]))
    run = argv(toys, tmp_path / "one", "--batch_size", "8", "--pictures", "2", prompts=tmp_path / "p.txt")
    assert cli.main(run) == 0
    for number, other in ((0, 4), (1, 1)):
        for i in range(2):
            assert abs(levels(tmp_path / "one", number, i) - levels(whole, other, 2 * i)).max() <= 1
    assert len({levels(whole, number, place).tobytes() for number in range(6) for place in range(4)}) == 24
    more = ("--seed", "1", "--pictures", "2")
    run = argv(toys, tmp_path / "two", *more, rewards=("bright",), prompts=tmp_path / "p.txt")
    assert cli.main(run) == 0
    assert abs(levels(tmp_path / "two", 0, 0) - levels(tmp_path / "one", 0, 0)).max() > 1


@pytest.mark.parametrize(("what", "when"), [("encode_png", 1), ("encode_png", 8), ("encode_png", 14), ("score", 5)])
def test_a_killed_run_goes_on_to_the_same_bytes(toys, whole, tmp_path, monkeypatch, capsys, what, when):
    made = [0]

    def fragile(function):
        def call(*arguments):
            made[0] += 1
            if made[0] == when:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        if what == "encode_png":
            patch.setattr(synth_chunks, "encode_png", fragile(synth_chunks.encode_png))
        else:
            use(patch, bright=fragile(bright), reddish=reddish)
        assert cli.main(argv(toys, tmp_path / "cut", models=("a", "b"))) == 130
    assert f"what is finished stays in {tmp_path / 'cut'}; the same command goes on" in capsys.readouterr().err
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.png")}
    assert not (tmp_path / "cut" / "rankings.parquet").exists() and (when == 1 or there)
    assert cli.main(argv(toys, tmp_path / "cut", models=("a", "b"))) == 0
    if what == "score":
        assert all(path.stat().st_mtime_ns == time for path, time in there.items())  # nothing was drawn twice
    assert same(tmp_path / "cut", whole)
    assert cli.main(argv(toys, tmp_path / "cut", models=("a", "b"))) == 0 and same(tmp_path / "cut", whole)


def test_a_missing_picture_is_drawn_in_its_batch(toys, tmp_path, monkeypatch):
    """For a batch of another composition may round otherwise."""
    drawn, pictures = [], synth_chunks._pictures
    monkeypatch.setattr(
        synth_chunks, "_pictures", lambda model, o, batch, bar: (drawn.append(batch), pictures(model, o, batch, bar))[1]
    )
    assert cli.main(argv(toys, tmp_path / "out")) == 0
    batches = list(drawn)
    assert [len(batch) for batch in batches] == [3, 3, 2] * 3  # parts of 2 prompts x 4 pictures
    for number, place in ((0, 1), (3, 3)):
        synth_chunks.synth_picture(tmp_path / "out", number, place).unlink()
    del drawn[:]
    assert cli.main(argv(toys, tmp_path / "out")) == 0
    assert drawn == [batches[0], batches[5]]


def test_shards_write_the_same_files_as_one_run(toys, whole, tmp_path, capsys):
    for shard in ("2/3", "0/3", "1/3"):
        assert not (tmp_path / "cut" / "report.json").exists()
        assert cli.main(argv(toys, tmp_path / "cut", "--shard", shard, models=("a", "b"))) == 0
        said = capsys.readouterr().out
        assert (f"shard {shard} is done; the last shard to finish writes" in said) == (shard != "1/3")
    assert same(tmp_path / "cut", whole)


def told(images, prompts):
    """Brightness and the prompt's number: whoever mixes prompts up is found out."""
    return bright(images, prompts) + torch.tensor([float(PROMPTS.index(prompt)) for prompt in prompts])


def test_models_may_draw_in_sizes_of_their_own_and_each_picture_is_scored_with_its_prompt(toys, tmp_path, monkeypatch):
    use(monkeypatch, told=told)
    big = make_tiny_folder(tmp_path / "big", seed=1)
    config = json.loads((big / "unet" / "config.json").read_text())
    (big / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    assert cli.main(argv(toys, tmp_path / "out", models=("a", tmp_path / "big"), rewards=("told",))) == 0
    for ranking in read_rankings(tmp_path / "out" / "rankings.parquet")[0]:
        number = PROMPTS.index(ranking.prompt)
        pictures = [levels(tmp_path / "out", number, place) / 255 for place in range(4)]
        assert [picture.shape[0] for picture in pictures] == [32, 64, 32, 64]
        assert ranking.scores[0] == pytest.approx([number + picture.mean() for picture in pictures], abs=1e-6)


def test_an_added_reward_scores_existing_pictures(toys, tmp_path, monkeypatch):
    calls = use(monkeypatch, bright=bright, dark=lambda images, prompts: -bright(images, prompts))
    assert cli.main(argv(toys, tmp_path / "out", rewards=("bright",))) == 0
    first = read_rankings(tmp_path / "out" / "rankings.parquet")[0]
    assert sorted(first[0].relevance) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert cli.main(argv(toys, tmp_path / "out", rewards=("bright", "bright2"))) == 2  # no such reward: nothing is lost
    assert calls == {"bright": 24, "dark": 0}
    # Two scorers that always disagree leave every prompt tied.
    assert cli.main(argv(toys, tmp_path / "out", rewards=("bright", "dark"))) == 1
    assert calls == {"bright": 24, "dark": 24}
    assert len(read_rankings(tmp_path / "out" / "rankings.parquet")[0]) == 6


def test_another_command_is_refused(toys, whole, capsys):
    for more, word in ((("--seed", "3"), "seed"), (("--steps", "3"), "sampler"), (("--pictures", "5"), "pictures")):
        assert cli.main(argv(toys, whole, *more, models=("a", "b"))) == 1
        assert f"holds pictures made with other {word}: choose another --out" in capsys.readouterr().err
    assert cli.main(argv(toys, whole, models=("b", "a"))) == 1
    assert "other models" in capsys.readouterr().err


def failing_at(number, error=None, value=math.nan):
    """bright, but for the picture that is asked about as the `number`-th one in a batch of its own, or in a larger."""

    def reward(images, prompts):
        wrong = [i for i, prompt in enumerate(prompts) if prompt == PROMPTS[number]][:1]
        if error and wrong:
            raise error
        scores = bright(images, prompts)
        scores[wrong] = value
        return scores

    return reward


def test_failed_scores_leave_their_picture_out_and_are_counted(toys, tmp_path, monkeypatch):
    """nan for the first picture of prompt 2 in each batch of 3: pictures 8 and 9; prompt 2 keeps 10 and 11."""
    use(monkeypatch, bright=bright, odd=failing_at(2))
    assert cli.main(argv(toys, tmp_path / "out", rewards=("bright", "odd"))) == 0
    rankings, _ = read_rankings(tmp_path / "out" / "rankings.parquet")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    failed = report["scorers"]["odd"]["failed"]
    sizes = {ranking.prompt: len(ranking.pictures) for ranking in rankings}
    assert failed == 2 and sizes[PROMPTS[2]] == 2 and {sizes[p] for p in sizes if p != PROMPTS[2]} == {4}
    assert report["pictures"] == {"drawn": 24, "ranked": 22} and report["scorers"]["bright"]["failed"] == 0
    assert {len(set(ranking.relevance)) for ranking in rankings if len(ranking.pictures) == 2} == {2}
    assert report["agreement"]["bright / odd"]["agree"] == 1


def test_a_reward_that_raises_for_some_pictures_costs_only_those(toys, tmp_path, monkeypatch, capsys):
    use(monkeypatch, bright=failing_at(2, ZeroDivisionError("odd picture")))
    assert cli.main(argv(toys, tmp_path / "out", rewards=("bright",))) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["scorers"]["bright"]["failed"] == 4 and report["rankings"] == 5 and report["too_few_scores"] == 1
    assert "(0 all tied, 1 with too few scores)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: bright(images, prompts) * math.nan, "no finite number for any of 8 pictures"),
        (lambda images, prompts: bright(images, prompts)[:1], "reward bad returned [1] for 3 pictures"),
        (lambda images, prompts: [1.0] * len(prompts), "reward bad returned list for 3 pictures"),
        (lambda images, prompts: 1 / 0, "for any of 8 pictures: ZeroDivisionError: division by zero"),
        (lambda images, prompts: torch.zeros(len(prompts)), "none of 6 prompts has a preference: 6 all tied, 0 with"),
    ],
)
def test_bad_rewards_are_one_line(toys, tmp_path, monkeypatch, capsys, reward, message):
    use(monkeypatch, bad=reward)
    assert cli.main(argv(toys, tmp_path / "out", rewards=("bad",))) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ()}, "which models? --models NAME"),
        ({"rewards": ()}, "which rewards? --rewards NAME"),
        ({"more": ("--pictures", "1")}, "data.pictures must be a whole number at least 2, not '1'"),
        ({"more": ("--pictures", "2"), "models": ("a", "b", "c")}, "is less than one picture for each of 3 models"),
        ({"rewards": ("bright", "bright")}, "named twice"),
        ({"more": ("--shard", "3/3")}, "machine.shard must be K/N with K from 0 to N - 1"),
        ({"more": ("--order", "3", "--eta", "1")}, "sampler.order 3 is for sampler.eta 0 only"),
        ({"prompts": "empty.txt"}, "empty.txt: holds no prompt; give a .txt with one prompt a line"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"models": ("nowhere",)}, "nowhere: give a folder in diffusers format"),
    ],
)
def test_bad_input_is_one_line(toys, tmp_path, capsys, change, message):
    (toys / "empty.txt").write_text("\n \n")
    more = change.pop("more", ())
    assert cli.main(argv(toys, tmp_path / "out", *more, **change)) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "out").exists()


def test_a_reward_without_weights_is_refused_before_anything_is_drawn(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion_align.options.synth.check_reward", check_reward)
    assert cli.main(argv(toys, tmp_path / "out", rewards=("judge", "no/such/reward"))) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "'no/such/reward' is neither a folder nor" in said and not (tmp_path / "out").exists()


def test_a_picture_that_is_damaged_is_named(toys, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        use(patch, bright=lambda images, prompts: 1 / 0)
        cli.main(argv(toys, tmp_path / "out", rewards=("bright",)))
    path = synth_chunks.synth_picture(tmp_path / "out", 3, 1)
    data = path.read_bytes()
    path.write_bytes(data[:100])
    assert cli.main(argv(toys, tmp_path / "out")) == 1
    assert f"{path} cannot be decoded" in capsys.readouterr().err
    path.unlink()
    assert cli.main(argv(toys, tmp_path / "out")) == 0 and path.read_bytes() == data


def test_a_model_that_diverges_is_named(toys, tmp_path, monkeypatch, capsys):
    nan = lambda model, o, addresses, drawn: torch.full((len(addresses), 3, 8, 8), math.nan)  # noqa: E731
    monkeypatch.setattr(synth_chunks, "_pictures", nan)
    assert cli.main(argv(toys, tmp_path / "out")) == 1
    assert "picture 0 of prompt 0 is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("rewards", [("bright", "reddish"), ()])
def test_random_labels_are_a_control_beside_the_real_ones(toys, whole, tmp_path, rewards):
    out = tmp_path / "out"
    assert cli.main(argv(toys, out, models=("a", "b"))) == 0
    assert cli.main(argv(toys, out, "--random_labels", models=("a", "b"), rewards=rewards)) == 0
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in TABLES)
    control, _ = read_rankings(out / "random_rankings.parquet")
    real = {ranking.prompt: ranking for ranking in read_rankings(whole / "rankings.parquet")[0]}
    moved = 0
    for ranking in control:
        mine = [read_bytes(picture) for picture in ranking.pictures]
        if rewards:
            other = real[ranking.prompt]
            assert mine == [read_bytes(picture) for picture in other.pictures]
            assert sorted(ranking.relevance) == sorted(other.relevance)
            moved += ranking.relevance != other.relevance
        else:
            assert sorted(ranking.relevance) == pytest.approx([0, 1 / 3, 2 / 3, 1])
            moved += list(ranking.relevance) != sorted(ranking.relevance, reverse=True)
    assert moved and json.loads((out / "random_report.json").read_text())["random_labels"]
    before = (out / "random_rankings.parquet").read_bytes()
    assert cli.main(argv(toys, out, "--random_labels", models=("a", "b"), rewards=rewards)) == 0
    assert (out / "random_rankings.parquet").read_bytes() == before


def test_shuffled_labels_do_not_depend_on_the_place():
    """Each of 4 relevances lands in each of 4 places equally often: 3/4 of the statistic is a chi-square with 9 degrees
    for permutations; one in a thousand."""
    counts = np.zeros((4, 4))
    for i in range(1000):
        for place, value in enumerate(shuffled_relevance([0, 1, 2, 3], 0, f"prompt {i}")):
            counts[place, value] += 1
    assert 3 / 4 * ((counts - 250) ** 2 / 250).sum() < 27.9
    assert shuffled_relevance([0, 1, 2, 3], 0, "p") == shuffled_relevance([0, 1, 2, 3], 0, "p")


def test_labels_by_hand():
    """Two scorers, two prompts, three pictures. Prompt 0: (3, 2, 1) and (1, 2, nan), so 0 and 1 are left and each wins
    once. Prompt 1: (1, 1, 2) and (5, 4, 6): wins 0 + 1, 0 + 0 and 2 + 2 of 4."""
    nan = math.nan
    scores = torch.tensor([[[3, 2, 1], [1, 1, 2]], [[1, 2, nan], [5, 4, 6]]], dtype=torch.float64)
    assert list(relevances(scores)) == [([0, 1], [0.5, 0.5]), ([0, 1, 2], [0.25, 0.0, 1.0])]
    assert list(relevances(scores[:0])) == [([0, 1, 2], [1.0, 0.5, 0.0])] * 2
    assert list(relevances(torch.tensor([[[1, nan, nan]]], dtype=torch.float64))) == [([0], [])]
    # Pairs 01, 02, 12 of both prompts: the first says > > > and = < <, the second < . . and > < <.
    assert agreement(scores, ["a", "b"]) == {"a / b": {"pairs": 3, "agree": pytest.approx(2 / 3)}}
    figures = scorer_figures(scores, ["a", "b"])
    std = pytest.approx(np.std([3, 2, 1, 1, 1, 2]))
    assert figures["a"] == {"failed": 0, "mean": pytest.approx(10 / 6), "std": std, "decides": pytest.approx(5 / 6)}
    assert figures["b"]["failed"] == 1 and figures["b"]["decides"] == 1
    assert agreement(torch.zeros(2, 1, 2), ["a", "b"])["a / b"] == {"pairs": 0, "agree": None}


def test_dry_run_is_a_config_and_draws_nothing(toys, tmp_path, capsys):
    more = ("--dry-run", "--shard", "1/2")
    assert cli.main(argv(toys, tmp_path / "out", *more, models=("a", "b"))) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "# prompts          6 of" in said and "2 in shard 1/2" in said and "# evaluations      4 of" in said
    assert "4 of each: 2 by" in said and "; 8 in all" in said and "16, by bright, reddish" in said
    (tmp_path / "plan.yaml").write_text(said)
    assert cli.main(["data", "synth", "--config", str(tmp_path / "plan.yaml"), "--dry-run", "--shard=1/2"]) == 0
    assert capsys.readouterr().out == said
