"""Files that nobody vouches for, given to the commands that take them: a smoke test of `stress.files`; and secrets."""

import json
import os
import pickle
import struct
import sys
import zipfile

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers_data import lines, png, table, tar
from helpers_tiny import make_tiny_folder
from PIL import Image
from stress import files
from stress.hostile import bombs, cases

from diffusion_align.cli import main
from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.images import ImageError, decode_image
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.recognise import recognise
from diffusion_align.data.rows.tables.json_rows import MAX_ROW
from diffusion_align.models.hub import checked
from diffusion_align.rewards import weight_files
from diffusion_align.rewards.weight_files import read_weights
from diffusion_align.system.plain_json import require_modest, require_no_code
from diffusion_align.system.printable import printable

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks")


def test_a_table_with_checksums_never_changes_without_a_word():
    outcomes, wrong = files.damaged_tables(60, checksums=True)
    assert wrong == [] and all(outcomes[what] for what in ("as before", "refused", "rows reported"))


def test_a_table_without_checksums_is_still_read_or_refused_in_one_line():
    outcomes, wrong = files.damaged_tables(60, checksums=False)
    assert sum(outcomes.values()) == 60 and all(line.endswith("changed silently") for line in wrong)


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "pairs.parquet"
    data = bytearray(files.pairs(path, checksums=True))
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"pairs.parquet: row group 1 is damaged \(.*CRC"):
        list(read_rows(recognise(path)))


@linux
@pytest.mark.parametrize("name", bombs.BOMBS)
def test_decompression_bombs_are_refused(name):
    said, spent, grown = bombs.bomb(name)
    assert not said.startswith(("DECODED", "the process")) and "\n" not in said
    assert grown <= bombs.MIB and spent <= 20 * bombs.MS  # a machine of many tests is slow


def test_expensive_pictures_are_refused_with_the_reason():
    for name, word in (
        ("PNG, 79 million pixels in 230 kB", "pixels in"),
        ("PNG with 63 texts of a megabyte", "63 packed texts"),
        ("PNG with 63 international texts", "63 packed texts"),
        ("TIFF of 64 x 64 with a tile of 30k x 30k", "tiles of 30,000 x 30,000"),
        ("JPEG of 16 million pixels in 5000 scans", "5,001 scans"),
    ):
        with pytest.raises(ImageError, match=word):
            decode_image(bombs.BOMBS[name]())


def test_large_flat_and_described_pictures_of_people_are_read(tmp_path):
    """4000 x 4000 in white, ten texts, ten scans: all of it usual."""
    assert decode_image(bombs.png(4000, 4000, pixels=bombs.zeros(45, 818_080))).size == (4000, 4000)
    row = b"\0" * 193 * 64
    texts = bombs.texts(10, b"iTXt", b"\0\1\0\0\0")
    assert decode_image(bombs.png(64, 64, texts, bombs.zeros(0, len(row)))).size == (64, 64)
    assert decode_image(bombs.progressive(800, 10)).size == (800, 800)
    Image.new("L", (512, 512)).save(tmp_path / "x.tif", tiffinfo={322: 256, 323: 256}, compression="tiff_deflate")
    assert decode_image((tmp_path / "x.tif").read_bytes()).size == (512, 512)


CASES = ["a torch zip that calls the shell", "a zip bomb", "an open clip folder that trusts itself",
         "a text encoder with a program", "a kernel from elsewhere", "weights in a file outside",
         "yaml that calls the shell", "a configuration that names a reward in python", "a checkpoint with paths",
         "a parquet type that is a pickle", "lines that call the shell", "annotations of pictures outside",
         "a name that clears the screen"]  # fmt: skip


@linux
def test_files_that_carry_programs_are_refused_and_nothing_runs():
    assert cases.traps_work()
    outcomes = files.corpus(CASES)
    assert {outcome.name: outcome.fault(files.CORPUS_MIB) for outcome in outcomes} == dict.fromkeys(CASES)
    assert sum(bool(outcome.code) for outcome in outcomes) >= len(CASES) - 1


def test_there_are_enough_hostile_files():
    assert len(cases.CASES) >= 60 and len(bombs.BOMBS) >= 15


def test_outcomes_describe_their_failure():
    """The judge of the corpus: what it must not let through."""
    fine = cases.Outcome("x", False, 1, ["x: error: no"], 0.1, 1.0)
    assert fine.fault(10) is None
    for change in ({"ran": True}, {"code": None}, {"grown_mib": 11.0}, {"errors": []}, {"errors": ["a", "b"]},
                   {"errors": ["a\x1b[2J"]}, {"errors": ["Traceback"]}):  # fmt: skip
        assert cases.Outcome(**(vars(fine) | change)).fault(10) is not None, change


def zipped(path, *members, packed=False):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("members", "packed", "word"),
    [
        ([("a/data.pkl", b"x"), ("a/data/0", b"0" * 999)], True, "is packed"),
        ([("a/data.pkl", b"x"), ("../x", b"")], False, "the path"),
        ([("a/data.pkl", b"x"), ("/x", b"")], False, "the path"),
        ([("a/data.pkl", b"x"), ("C:\\x", b"")], False, "the path"),
        ([("a/data.pkl", b"x" * 1001)], False, "1,001 bytes of keys"),
        ([(f"a/{n}", b"") for n in range(11)], False, "11 members"),
    ],
)
def test_a_zip_that_torch_would_not_write_is_refused_before_torch_reads_it(
    tmp_path, monkeypatch, members, packed, word
):
    monkeypatch.setattr(weight_files, "MAX_PICKLE", 1000)
    monkeypatch.setattr(weight_files, "MAX_MEMBERS", 10)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch read it"))
    with pytest.raises(ValueError, match=word):
        read_weights(zipped(tmp_path / "w.pt", *members, packed=packed))


def test_members_over_one_another_and_files_over_the_limit_are_refused(tmp_path, monkeypatch):
    path = zipped(tmp_path / "w.pt", ("a/data.pkl", b"x" * 4000))
    data = path.read_bytes()
    start = data.index(b"PK\1\2")
    entry, end = data[start : data.index(b"PK\5\6")], bytearray(data[data.index(b"PK\5\6") :])
    other = entry.replace(b"a/data.pkl", b"a/data.pk2")
    struct.pack_into("<HHI", end, 8, 2, 2, 2 * len(entry))
    path.write_bytes(data[:start] + entry + other + end)
    with pytest.raises(ValueError, match="lie over one another"):
        read_weights(path)
    monkeypatch.setattr(weight_files, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="over 100"):
        read_weights(path)


def test_what_people_save_is_read(tmp_path):
    """Halves, shared and transposed weights, an empty one, both formats; the path of the zip is the file's own name."""
    shared = torch.arange(6.0)
    weights = {"a": shared.view(2, 3).T, "b": shared[1:3], "c": torch.zeros(0), "d": torch.ones(2).half()}
    for legacy in (False, True):
        path = tmp_path / f"my model: v{legacy}.pt"
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=not legacy)
        read = read_weights(path)
        assert all(torch.equal(read[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    "content",
    [{"auto_map": {"AutoModel": "x.Y"}}, {"a": [{"trust_remote_code": True}]}, {"custom_pipeline": "x"},
     {"text_config": {"_attn_implementation": "owner/kernel"}}],
)  # fmt: skip
def test_configurations_that_request_code_are_refused(content):
    with pytest.raises(ValueError, match="never"):
        require_no_code("c.json", content)


def test_published_configurations_pass():
    content = {"trust_remote_code": False, "auto_map": None, "_attn_implementation": "sdpa", "betas": [0.1] * 1000}
    content |= {"lambda_min_clipped": float("-inf"), "vocab_size": 49408, "num_hidden_layers": 32, "scale": 1e-5}
    require_no_code("c.json", content)
    require_modest("c.json", content)
    for wrong in ({"num_hidden_layers": 201}, {"a": {"b": [10**8]}}, {"x": -(10**8)}, {"betas": [0] * 10_001}):
        with pytest.raises(ValueError, match="c.json"):
            require_modest("c.json", wrong)


def test_a_model_says_which_file_and_key_are_refused(tmp_path):
    folder = make_tiny_folder(tmp_path / "model")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"a": "b.c"}}))
    with pytest.raises(ValueError, match="unet/config.json sets auto_map: it asks for code"):
        checked(folder)


def test_an_index_may_only_name_files_beside_it(tmp_path):
    folder = make_tiny_folder(tmp_path / "model")
    index = folder / "unet" / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x-00001-of-00002.safetensors"}}))
    checked(folder)
    for name in ("../../outside.safetensors", "/etc/passwd", "a\\b", "..", "", 1):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="index.json names the file .* not in this folder"):
            checked(folder)


def test_tensors_that_are_not_in_the_file_are_refused(tmp_path):
    for weight, word in (
        (torch.zeros(1).expand(10**6, 10**6), "'a' says it has 1,000,000,000,000 values"),
        (torch.empty(10**9, device="meta"), "'a' is no plain tensor"),
    ):
        torch.save({"a": weight}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=word):
            read_weights(tmp_path / "w.pt")


def test_what_a_person_or_a_file_says_is_printable_in_an_error(capsys):
    assert main(["train", "dpo", "--config", f"{HOSTILE}.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and "\\x1b[2J" in line


def test_control_characters_are_written_out():
    assert printable("a\x1b[2J\n\u202eb\x9b\ud800") == "a\\x1b[2J\\n\\u202eb\\x9b\\ud800"
    for text in ("plain", "é 日本 🦊", "\U0001f469\u200d\U0001f4bb", "a\u00a0b"):
        assert printable(text) == text


HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e\rgone\x9b31m"


def test_names_and_captions_do_not_act_on_the_terminal(tmp_path, capsys):
    good = {"prompt": HOSTILE, "chosen": "0.png", "rejected": "1.png", HOSTILE: 1}
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png(int(name[0])))
    bad = [{**good, "chosen": HOSTILE}, {**good, "prompt": [HOSTILE]}]
    sets = [lines(tmp_path / "x.jsonl", [good, good, *bad]), tmp_path / "x.tar"]
    tar(sets[1], [("0.png", png(1)), ("0.txt", b"fine"), (f"{HOSTILE}.png", png(1)), (f"0.{HOSTILE}", b"x")])
    sets.append(table(tmp_path / "x.parquet", caption=[HOSTILE], jpg_0=[png(1)], jpg_1=[b""], label_0=[1.0],
                      label_1=[0.0], **{HOSTILE: [1]}))  # fmt: skip
    archive = recognise(sets[1])
    assert list(read_rows(archive)) and all(suffix.isprintable() for suffix in archive.unread)
    named = tmp_path / f"{HOSTILE}.jsonl"
    sets.append(lines(named, [good, *bad]))
    for path in sets:
        main(["data", "inspect", str(path)])
        main(["data", "check", str(path), "--bad_rows", str(tmp_path / "bad.jsonl")])
        found = capsys.readouterr()
        # The bar of `check` moves its own cursor; what a stranger wrote must not.
        said = found.out + "\n".join(line for line in found.err.splitlines() if "diffusion-align:" in line)
        assert "layout" in said
        assert not [c for c in said.replace("\n", "") if not c.isprintable()], repr(said)


def test_rows_and_errors_of_the_data_floor_are_printable():
    assert BadRow(HOSTILE, HOSTILE).row.isprintable() and BadRow("x", HOSTILE).reason.isprintable()
    assert str(DataError(HOSTILE)).isprintable()


def test_endless_lines_are_not_buffered(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}\n' + b" " * (MAX_ROW + 1))
    with pytest.raises(DataError, match="line 2 is over"):
        list(read_rows(recognise(path)))


TOKEN = "hf_FakeTokenOfATestAbcdefghijkl"


@pytest.fixture
def secrets(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "DIFFUSION_ALIGN_REWARD_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def holding(folder, text):
    """The files below a folder in which a text stands, in bytes or as a name."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_token_is_in_no_file_and_no_line_that_a_run_writes(tmp_path, secrets, capsys, caplog):
    """On the command line and in the environment at once, with a tracker that writes its configuration to disk."""
    prompt = "$(touch canary) `touch canary` ../../up; \x1b[2J"
    pairs = table(tmp_path / "pairs.parquet", caption=[prompt] * 2, jpg_0=[png(1, (32, 32))] * 2,
                  jpg_1=[png(2, (32, 32))] * 2, label_0=[1.0] * 2, label_1=[0.0] * 2)  # fmt: skip
    model, run = make_tiny_folder(tmp_path / "model"), tmp_path / "run"
    words = f"""train dpo --model {model} --train_data_dir {pairs} --output_dir {run} --max_train_steps 1 --device cpu
        --train_batch_size 2 --validation_sampling_steps 1 --report_to tensorboard --hub_token {TOKEN}""".split()
    before = set(tmp_path.iterdir())
    assert main(words) == 0
    assert main([*words, "--dry_run", "--overwrite_output_dir"]) == 0
    assert main(["train", "dpo", "--hub_tokn", TOKEN]) == 2 and main(["train", "dpo", f"--hub_tokn={TOKEN}"]) == 2
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err + caplog.text
    assert any((run / "logs").rglob("*tfevents*")) and (run / "config.yaml").exists()
    assert holding(tmp_path, TOKEN) == []
    # Nor does a caption choose a file's name, or a place.
    assert set(tmp_path.iterdir()) - before == {run} and not list(tmp_path.rglob("*canary*"))
    assert all("touch" not in path.name and path.name.isprintable() for path in tmp_path.rglob("*"))


def test_the_look_for_a_token_finds_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"\0" + TOKEN.encode())
    assert holding(tmp_path, TOKEN) == [tmp_path / "a" / "b"]


def test_payloads_are_written_and_never_run(tmp_path):
    """The trap itself: pickling it runs nothing, unpickling it does."""
    trap = cases.Trap(tmp_path / "canary")
    data = pickle.dumps(trap)
    assert not trap.canary.exists()
    pickle.loads(data)
    assert trap.canary.exists() and os.path.getsize(trap.canary) == 0
