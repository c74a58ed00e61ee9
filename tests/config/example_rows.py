"""Rows with the columns of the data sets that the example configs name, in a local folder that
loads as the hub repository does: by its split names."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import sentence

Row = dict[str, Any]


def ultrafeedback(rng: random.Random) -> Iterator[Row]:
    """HuggingFaceH4/ultrafeedback_binarized: chosen and rejected repeat the prompt's turn, and
    `messages` repeats chosen."""
    while True:
        prompt = sentence(rng, 6)
        chosen, rejected = (
            [
                {"content": prompt, "role": "user"},
                {"content": sentence(rng, rng.randint(3, 12)), "role": "assistant"},
            ]
            for _ in range(2)
        )
        yield {
            "prompt": prompt,
            "prompt_id": f"{rng.getrandbits(256):064x}",
            "chosen": chosen,
            "rejected": rejected,
            "messages": chosen,
            "score_chosen": rng.uniform(5, 10),
            "score_rejected": rng.uniform(1, 5),
        }


def beavertails(rng: random.Random) -> Iterator[Row]:
    """PKU-Alignment/BeaverTails."""
    while True:
        is_safe = rng.random() < 0.45
        yield {
            "prompt": sentence(rng, 6),
            "response": sentence(rng, rng.randint(3, 12)),
            "category": {"child_abuse": False, "violence,aiding_and_abetting": not is_safe},
            "is_safe": is_safe,
        }


def helpsteer(rng: random.Random) -> Iterator[Row]:
    """nvidia/HelpSteer: five ratings from 0 to 4."""
    while True:
        ratings = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        yield {
            "prompt": sentence(rng, 6),
            "response": sentence(rng, rng.randint(3, 12)),
            **{name: rng.choice([0, 1, 2, 3, 3, 4, 4]) for name in ratings},
        }


Splits = dict[str, int]
DATASETS: dict[str, tuple[Callable[[random.Random], Iterator[Row]], Splits]] = {
    "HuggingFaceH4/ultrafeedback_binarized": (ultrafeedback, {"train_prefs": 80, "test_prefs": 16}),
    "PKU-Alignment/BeaverTails": (beavertails, {"30k_train": 140, "30k_test": 16}),
    # A good quarter lies between the thresholds.
    "nvidia/HelpSteer": (helpsteer, {"train": 220, "validation": 32}),
}
"""Hub name: its rows, and how many of them to write per split: enough for one step of 64 pairs or
128 responses."""


def write_dataset(folder: Path, name: str) -> Path:
    rows_of, splits = DATASETS[name]
    folder.mkdir(parents=True)
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, count in splits.items():
        rows = rows_of(random.Random(split))
        lines = [json.dumps(next(rows)) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        card += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder
