"""Answers that the policy gave to held-out prompts at one evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_atomically
from .scores import DIRECTORY, file_stem


@dataclass(frozen=True)
class Samples:
    """Prompts and their answers.

    Attributes:
        step: optimizer step at which the answers were given.
        eval_set: name of the evaluation set.
        prompts, answers: as text, each [n].
    """

    step: int
    eval_set: str
    prompts: Sequence[str]
    answers: Sequence[str]

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``directory``/samples-<eval set>-step<step>.jsonl, one answer a line, and returns
        its path."""
        about = {"step": self.step, "eval_set": self.eval_set}
        lines = [
            json.dumps({**about, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]
        path = Path(directory) / f"samples-{file_stem(self.eval_set, self.step)}.jsonl"
        write_atomically(path, lambda file: file.write_text("".join(lines), encoding="utf-8"))
        return path

    def table(self) -> dict[str, list[object]]:
        """The columns of a table, by name."""
        step: list[object] = [self.step] * len(self.prompts)
        return {"step": step, "prompt": list(self.prompts), "answer": list(self.answers)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Samples:
        """Reads a file that ``save`` wrote."""
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        prompts, answers = ([row[name] for row in rows] for name in ("prompt", "answer"))
        return cls(rows[0]["step"], rows[0]["eval_set"], prompts, answers)


def load_samples(output_dir: str | os.PathLike[str]) -> list[Samples]:
    """Loads all answers in ``output_dir``/aot, sorted by step and eval set."""
    paths = (Path(output_dir) / DIRECTORY).glob("samples-*.jsonl")
    return sorted(map(Samples.load, paths), key=lambda samples: (samples.step, samples.eval_set))
