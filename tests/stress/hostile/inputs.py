"""Hostile data, pictures, prompts, annotations and reports, for `data` and `evaluate`."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffusion_align.shapes import sample_captions
from stress.hostile.cases import case, write

CAPTIONS = sample_captions(2, 0)


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def check(path: Path) -> list[str]:
    return ["data", "check", str(path), "--bad_rows", str(path.parent / "bad_rows.jsonl")]


def table(path: Path, schema: pa.Schema | None = None, **columns: list) -> Path:
    pairs = {"caption": ["a"], "jpg_0": [picture(1)], "jpg_1": [picture(2)], "label_0": [1.0], "label_1": [0.0]}
    made = pa.table(pairs | columns)
    pq.write_table(made.cast(schema) if schema else made, path)
    return path


@case
def a_parquet_type_that_is_a_pickle(home, trap):
    """What pyarrow unpickled on reading until CVE-2023-47248."""
    known = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(trap)}
    made = pa.table(
        {"caption": ["a"], "jpg_0": [picture(1)], "jpg_1": [picture(2)], "label_0": [1.0], "label_1": [0.0]}
    )
    fields = [field.with_metadata(known) if field.name == "caption" else field for field in made.schema]
    pq.write_table(made.cast(pa.schema(fields)), home / "x.parquet")
    return check(home / "x.parquet")


@case
def a_parquet_that_names_a_reward_and_a_program(home, trap):
    write(home / "mine.py", trap.python)
    reward = [f"python:{home}/mine.py:f"]
    return check(table(home / "x.parquet", reward=reward, model=[f"!{trap.command}"], auto_map=["mine.f"]))


@case
def a_parquet_cell_that_is_a_pickle(home, trap):
    return check(table(home / "x.parquet", jpg_0=[pickle.dumps(trap)], caption=[f"$({trap.command})"]))


@case
def a_parquet_of_nested_lists(home, trap):
    value: list = [1]
    for _ in range(40):
        value = [value]
    return check(table(home / "x.parquet", deep=[value]))


@case
def lines_that_call_the_shell(home, trap):
    write(home / "0.png", picture())
    names = [
        f"pipe:{trap.command}",
        f"| {trap.command}",
        f"$({trap.command})",
        f"`{trap.command}`",
        trap.command,
    ]
    rows = [{"prompt": name, "chosen": name, "rejected": "0.png", "reward": "python:mine.py:f"} for name in names]
    write(home / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return check(home / "x.jsonl")


@case
def lines_without_end(home, trap):
    write(home / "x.jsonl", b'{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}\n' + b"[" * (20 << 20))
    return check(home / "x.jsonl")


@case
def a_list_nested_without_end(home, trap):
    write(home / "x.json", "[" * 1_000_000)
    return check(home / "x.json")


@case
def a_number_of_a_million_digits(home, trap):
    write(home / "x.jsonl", '{"prompt": "a", "chosen": "0.png", "rejected": "1.png", "n": ' + "9" * 1_000_000 + "}\n")
    return check(home / "x.jsonl")


@case
def a_csv_of_formulas(home, trap):
    write(home / "x.csv", f"prompt,chosen,rejected\n\"=cmd|' /C {trap.command}'!A0\",=1+1,@SUM(1)\n")
    return check(home / "x.csv")


@case
def an_archive_of_pickles(home, trap):
    torch.save({"x": trap}, home / "x.pth")
    with tarfile.open(home / "x.tar", "w") as archive:
        for name, data in {"0.png": picture(), "0.txt": b"a", "0.pkl": pickle.dumps(trap), "0.pyd": pickle.dumps(trap),
                           "0.pth": (home / "x.pth").read_bytes(), "../canary": b"x"}.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return check(home / "x.tar")


@case
def a_name_that_acts_on_the_terminal(home, trap):
    write(home / "x.jsonl", json.dumps({"prompt": "a", "\x1b[2Jchosen\x07": "0.png", "\u202erejected": "1.png"}) + "\n")
    return ["data", "inspect", str(home / "x.jsonl")]


@case
def a_postscript_picture(home, trap):
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%{trap.command}) (r) file\nshowpage\n"
    return check(table(home / "x.parquet", jpg_0=[program.encode()]))


@case
def an_unfinished_conversion_of_nonsense(home, trap):
    write(home / "set/convert.json", [1, 2])
    write(home / "set/metadata.jsonl", '{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}\n')
    return check(home / "set")


def evaluated(home: Path, prompts: Path) -> list[str]:
    words = "--num_prompts 2 --steps 1 --sampler ddim --features none --reward none --device cpu".split()
    return ["evaluate", "tiny", "--prompts", str(prompts), "--output_dir", str(home / "out"), *words]


@case
def prompts_nested_without_end(home, trap):
    return evaluated(home, write(home / "p.jsonl", '{"prompt": "a"}\n' + "[" * 200_000 + "\n"))


@case
def prompts_with_paths_and_programs(home, trap):
    rows = [{"prompt": CAPTIONS[0], "tag": "../../../canary", "file": str(trap.canary), "code": trap.python}] * 2
    return evaluated(home, write(home / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@case
def a_folder_of_pictures_that_says_it_is_another(home, trap):
    out = home / "out/evaluation"
    for kind in ("base", "tuned"):
        write(out / kind / "ddim/pictures.json", "[" * 200_000)
    write(home / "out/report.json", "[" * 200_000)
    os.symlink(trap.canary, out / "link")
    return evaluated(home, write(home / "p.txt", "\n".join(CAPTIONS)))


def annotated(home: Path, entries: list, choices: str = "") -> list[str]:
    for name in ("0.png", "1.png"):
        write(home / "set" / name, picture())
    write(home / "set/samples.json", {"pictures": entries, "seed": 0})
    write(home / "set/choices.jsonl", choices)
    return ["data", "annotate", str(home / "set"), "--export"]


def entry(file: str, image: int) -> dict:
    return {"file": file, "prompt": "a", "prompt_number": 0, "image": image}


@case
def annotations_of_pictures_outside(home, trap):
    write(home / "secret.png", picture(9))
    return annotated(home, [entry("../secret.png", 0), entry("/etc/passwd", 1)], "{}\n")


@case
def annotations_that_are_no_choices(home, trap):
    rows = [{"choice": trap.command, "mode": "best"}, {"__reduce__": ["os.system", trap.command]}]
    return annotated(home, [entry("0.png", 0), entry("1.png", 1)], "".join(json.dumps(row) + "\n" for row in rows))


@case
def annotations_nested_without_end(home, trap):
    return annotated(home, [entry("0.png", 0), entry("1.png", 1)], "[" * 200_000 + "\n")


@case
def pictures_that_lie_outside(home, trap):
    write(home / "set/0.png", picture())
    write(home / "set/samples.json", {"pictures": [{"file": "../../etc/passwd", "prompt": f"$({trap.command})"}]})
    return ["reward", "score", "--reward", "jpeg-small", "--images", str(home / "set"), "--out", str(home / "s.jsonl")]


@case
def a_step_aware_reward_that_is_a_pickle(home, trap):
    write(home / "spm/config.json", {"architecture": "x", "auto_map": {"a": "evil.b"}})
    torch.save({"x": trap}, home / "spm/step_aware.safetensors")
    write(home / "prompts.txt", "a large red circle\n")
    return ["train", "spo", "--model", "tiny", "--preset", "tiny", "--reward", str(home / "spm"), "--prompts",
            str(home / "prompts.txt"), "--output_dir", str(home / "out"), "--device", "cpu"]  # fmt: skip
