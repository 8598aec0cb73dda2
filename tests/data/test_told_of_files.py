"""What a person says of files on the command line, and what commands say of broken pictures and hidden files."""

import json

import pytest
from helpers_data import comma_separated, dump, lines, pictures, png, structs, table

from diffusion_align.cli import main
from diffusion_align.commands.train.items import read_items
from diffusion_align.methods import dpo
from diffusion_align.options import TrainDpo


def set_of(root, names=("what", "good one", "bad one"), encoding="utf-8", prompt="it’s a cat"):
    pictures(root, "1.png", "2.png")
    text = ",".join(names) + f"\n{prompt},1.png,2.png\n"
    path = root / "pairs.csv"
    path.write_bytes(text.encode(encoding))
    return path


MAPPED = ["--columns", "prompt=what", "--columns", "chosen=good one", "--columns=rejected=bad one"]


@pytest.mark.parametrize("verb", ["inspect", "check", "convert"])
def test_each_verb_takes_columns_and_an_encoding(tmp_path, capsys, verb):
    path = set_of(tmp_path / "set", encoding="cp1252")
    more = {"check": ["--bad_rows", str(tmp_path / "bad")], "convert": ["--out", str(tmp_path / "out")]}.get(verb, [])
    argv = ["data", verb, str(path), *more]
    assert main(argv) == 1
    assert "likely in Windows-1252: give the encoding cp1252" in capsys.readouterr().err
    argv += ["--encoding", "cp1252"]
    assert main(argv) == 1
    assert "it has 'what', 'good one', 'bad one'" in capsys.readouterr().err
    assert main([*argv, *MAPPED]) == 0
    said = capsys.readouterr().out
    assert {"inspect": "pairs      1", "check": "1 good", "convert": "1 rankings written"}[verb] in said
    if verb == "inspect":
        assert "columns read under other names: what as prompt, good one as chosen, bad one as rejected" in said
        assert "--columns 'chosen=good one'" in said and "--encoding cp1252" in said


def test_a_training_takes_them_too(tmp_path):
    path = set_of(tmp_path / "set", encoding="cp1252")
    columns = ("prompt=what", "chosen=good one", "rejected=bad one")
    o = TrainDpo(pretrained_model_name_or_path="tiny", train_data_dir=str(path), columns=columns, encoding="cp1252")
    (pair,) = read_items(dpo.METHOD, o).items
    assert pair.prompt == "it’s a cat" and pair.winner.name == "1.png"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--columns", "good one"], "'good one' is not OURS=THEIRS, such as chosen=winner_path"),
        (["--columns", "=x"], "'=x' is not OURS=THEIRS"),
        (["--columns", "chosen=a", "--columns", "chosen=b"], "says twice what chosen is"),
        (["--columns", "good=chosen"], "'good' is no column of a layout; did you mean chosen=good?"),
        (["--columns", "left=x"], "'left' is no column of a layout; they have"),
        (["--encoding", "cp12520"], "is no encoding of text that Python knows, such as cp1252"),
        (["--encoding", "base64"], "is no encoding of text that Python knows, such as cp1252"),
    ],
)
def test_what_is_said_wrongly_is_one_line(tmp_path, capsys, words, said):
    path = set_of(tmp_path / "set")
    train = ["train", "dpo", "--model", "tiny", "--train_data_dir", str(path), "--dry-run"]
    for argv in (["data", "inspect", str(path)], train):
        assert main([*argv, *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


BROKEN = {
    "second of a loser": ({"label_0": [0.0], "label_1": [1.0]}, "jpg_1 cannot be decoded"),
    "second of a winner": ({"label_0": [1.0], "label_1": [0.0]}, "jpg_1 cannot be decoded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_picture_of_a_table_is_named_by_its_column(tmp_path, capsys, case):
    labels, reason = BROKEN[case]
    broken = [png(2)[:40]]
    path = table(tmp_path / "x.parquet", caption=["a"], jpg_0=[png(1)], jpg_1=broken, **labels)
    assert main(["data", "check", str(path), "--bad_rows", str(tmp_path / "bad")]) == 1
    assert f"x.parquet:0 picture {reason}" in capsys.readouterr().err
    chosen = table(tmp_path / "y.parquet", prompt=["a"], winner=structs([1]), loser=broken)
    assert main(["data", "check", str(chosen), "--bad_rows", str(tmp_path / "bad")]) == 1
    assert "y.parquet:0 picture loser cannot be decoded" in capsys.readouterr().err


def test_a_broken_picture_of_a_list_is_named_by_its_file_or_place(tmp_path, capsys):
    pictures(tmp_path, "1.png")
    (tmp_path / "cut.png").write_bytes(png(2)[:40])
    rows = [{"prompt": "a", "file_path": ["1.png", "cut.png"], "human_preference": [0, 1]}]
    assert main(["data", "check", str(dump(tmp_path / "x.json", rows)), "--bad_rows", str(tmp_path / "bad")]) == 1
    assert "picture cut.png cannot be decoded" in capsys.readouterr().err
    path = table(tmp_path / "y" / "x.parquet", prompt=["a"], images=[[png(1), png(2)[:40]]], relevance=[[0.0, 1.0]])
    assert main(["data", "check", str(path), "--bad_rows", str(tmp_path / "bad")]) == 1
    assert "picture images[1] cannot be decoded" in capsys.readouterr().err


def test_hidden_files_are_counted_by_inspect(tmp_path, capsys):
    pictures(tmp_path, "1.png", "2.png")
    comma_separated(tmp_path / "pairs.csv", [{"prompt": "a", "chosen": "1.png", "rejected": "2.png"}])
    for name in (".DS_Store", "._1.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\x00")
    assert main(["data", "inspect", str(tmp_path)]) == 0
    assert "hidden     3 files or folders left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["typo", "typo/", "me/typo", "me/typo.jsonl", "~/no_such_pairs"])
def test_a_path_that_is_missing_never_asks_the_hub(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion_align.commands.data.fetch.fetch_pairs", lambda *a, **k: pytest.fail("asked"))
    for argv in (["data", "inspect", name], ["train", "dpo", "--model", "tiny", "--train_data_dir", name, "--dry-run"]):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert "no such" in error and error.count("\n") == 1


CHAT = [{"role": "user", "content": "a cat"}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "X.JSONL"])
def test_lists_of_prompts_take_the_same_forms(tmp_path, name):
    import gzip

    from diffusion_align.data.prompts import read_list

    text = "".join(json.dumps(row) + "\n" for row in [{"prompt": CHAT, "tag": "x"}, {"prompt": "a dog"}])
    data = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    assert [prompt.text for prompt in read_list(tmp_path / name)] == ["a cat", "a dog"]


def test_a_folder_of_prompts_leaves_hidden_files_out(tmp_path):
    from diffusion_align.data.prompts import read_list

    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "2.TXT").write_text("a dog")
    (tmp_path / "._1.txt").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "Thumbs.db").write_bytes(b"\x00")
    assert [prompt.text for prompt in read_list(tmp_path)] == ["a cat", "a dog"]


def test_a_prompt_with_a_comma_outside_quotes_is_refused_not_cut(tmp_path):
    from diffusion_align.data.bad_rows import DataError
    from diffusion_align.data.prompts import read_list

    path = tmp_path / "x.csv"
    path.write_text("prompt,tag\na cat, on a mat,x\n")
    with pytest.raises(DataError, match="has 3 cells for 2 columns: put texts with separators into quotation marks"):
        read_list(path)
    path.write_text('prompt,tag\n"a cat, on a mat",x\n')
    assert [prompt.text for prompt in read_list(path)] == ["a cat, on a mat"]


def test_an_old_list_reads_as_before(tmp_path):
    """Columns that fit a layout by themselves are never renamed."""
    pictures(tmp_path, "1.png", "2.png")
    row = {"prompt": "a", "chosen": "1.png", "rejected": "2.png", "winner": "x", "loser": "y", "Prompt": "no"}
    o = TrainDpo(train_data_dir=str(lines(tmp_path / "x.jsonl", [row])))
    (pair,) = read_items(dpo.METHOD, o).items
    assert (pair.prompt, pair.winner.name) == ("a", "1.png")
