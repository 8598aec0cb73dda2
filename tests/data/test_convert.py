"""`data convert` and `data check`: the same rows in the project's own layout, also when killed; what is broken."""

import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import STRUCT, dump, lines, pictures, png, structs, table, tar
from transformers import CLIPTokenizer

from diffusion_align.cli import main
from diffusion_align.commands.data import check
from diffusion_align.commands.data import convert as converting
from diffusion_align.commands.data.summary import summarise_data
from diffusion_align.data import read_pairs, read_rankings
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.pairs_and_rankings import DataRow
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.recognise import recognise
from diffusion_align.models.hub import asset
from diffusion_align.models.prompts.token_limit import tokenizers_in
from diffusion_align.system import progress

VOTES = [0.7, 0.25, 0.5, 1.0, 0.6]


def rapidata(path, count=5, broken=()):
    """Pairs with votes; pictures of the shades i and 100 + i; a broken one has no bytes."""
    left = [{"bytes": None if i in broken else png(i % 100), "path": "elsewhere.png"} for i in range(count)]
    votes = [VOTES[i % 5] for i in range(count)]
    return table(
        path,
        prompt=[f"p{i}" for i in range(count)],
        image1=pa.array(left, STRUCT),
        image2=structs([100 + i % 100 for i in range(count)]),
        model1=["x"] * count,
        model2=["y"] * count,
        weighted_results_image1_preference=votes,
        weighted_results_image2_preference=[1 - vote for vote in votes],
    )


def convert(path, out, *more):
    return main(["data", "convert", str(path), "--out", str(out), *more])


def meaning(path):
    """What a training learns from, without ids."""
    pairs, _ = read_pairs(path)
    rankings, _ = read_rankings(path)
    return (
        [(pair.prompt, read_bytes(pair.winner), read_bytes(pair.loser), pair.weight) for pair in pairs],
        [(one.prompt, [read_bytes(p) for p in one.pictures], one.relevance, one.scores) for one in rankings],
    )


def own(path):
    return [row for row in read_rows(recognise(path)) if isinstance(row, DataRow)]


@pytest.mark.parametrize("to", ["pairs", "rankings"])
def test_soft_pairs_mean_the_same_afterwards(tmp_path, capsys, to):
    path = rapidata(tmp_path / "set" / "x.parquet")
    assert convert(path, tmp_path / "out", "--to", to, "--rows_per_shard", "2") == 0
    assert "5 rows: 4 " in capsys.readouterr().out
    assert meaning(tmp_path / "out") == meaning(path)
    # 0.7 to 0.3 is a weight of 0.4, 0.25 to 0.75 of 0.5 for the second, 1 to 0 of 1, 0.6 to 0.4 of 0.2.
    assert [row.weight for row in own(tmp_path / "out")] == pytest.approx([0.4, 0.5, 1, 0.2])
    assert [row.models for row in own(tmp_path / "out")] == [("x", "y"), ("y", "x"), ("x", "y"), ("x", "y")]
    assert {row.source for row in own(tmp_path / "out")} == {"Rapidata"}
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["bad_rows.jsonl", "convert.json", "rows-00000.parquet", "rows-00001.parquet"]
    assert pq.read_schema(tmp_path / "out" / "rows-00000.parquet").names == converting.SCHEMA.names


def test_rankings_of_files_and_their_pairs(tmp_path):
    """Scores (1, 3, 2) and (5, 4, 4): shares 1/2, 1/2, 1/4, so that two pairs are decided."""
    pictures(tmp_path / "set", "0.png", "1.png", "2.png")
    row = {
        "prompt": "a",
        "images": [f"{i}.png" for i in range(3)],
        "scores": [[1, 3, 2], [5, 4, 4]],
        "models": [*"xyz"],
    }
    path = lines(tmp_path / "set" / "x.jsonl", [row])
    assert convert(path, tmp_path / "lists") == convert(path, tmp_path / "pairs", "--to=pairs") == 0
    assert meaning(tmp_path / "lists") == meaning(path)
    (row,) = own(tmp_path / "lists")
    assert row.relevance == (0.5, 0.5, 0.25) and row.scores == ((1, 3, 2), (5, 4, 4)) and row.models == ("x", "y", "z")
    assert meaning(tmp_path / "pairs")[0] == meaning(path)[0]
    assert [row.models for row in own(tmp_path / "pairs")] == [("x", "z"), ("y", "z")]


def test_a_flipped_bit_in_a_shard_is_noticed(tmp_path):
    """In the bytes of a caption, where without page checksums nothing would tell."""
    rapidata(tmp_path / "soft.parquet")
    assert convert(tmp_path / "soft.parquet", tmp_path / "out") == 0
    (shard,) = (tmp_path / "out").glob("*.parquet")
    data = bytearray(shard.read_bytes())
    caption = read_rankings(shard)[0][0].prompt.encode()
    assert caption in data
    data[data.index(caption)] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OSError, match="CRC|checksum"):
        pq.ParquetFile(shard, page_checksum_verification=True).read()


def shards(out):
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.parquet")) + [out / "bad_rows.jsonl"]}


def test_a_killed_conversion_goes_on_and_ends_the_same(tmp_path, capsys):
    path = rapidata(tmp_path / "x.parquet", 400, broken=range(0, 400, 50))
    words = ["--rows_per_shard", "20", "--max_bad_fraction", "0.1"]
    assert convert(path, tmp_path / "whole", *words) == 0
    out = tmp_path / "killed"
    program = """
import os, signal, sys, threading
from diffusion_align.commands.data import convert as c
from diffusion_align.cli import main
write, started, when = c._write, [], sys.argv.pop(1)
def counted(*a):
    started.append(a)
    if len(started) == 4:
        if when == "during":
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGKILL)).start()
        elif when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
    result = write(*a)
    if len(started) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
c._write = counted
sys.exit(main(sys.argv[1:]))
"""
    had = 0
    for when in ("before", "during", "after"):  # its fourth shard; during: wherever the signal meets it
        argv = [sys.executable, "-c", program, when, "data", "convert", str(path), "--out", str(out), *words]
        killed = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert killed.returncode == -signal.SIGKILL
        assert not json.loads((out / "convert.json").read_text())["complete"]
        assert len(list(out.glob("rows-*"))) >= had + 3
        had = len(list(out.glob("rows-*")))
        with pytest.raises(DataError, match="data convert has not finished; the same command goes on"):
            read_pairs(out)
    for shard in out.glob("rows-*"):
        assert pq.read_table(shard).num_rows > 0  # none is half a file
    assert convert(path, out, *words) == 0
    assert shards(out) == shards(tmp_path / "whole")
    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert convert(path, out, *words) == 0  # nothing is left to do, and it says the same
    said = capsys.readouterr().out
    assert "400 rows: 312 rankings written, 80 ties dropped, 8 bad" in said
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert len((out / "bad_rows.jsonl").read_text().splitlines()) == 8


def test_unreadable_rows_are_listed_and_limited(tmp_path, capsys):
    path = rapidata(tmp_path / "x.parquet", 20, broken=(3, 8))
    assert convert(path, tmp_path / "out", "--max_bad_fraction", "0.05") == 1
    assert "2 of 20 rows are bad" in capsys.readouterr().err
    with pytest.raises(DataError, match="has not finished"):
        recognise(tmp_path / "out")
    assert convert(path, tmp_path / "out", "--max_bad_fraction", "0.1") == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == ["x.parquet:3", "x.parquet:8"]
    assert "image1 holds no picture bytes" in listed[0]["reason"]
    assert summarise_data(recognise(tmp_path / "out")).rows == 20 - 2 - 4


def test_another_conversion_is_refused(tmp_path, capsys):
    path = rapidata(tmp_path / "x.parquet")
    assert convert(path, tmp_path / "out") == 0
    assert convert(path, tmp_path / "out", "--to", "pairs") == 1
    assert "holds a conversion with other to; choose another --out" in capsys.readouterr().err
    rapidata(path, 6)
    assert convert(path, tmp_path / "out") == 1
    assert "with other data" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert convert(path, tmp_path / "mine") == 1
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a prompt")
    assert convert(tmp_path / "p.txt", tmp_path / "none") == 1
    assert "say nothing of what people prefer" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert main(["data", "convert", str(path)]) == main(["data", "convert"]) == main(["data", "check"]) == 2


def test_row_groups_end_by_their_bytes(tmp_path, monkeypatch):
    """What is in memory is a row group, whatever the length of a shard: with 200 bytes a group, two pairs of 69 fit."""
    monkeypatch.setattr(converting, "_GROUP", 200)
    alive, most = 0, 0
    real = converting._groups

    def counted(entries):
        nonlocal alive, most

        def watched():
            nonlocal alive, most
            for entry in entries:
                alive += 1
                most = max(most, alive)
                yield entry

        for group in real(watched()):
            yield group
            alive -= len(group)

    monkeypatch.setattr(converting, "_groups", counted)
    assert convert(rapidata(tmp_path / "x.parquet", 100), tmp_path / "out") == 0
    (file,) = (tmp_path / "out").glob("*.parquet")
    groups = pq.read_metadata(file)
    assert groups.num_rows == 80 and groups.num_row_groups == 40 and most == 2


def test_check_lists_what_a_training_would_leave_out(tmp_path, capsys, monkeypatch):
    """Of six rows: a good one, one with a broken picture, one without a file, one broken line, a bad prompt, one that
    compares a picture with itself."""
    folder = tmp_path / "set"
    pictures(folder, "0.png", "1.png", "2.png")
    (folder / "cut.png").write_bytes(png(3)[:40])
    pair = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    rows = [pair, {**pair, "chosen": "cut.png"}, {**pair, "rejected": "9.png"}, "{", {**pair, "prompt": 1}]
    path = lines(folder / "x.jsonl", [*rows, {**pair, "chosen": "2.png", "rejected": "2.png"}])
    listed = tmp_path / "bad.jsonl"
    words = ["data", "check", str(path), "--bad_rows", str(listed)]
    monkeypatch.setattr(progress, "SHORT", 0.0)
    assert main([*words, "--max_bad_fraction", "0.7"]) == 0
    done = capsys.readouterr()
    assert (
        "6 rows: 2 good, 0 ties, 4 bad, listed in " in done.out
        and "1 of the good rows compare a picture with itself" in done.out
    )
    assert "check: 100 %, 6 of 6" in done.err
    bad = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["row"] for row in bad] == [f"x.jsonl:{number}" for number in (2, 3, 4, 5)]
    reasons = ("picture cut.png cannot be decoded", "'9.png' does not exist", "is not JSON", "the prompt is int")
    assert all(reason in row["reason"] for reason, row in zip(reasons, bad, strict=True))
    assert main([*words, "--max_bad_fraction", "0.6"]) == 1
    said = capsys.readouterr().err
    assert "4 of 6 rows are bad" in said and "the first: x.jsonl:2" in said
    assert len(listed.read_text().splitlines()) == 4  # the list is there although the check failed


def test_check_counts_ties_and_reads_captions_and_archives(tmp_path, capsys):
    listed = f"--bad_rows={tmp_path / 'bad.jsonl'}"
    assert main(["data", "check", str(rapidata(tmp_path / "x.parquet")), listed]) == 0
    assert "5 rows: 4 good, 1 ties, 0 bad" in capsys.readouterr().out
    path = tar(tmp_path / "x.tar", [("0.png", png(0)), ("0.txt", b"a"), ("1.png", png(0)[:30]), ("1.txt", b"b")])
    assert main(["data", "check", str(path), listed]) == 1
    assert "x.tar:1 picture 1.png cannot be decoded" in capsys.readouterr().err
    dump(tmp_path / "none.json", [])
    assert main(["data", "check", str(tmp_path / "none.json"), listed]) == 1
    assert "holds no rows" in capsys.readouterr().err


def test_check_counts_the_captions_that_the_text_encoder_cuts(tmp_path, capsys, monkeypatch):
    """The embedded tokenizer reads 24 tokens, two of them begin and end; a word of the grammar is one token."""
    limit = CLIPTokenizer.from_pretrained(asset("tiny") / "tokenizer").model_max_length
    texts = [" ".join(["red"] * words) for words in (1, limit - 2, limit - 1, 3 * limit, 2)]
    members = [
        (f"{i}{end}", data) for i, text in enumerate(texts) for end, data in ((".png", png(i)), (".txt", text.encode()))
    ]
    path = tar(tmp_path / "x.tar", members)
    monkeypatch.setattr(check, "_CAPTIONS_AT_A_TIME", 2)
    words = ["data", "check", str(path), f"--bad_rows={tmp_path / 'bad.jsonl'}"]
    assert main(words) == 0 and "captions  " not in capsys.readouterr().out
    assert main([*words, "--model", "tiny"]) == 0
    assert f"2 of 5 are longer than the {limit} tokens that the text encoder reads" in capsys.readouterr().out
    assert main([*words, "--model", str(tmp_path)]) == 1
    assert "has no model_index.json" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        tokenizers_in(tmp_path)


def test_an_interrupted_conversion_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    path = rapidata(tmp_path / "x.parquet", 20)
    real = os.replace
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert convert(path, tmp_path / "out", "--rows_per_shard", "5") == 130
    assert "what is finished stays in" in capsys.readouterr().err
    monkeypatch.undo()
    assert [file.name for file in (tmp_path / "out").glob("rows-*")] == ["rows-00000.parquet"]
    assert convert(path, tmp_path / "out", "--rows_per_shard", "5") == 0 and len(own(tmp_path / "out")) == 16
