"""Every layout is recognised without a flag and read to the pairs and rankings that were worked out by hand."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from helpers_data import comma_separated, dump, lines, pictures, png, structs, table, tar
from PIL import Image

from diffusion_align.cli import main
from diffusion_align.commands.sources import read_prompts as prompts_of_a_verb
from diffusion_align.data import read_pairs, read_rankings, write_pairs_parquet, write_rankings_parquet
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.images import decode_image
from diffusion_align.data.pairs_and_rankings import DataRow, Ranking, fingerprint
from diffusion_align.data.prompts import read_list
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.interpret import fractions_won
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.recognise import recognise


def texts(path):
    return [prompt.text for prompt in read_list(path)]


def shade(picture):
    """The red of a picture's first pixel; JPEG and WebP move it by a little."""
    return decode_image(read_bytes(picture)).getpixel((0, 0))[0]


def pick_a_pic(root):
    """Second wins, first wins, a tie."""
    path = root / "data" / "train-00000-of-00001.parquet"
    return table(
        path,
        are_different=[True, True, False],
        caption=["a", "b", "c"],
        jpg_0=[png(0), png(10), png(20)],
        jpg_1=[png(100), png(110), png(120)],
        label_0=[0.0, 1.0, 0.5],
        label_1=[1.0, 0.0, 0.5],
        model_0=["x"] * 3,
        model_1=["y"] * 3,
        user_id=[1, 2, 3],
    ).parent.parent


def pick_a_pic_tar(root):
    members = []
    for key, first, second, label, prompt in (
        ("000", 0, 100, "0", "a"),
        ("001", 10, 110, "1", "b"),
        ("002", 20, 120, "0.5", "c"),
    ):
        other = str(1 - float(label))
        members += [(f"{key}.jpg_0.jpg", png(first)), (f"{key}.jpg_1.jpg", png(second))]
        members += [(f"{key}.label_0.txt", label.encode()), (f"{key}.label_1.txt", other.encode())]
        members += [(f"{key}.original_prompt.txt", prompt.encode())]
    tar(root / "00000.tar", members)
    return root


def hpdv2_train(root):
    pictures(root / "train", "0.jpg", "100.jpg", "10.jpg", "110.jpg")
    dump(root / "test.json", [])
    return dump(
        root / "train.json",
        [
            {"prompt": "a", "file_path": ["0.jpg", "100.jpg"], "human_preference": [0, 1], "user_hash": "u"},
            {"prompt": "b", "file_path": ["10.jpg", "110.jpg"], "human_preference": [1, 0]},
            {"prompt": "c", "file_path": ["10.jpg", "110.jpg"], "human_preference": [0, 0]},
        ],
    ).parent


def hpdv3(root):
    pictures(root, "images/100.jpg", "images/0.jpg", "images/10.jpg", "images/110.jpg")
    return dump(
        root / "all.json",
        [
            {
                "prompt": "a",
                "path1": "images/100.jpg",
                "path2": "images/0.jpg",
                "confidence": 0.75,
                "model1": "y",
                "model2": "x",
            },
            {"prompt": "b", "path1": "images/10.jpg", "path2": "images/110.jpg", "confidence": None},
            {"prompt": "c", "path1": "images/10.jpg", "path2": "images/110.jpg", "confidence": 0},
        ],
    )


def rapidata(root):
    """Votes 0.25 to 0.75 (weight 0.5), 1 to 0 (weight 1), even."""
    return table(
        root / "rapidata.parquet",
        prompt=["a", "b", "c"],
        image1=structs([0, 10, 20]),
        image2=structs([100, 110, 120]),
        model1=["x"] * 3,
        model2=["y"] * 3,
        weighted_results_image1_preference=[0.25, 1.0, 0.5],
        weighted_results_image2_preference=[0.75, 0.0, 0.5],
        detailed_results_preference=["[]"] * 3,
    )


def chosen_rejected(root):
    return table(root / "x.parquet", prompt=["a", "b"], chosen=structs([100, 10]), rejected=structs([0, 110]))


PAIR_FILES = [
    {"prompt": "a", "chosen_file_name": "100.png", "rejected_file_name": "0.png"},
    {"prompt": "b", "chosen_file_name": "10.png", "rejected_file_name": "110.png"},
]


def folder_jsonl(root):
    pictures(root, "100.png", "0.png", "10.png", "110.png")
    return lines(root / "metadata.jsonl", PAIR_FILES).parent


def folder_csv(root):
    pictures(root, "100.png", "0.png", "10.png", "110.png")
    return comma_separated(root / "metadata.csv", PAIR_FILES).parent


def folder_parquet(root):
    pictures(root, "100.png", "0.png", "10.png", "110.png")
    return table(
        root / "metadata.parquet", **{name: [row[name] for row in PAIR_FILES] for name in PAIR_FILES[0]}
    ).parent


def jsonl_of_paths(root):
    pictures(root, "img/100.png", "img/0.png", "img/10.png", "img/110.png")
    return lines(
        root / "mine.jsonl",
        [
            {"prompt": "a", "chosen": "img/100.png", "rejected": "img/0.png", "weight": 0.5},
            {"prompt": "b", "chosen": "img/10.png", "rejected": "img/110.png"},
        ],
    )


def own_pairs(root):
    root.mkdir(parents=True)
    write_pairs_parquet(
        root / "pairs.parquet", list("abc"), [png(0), png(10), png(20)], [png(100), png(110), png(120)], [0, 1, 0.5]
    )
    return root / "pairs.parquet"


# Everything above means the same: of "a" 100 beats 0, of "b" 10 beats 110.
PAIR_LAYOUTS = [
    # layout, its name, weight of "a", ties, models of "a"'s winner and loser
    (pick_a_pic, "Pick-a-Pic", 1, 1, ("y", "x")),
    (pick_a_pic_tar, "Pick-a-Pic", 1, 1, ()),
    (hpdv2_train, "HPDv2 train", 1, 1, ()),
    (hpdv3, "HPDv3", 0.75, 1, ("y", "x")),
    (rapidata, "Rapidata", 0.5, 1, ("y", "x")),
    (chosen_rejected, "chosen and rejected", 1, 0, ()),
    (folder_jsonl, "chosen and rejected", 1, 0, ()),
    (folder_csv, "chosen and rejected", 1, 0, ()),
    (folder_parquet, "chosen and rejected", 1, 0, ()),
    (jsonl_of_paths, "chosen and rejected", 0.5, 0, ()),
    (own_pairs, "Pick-a-Pic", 1, 1, ()),
]


@pytest.mark.parametrize(
    ("make", "name", "weight", "ties", "models"), PAIR_LAYOUTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_pairs_of_every_layout(tmp_path, make, name, weight, ties, models):
    path = make(tmp_path / "set")
    assert recognise(path).layout.name == name
    pairs, counts = read_pairs(path)
    assert [pair.prompt for pair in pairs] == ["a", "b"]
    assert [shade(pair.winner) for pair in pairs] == pytest.approx([100, 10], abs=3)
    assert [shade(pair.loser) for pair in pairs] == pytest.approx([0, 110], abs=3)
    assert [pair.weight for pair in pairs] == [weight, 1]
    assert (counts.rows, counts.used, counts.ties, counts.broken) == (2 + ties, 2, ties, 0)
    first = next(row for row in read_rows(recognise(path)) if isinstance(row, DataRow))
    assert first.models == models and first.source == name
    # As rankings: a weight moves the two relevances towards each other.
    rankings, counts = read_rankings(path)
    assert [ranking.relevance for ranking in rankings] == [((1 + weight) / 2, (1 - weight) / 2), (1, 0)]
    assert [shade(picture) for picture in rankings[0].pictures] == pytest.approx([100, 0], abs=3)
    assert (counts.rows, counts.used, counts.ties) == (2 + ties, 2, ties)


def hpdv2_test(root):
    pictures(root / "test", "0.jpg", "50.jpg", "100.jpg")
    rows = [
        {
            "prompt": "a",
            "image_path": ["0.jpg", "50.jpg", "100.jpg"],
            "rank": [2, 0, 1],
            "raw_annotations": [{"rank": [1]}],
        },
        {"prompt": "b", "image_path": ["0.jpg", "50.jpg", "100.jpg"], "rank": [1, 1, 2]},
        {"prompt": "c", "image_path": ["0.jpg", "50.jpg"], "rank": [1, 1]},
    ]
    return dump(root / "test.json", rows)


def image_reward_rows(root):
    """A picture a row, prompts interleaved; the test split lies beside it and is not to be read."""
    pictures(root / "images/train/train_1", "0.webp", "50.webp", "100.webp")
    shades = [0, 0, 50, 100, 50, 100, 0, 50]
    ids = ["1-1", "2-2", "1-1", "1-1", "2-2", "2-2", "3-3", "3-3"]
    ranks = [3, 1, 1, 2, 1, 2, 1, 1]
    columns = {
        "image_path": [f"images/train/train_1/{shade}.webp" for shade in shades],
        "prompt_id": ids,
        "prompt": [{"1": "a", "2": "b", "3": "c"}[name[0]] for name in ids],
        "image_amount_in_total": [3] * 8,
        "rank": ranks,
        "overall_rating": [1] * 8,
    }
    table(root / "metadata-train.parquet", **columns)
    return table(root / "metadata-test.parquet", **columns).parent


def image_reward_json(root):
    pictures(root, "0.png", "50.png", "100.png")
    return dump(
        root / "train.json",
        [
            {"id": "1", "prompt": "a", "generations": ["0.png", "50.png", "100.png"], "ranking": [3, 1, 2]},
            {"id": "2", "prompt": "b", "generations": ["0.png", "50.png", "100.png"], "ranking": [1, 1, 3]},
            {"id": "3", "prompt": "c", "generations": ["0.png", "50.png"], "ranking": [2, 2]},
        ],
    )


def own_rankings(root):
    root.mkdir(parents=True)
    lists = [
        Ranking("", "a", (png(0), png(50), png(100)), (0.0, 1.0, 0.5)),
        Ranking("", "b", (png(0), png(50), png(100)), (0.5, 0.5, 0.0)),
        Ranking("", "c", (png(0), png(50)), (0.5, 0.5)),
    ]
    write_rankings_parquet(root / "rankings.parquet", lists)
    return root


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (hpdv2_test, "HPDv2 test"),
        (image_reward_rows, "ImageRewardDB, a picture a row"),
        (image_reward_json, "ImageReward JSON"),
        (own_rankings, "lists of pictures (this project's own)"),
    ],
)
def test_rankings_of_every_layout(tmp_path, make, name):
    """Of "a" 50 beats 100 beats 0: shares won 0, 1, 1/2. Of "b" 0 and 50 tie before 100: 1/2, 1/2, 0. "c" is a tie.

    So as pairs "a" gives three and "b" two.
    """
    path = make(tmp_path / "set")
    assert recognise(path).layout.name == name
    rankings, counts = read_rankings(path)
    assert [(ranking.prompt, ranking.relevance) for ranking in rankings] == [("a", (0, 1, 0.5)), ("b", (0.5, 0.5, 0))]
    assert [shade(picture) for picture in rankings[0].pictures] == pytest.approx([0, 50, 100], abs=3)
    assert (counts.rows, counts.used, counts.ties, counts.broken) == (3, 2, 1, 0)
    pairs, counts = read_pairs(path)
    found = [(pair.prompt, round(shade(pair.winner), -1), round(shade(pair.loser), -1), pair.weight) for pair in pairs]
    assert found == [("a", 50, 0, 1), ("a", 50, 100, 1), ("a", 100, 0, 1), ("b", 0, 100, 1), ("b", 50, 100, 1)]
    assert (counts.rows, counts.used, counts.ties) == (3, 5, 1)
    assert pairs[0].id.endswith("[1>0]") and len({pair.id for pair in pairs}) == 5


def test_fractions_won_equal_those_of_the_objective():
    import torch

    from diffusion_align.objectives import win_counts

    scores = torch.randint(0, 4, (3, 50, 6), generator=torch.Generator().manual_seed(1)).double()
    for place in range(50):
        assert fractions_won(scores[:, place].tolist()) == tuple(win_counts(scores[:, place : place + 1])[0].tolist())


def kohya(root):
    pictures(root, "10_cats/0.png", "10_cats/100.png")
    (root / "10_cats/0.txt").write_text("a\n")
    (root / "10_cats/100.txt").write_text("b")
    return root


def captioned_jsonl(root):
    pictures(root, "0.png", "100.png")
    return lines(
        root / "metadata.jsonl", [{"file_name": "0.png", "text": "a"}, {"file_name": "100.png", "text": "b"}]
    ).parent


def captioned_csv(root):
    pictures(root, "0.png", "100.png")
    return comma_separated(
        root / "metadata.csv", [{"file_name": "0.png", "prompt": "a"}, {"file_name": "100.png", "prompt": "b"}]
    ).parent


def captioned_tar(root):
    facts = json.dumps({"caption": "b", "score": 1}).encode()
    return tar(
        root / "x.tar",
        [("s/0.png", png(0)), ("s/0.txt", b"a\n"), ("s/1.webp", png(100, format="WEBP")), ("s/1.json", facts)],
    )


@pytest.mark.parametrize("make", [kohya, captioned_jsonl, captioned_csv, captioned_tar])
def test_captions_of_every_layout(tmp_path, make):
    path = make(tmp_path / "set")
    source = recognise(path)
    found = list(read_rows(source))
    assert source.layout.holds == "captions" and [row.prompt for row in found] == ["a", "b"]
    assert [shade(row.pictures[0]) for row in found] == pytest.approx([0, 100], abs=3)
    with pytest.raises(DataError, match="say nothing of what people prefer"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a\n\n b \n"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": "x"}\n{"prompt": "b"}\n'),
        ("p.json", '["a", "b"]'),
        ("objects.json", '[{"prompt": "a"}, {"prompt": "b"}]'),
        (
            "metadata.jsonl",
            '{"tag": "two", "include": [{"class": "cat"}], "prompt": "a"}\n{"tag": "x", "prompt": "b"}\n',
        ),
    ],
)
def test_prompt_lists(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert recognise(tmp_path / name).layout.holds == "prompts"
    assert texts(tmp_path / name) == ["a", "b"]
    with pytest.raises(DataError, match="say nothing of what people prefer"):
        read_rankings(tmp_path / name)


def test_other_tables_are_refused_as_prompts(tmp_path):
    with pytest.raises(DataError, match="not prompts; give a .txt"):
        texts(jsonl_of_paths(tmp_path))
    with pytest.raises(DataError, match=r"p.jsonl:2 the prompt is int"):
        texts(lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": 3}]))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="holds no rows"):
        texts(tmp_path / "empty.json")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"prompt": ["a"], "chosen": [b"x"]},
            "column 'rejected' (or 'rejected_file_name') is missing; it has 'prompt', 'chosen'",
        ),
        ({"prompt": ["a"], "image1": [b"x"], "image2": [b"x"]}, "'weighted_results_image1_preference' is missing"),
        ({"prompt": ["a"], "images": [[b"x"]], "rnks": [[1]]}, "did you mean 'rnks'? rename it to 'ranks'"),
        ({"prompt": ["a"], "picture": [b"x"]}, "is missing; it has 'prompt', 'picture'"),
        ({"x": [1]}, "(nearest layout: "),
    ],
)
def test_unknown_columns_name_the_nearest_layout(tmp_path, capsys, columns, said):
    path = table(tmp_path / "x.parquet", **columns)
    with pytest.raises(DataError) as caught:
        recognise(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert main(["data", "inspect", str(path)]) == 1
    assert said in capsys.readouterr().err


def test_half_a_pair_is_no_prompt(tmp_path):
    """A list that means to compare pictures and lacks a key is not taken for prompts with more beside them."""
    for row in ({"prompt": "a", "chosen": "0.png"}, {"prompt": "a", "path1": "0.png"}, {"text": "a", "jpg_0": "0.png"}):
        with pytest.raises(DataError, match="is missing; it has"):
            recognise(lines(tmp_path / "x.jsonl", [row]))


def test_folders_that_hold_nothing_or_two_things(tmp_path):
    with pytest.raises(DataError, match="holds both metadata.jsonl and metadata.csv"):
        folder_csv(folder_jsonl(tmp_path / "both"))
        recognise(tmp_path / "both")
    with pytest.raises(DataError, match="holds both x.parquet and 00000.tar"):
        chosen_rejected(pick_a_pic_tar(tmp_path / "mixed"))
        recognise(tmp_path / "mixed")
    (tmp_path / "images.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it first"):
        recognise(tmp_path / "images.tar.gz")
    only = pictures(tmp_path / "alone", "0.png")
    with pytest.raises(DataError, match="found 0.png"):
        recognise(tmp_path / "alone")
    assert only is None


def test_splits_of_lists_and_tables(tmp_path):
    folder = hpdv2_train(tmp_path / "hpd")
    dump(folder / "test.json", [{"prompt": "t", "image_path": ["train/0.jpg", "train/10.jpg"], "rank": [1, 2]}])
    dump(folder / "anime.json", ["a prompt of the benchmark"])
    assert [pair.prompt for pair in read_pairs(folder)[0]] == ["a", "b"]
    assert [pair.prompt for pair in read_pairs(folder, split="test")[0]] == ["t"]
    with pytest.raises(DataError, match="holds no split 'validation', only test, train"):
        recognise(folder, "validation")


def test_a_long_json_list_is_read_in_chunks(tmp_path, monkeypatch):
    """With pieces of 7 characters every number, text and space is cut somewhere."""
    from diffusion_align.data.rows.tables import json_rows, table_rows

    monkeypatch.setattr(json_rows, "_CHARACTERS_AT_A_TIME", 7)
    values = [{"prompt": f"p{i}" * (i % 5), "n": i * 10**i, "u": 'é\u2028"]},['} for i in range(40)]
    path = tmp_path / "x.json"
    path.write_text("  [ " + " ,\n".join(json.dumps(value) for value in values) + "  ]  ", encoding="utf-8")
    assert [row for _, row in table_rows._rows(path)] == values
    text = path.read_text()
    for cut in range(0, len(text) - 4, 97):
        path.write_text(text[:cut])
        with pytest.raises(DataError, match=r"x.json: (is not a JSON list|item \d+ is no JSON)"):
            list(table_rows._rows(path))


def test_inspect_describes_a_set_and_its_uses(tmp_path, capsys):
    path = rapidata(tmp_path)
    assert main(["data", "inspect", str(path)]) == 0
    said = capsys.readouterr().out
    for line in (
        "layout     Rapidata, in rapidata.parquet",
        "image1, image2",
        "not read: detailed_results_preference",
        "rows       3\n",
        "pairs      2\n",
        "ties       1, dropped; a tie: both votes equal",
        "weights    |v1 - v2| / (v1 + v2); here 0.5 to 1",
        "broken     0",
        f"diffusion-align train dpo --model MODEL --train_data_dir {path}",
    ):
        assert line in said, line
    bad = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": None}, "{", {"prompt": "b"}])
    assert main(["data", "inspect", str(bad)]) == 0
    said = capsys.readouterr().out
    assert (
        "broken     2\n           p.jsonl:2: the prompt is NoneType, not text\n           p.jsonl:3: is not JSON"
        in said
    )
    assert f"train d3po --model MODEL --reward NAME --prompts {bad}" in said


def test_inspect_imports_no_torch(tmp_path):
    import subprocess
    import sys

    path = rapidata(tmp_path)
    program = (
        f"import sys; from diffusion_align.cli import main; code = main(['data', 'inspect', {str(path)!r}]); "
        "print('HEAVY', [name for name in ('torch', 'PIL', 'diffusers') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_invalid_text_is_a_bad_row(tmp_path):
    """Arrow does not check that a parquet file's texts are UTF-8."""
    raw = pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary()).view(pa.string())
    picture = structs([0, 1, 2])
    path = table(tmp_path / "x.parquet", prompt=raw, chosen=picture, rejected=picture)
    pairs, counts = read_pairs(path, max_bad_fraction=0.5)
    assert [pair.prompt for pair in pairs] == ["good", "also good"]
    assert counts.bad_rows[0].row == "x.parquet:1" and "UnicodeDecodeError, not text" in counts.bad_rows[0].reason


def test_pictures_that_lie_elsewhere_in_the_folder_do_not_let_others_in(tmp_path):
    """HPDv2 names pictures in train/; a train that is a link out of the folder is refused like any such path."""
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "0.jpg")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train").symlink_to(tmp_path / "outside")
    dump(folder / "train.json", [{"prompt": "a", "file_path": ["0.jpg", "0.jpg"], "human_preference": [0, 1]}])
    with pytest.raises(DataError, match="leads outside"):
        read_pairs(folder, max_bad_fraction=1)


def test_trainings_plan_with_every_kind(tmp_path, capsys):
    """`train dpo` and `train rankdpo` take a layout as it is, and count in their plan what inspect counts."""
    for verb in ("dpo", "rankdpo"):
        for path in (pick_a_pic_tar(tmp_path / verb / "tars"), rapidata(tmp_path / verb)):
            assert main(["train", verb, "--model", "owner/name", "--data", str(path), "--dry-run"]) == 0
            assert f"3 rows: 2 {'pairs' if verb == 'dpo' else 'rankings'}, 1 ties dropped" in capsys.readouterr().out
    path = hpdv2_test(tmp_path / "hpd")
    assert main(["train", "dpo", "--model", "owner/name", "--data", str(path), "--dry-run"]) == 0
    assert "3 rows: 5 pairs, 1 ties dropped, 0 bad" in capsys.readouterr().out


def test_online_verbs_read_json_lists_of_prompts(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "negative_prompt": "c"}]
    assert prompts_of_a_verb(str(lines(tmp_path / "p.jsonl", rows))) == ["a", "b"]
    assert prompts_of_a_verb(str(dump(tmp_path / "p.json", ["a", "b"]))) == ["a", "b"]
    (tmp_path / "p.txt").write_text("a\n b\n")
    assert prompts_of_a_verb(str(tmp_path / "p.txt")) == ["a", "b"]


def test_the_fingerprint_tells_members_of_an_archive_apart(tmp_path):
    pair = read_pairs(pick_a_pic_tar(tmp_path))[0][0]
    names = [fingerprint([one]) for one in (pair, replace(pair, loser=pair.winner), replace(pair, id="other"))]
    assert names[0] == names[2] != names[1]
