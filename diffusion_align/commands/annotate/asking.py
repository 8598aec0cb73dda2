"""One session of choosing: which questions are open, and answers, which are stored before they count."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_align.commands.annotate.choices import Row, append, key_of, standing
from diffusion_align.commands.annotate.questions import Key, Picture, Question, on_page


@dataclass
class Session:
    """The questions of this session and the choices of all sessions (`rows`). Questions are numbered from 0.

    Methods that write hold a lock, so two tabs of a browser cannot disturb each other.
    """

    file: Path  # choices.jsonl
    questions: list[Question]
    rows: list[Row]
    seed: int
    name: str
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rows = standing(self.rows)
        self.answers: dict[Key, Row] = {key_of(row): row for row in self.rows}

    def shown(self, at: int) -> list[Picture]:
        """The pictures of a question from left to right."""
        return on_page(self.questions[at], self.seed)

    def answer_to(self, at: int) -> Row | None:
        return self.answers.get(self.questions[at].key)

    def decided(self) -> int:
        """How many of this session's questions have an answer; a skip is one."""
        return sum(question.key in self.answers for question in self.questions)

    def next_open(self, after: int = -1) -> int:
        """The first open question after this one, else the first open one of all; len(questions) when none is left."""
        count = len(self.questions)
        turn = [(after + 1 + i) % count for i in range(count)]
        return next((at for at in turn if self.questions[at].key not in self.answers), count)

    def answer(self, at: int, choice: str, picked: list[int], seconds: float) -> int:
        """Store an answer and return the next open question.

        `choice` is "pick", "tie" or "skip". `picked` are places on the page, from 0: the best picture, or in a ranking
        the first pictures in order; the rest share the last place.

        Raises:
            ValueError: an answer that does not fit the question.
            OSError: the answer could not be stored and does not count.
        """
        question = self.questions[at]
        shown = [picture.file for picture in self.shown(at)]
        places = range(len(shown))
        if choice not in ("pick", "tie", "skip") or len(set(picked)) < len(picked) or not set(picked) <= set(places):
            raise ValueError("no such answer")
        least, most = (0, 0) if choice != "pick" else (1, 1 if question.mode == "best" else len(shown))
        if not least <= len(picked) <= most:
            raise ValueError(f"an answer of {len(picked)} pictures does not fit the question")
        files = [shown[place] for place in picked]
        rest = [file for file in question.key[2] if file not in files]
        if choice == "pick" and question.mode == "best":
            outcome: Row = {"choice": "winner", "winner": files[0]}
        elif choice == "pick":
            outcome = {"choice": "ranking", "ranking": [[file] for file in files] + [rest] * bool(rest)}
        else:
            outcome = {"choice": choice}
        row = outcome | self._about(question) | {"shown": shown, "seconds": round(seconds, 3), "session": self.name}
        with self._lock:
            append(self.file, row)
            self.rows.append(row)
            self.answers[question.key] = row
            return self.next_open(at)

    def undo(self) -> int | None:
        """Take back the last choice about one of this session's questions and return the question; None without any.

        An earlier answer to the same question counts again.
        """
        places = {question.key: at for at, question in enumerate(self.questions)}
        with self._lock:
            last = next((i for i in reversed(range(len(self.rows))) if key_of(self.rows[i]) in places), None)
            if last is None:
                return None
            key = key_of(self.rows[last])
            at = places[key]
            append(self.file, {"choice": "undo"} | self._about(self.questions[at]) | {"session": self.name})
            del self.rows[last]
            self.answers = {key_of(row): row for row in self.rows}
            return at

    def _about(self, question: Question) -> Row:
        return {
            "mode": question.mode,
            "prompt_number": question.prompt_number,
            "prompt": question.prompt,
            "images": list(question.key[2]),
            "digest": question.digest,
        }
