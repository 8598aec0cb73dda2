"""The pages of `data annotate`, from `templates/`, and the policy under which a browser shows them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from markupsafe import Markup

from diffusion_align.commands.annotate.choices import Row
from diffusion_align.commands.annotate.questions import Picture
from diffusion_align.evaluation.markup import STYLE, escape, templates

CAPTION_LIMIT = 5000  # characters shown
_FOLDER = Path(__file__).with_name("templates")
_TEMPLATE = templates(_FOLDER).get_template("question.html.j2")
_STYLE = STYLE + Markup((_FOLDER / "annotate.css").read_text(encoding="utf-8"))
# Marks in a ranking are the script's own numbers; nothing that it writes into the page is parsed as HTML.
_SCRIPT = Markup((_FOLDER / "annotate.js").read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# Only this script and this style act; pictures and answers go to the command itself, and nothing goes anywhere else.
POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def question_page(
    base: str, at: int, questions: int, decided: int, mode: str, shown: list[Picture], answer: Row | None,
    ahead: list[Picture],
) -> str:  # fmt: skip
    """The page of question `at`, from 1. `base` is the address of everything; `ahead` are pictures to fetch early."""
    marks, status = _marks(answer, [picture.file for picture in shown])
    return _TEMPLATE.render({
        "base": base, "at": at, "questions": questions, "decided": decided, "mode": mode, "status": status,
        "caption": escape(shown[0].prompt, CAPTION_LIMIT),
        "shown": list(zip(shown, marks, strict=True)),
        "ahead": Markup(" ".join(str(picture.index) for picture in ahead)),  # digits, of any number of pictures
        "style": _STYLE, "script": _SCRIPT,
    })  # fmt: skip


def last_page(base: str, questions: int, decided: int) -> str:
    """The page after the last question."""
    status = "Every question has an answer." if decided == questions else f"{questions - decided} are still open."
    return _TEMPLATE.render({
        "base": base, "at": questions + 1, "questions": questions, "decided": decided, "mode": "", "status": status,
        "shown": [], "ahead": "", "style": _STYLE, "script": _SCRIPT,
    })  # fmt: skip


def _marks(answer: Row | None, files: list[str]) -> tuple[list[str], str]:
    """What an answer puts on each picture, and in words below them."""
    if answer is None:
        return [""] * len(files), ""
    if answer["choice"] == "ranking":
        places = {file: i + 1 for i, tied in enumerate(answer["ranking"]) for file in tied}
        return [str(places[file]) for file in files], "Ranked. Another answer replaces it."
    if answer["choice"] == "winner":
        return ["✓" * (file == answer["winner"]) for file in files], "Chosen. Another answer replaces it."
    word = {"tie": "A tie.", "skip": "Skipped."}[answer["choice"]]
    return [""] * len(files), f"{word} Another answer replaces it."
