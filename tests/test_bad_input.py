"""What users get wrong, through the command: one clear line with the file or key and the cure, no traceback, nothing
lost."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_tiny import make_tiny_folder
from PIL import Image

from diffusion_align.cli import main

PAIRS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("bad") / "model")


def write_pairs(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(PAIRS):
        for side in ("chosen", "rejected"):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{side}{i}.png")
        rows.append(
            {"prompt": "a red circle", "chosen_file_name": f"chosen{i}.png", "rejected_file_name": f"rejected{i}.png"}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(model, pairs, run, *more):
    words = f"--train_batch_size 2 --max_train_steps 4 --checkpointing_steps 2 --device cpu --output_dir {run}".split()
    return main(["train", "dpo", "--model", str(model), "--train_data_dir", str(pairs), *words, *more])


def one_line(capsys, *words):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    said = [line for line in lines if all(word in line for word in words)]
    assert said, lines
    assert not any("Traceback" in line for line in lines)


def test_a_missing_column(model, tmp_path, capsys):
    table = pa.table({"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"y"], "label_O": [1.0]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    assert train(model, tmp_path / "pairs.parquet", tmp_path / "run") != 0
    one_line(capsys, "pairs.parquet", "label_0", "label_O")


def test_a_broken_image(model, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs")
    (pairs / "chosen3.png").write_bytes((pairs / "chosen3.png").read_bytes()[:200])
    assert train(model, pairs, tmp_path / "run") != 0
    one_line(capsys, "chosen3.png")
    Image.new("RGB", (32, 32)).save(pairs / "chosen3.png")
    assert train(model, pairs, tmp_path / "run") == 0


def test_an_unknown_model(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs")
    assert train(tmp_path / "no" / "model" / "here", pairs, tmp_path / "run") != 0
    one_line(capsys, "no/model/here", "diffusers format")
    assert train("runwayml/stable-diffusion-v1-6", pairs, tmp_path / "run") != 0
    one_line(capsys, "runwayml/stable-diffusion-v1-6")


def test_a_half_written_checkpoint(model, tmp_path, capsys, caplog):
    pairs = write_pairs(tmp_path / "pairs")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(model, pairs, whole) == 0
    shutil.copytree(whole, cut)
    newest = sorted(path for path in (cut / "checkpoints").iterdir() if path.is_dir())[-1]
    broken = next(newest.glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-20])
    capsys.readouterr()
    # The newest is damaged: the one before it is taken, and the run ends where the other did.
    assert train(model, pairs, cut, "--resume_from_checkpoint", "latest") == 0
    (warning,) = [record.getMessage() for record in caplog.records if broken.name in record.getMessage()]
    assert newest.name in warning and "falling back" in warning and "\n" not in warning
    ends = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, cut)]
    assert ends[0] == ends[1]
    # Asked for by name, it is refused.
    for path in newest.glob("*.safetensors"):
        path.write_bytes(b"")
    assert train(model, pairs, cut, "--resume_from_checkpoint", str(newest)) != 0
    one_line(capsys, newest.name)


def test_a_pair_with_one_picture(model, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs")
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    del rows[2]["rejected_file_name"]
    (pairs / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(model, pairs, tmp_path / "run") != 0
    one_line(capsys, "metadata.jsonl", "rejected_file_name")


def test_unknown_keys_name_the_nearest(capsys, tmp_path):
    assert main(["train", "dpo", "--learning_rte", "1e-4"]) == 2
    one_line(capsys, "learning_rte", "learning_rate")
    (tmp_path / "c.yaml").write_text("train:\n  bta_dpo: 3\n")
    assert main(["train", "dpo", "--config", str(tmp_path / "c.yaml")]) == 2
    one_line(capsys, "bta_dpo", "beta_dpo")
