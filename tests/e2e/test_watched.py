"""What people watch: tokens, their rate, accuracy and entropy, as TRL's trainers log them."""

import random
import re
from functools import cached_property
from itertools import chain, pairwise
from operator import truediv
from pathlib import Path
from typing import Any

import pytest
from harness import WORDS, Run, config, random_model, train, write_rows

from aot_plugin.step.record import watched_steps

pytestmark = pytest.mark.slow

WATCHED = ("num_tokens", "mean_token_accuracy", "entropy")
ROWS, HELD_OUT = 20, 6
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
CUTS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"micro": 8},
    "kept graphs": {"micro": 2, **LORA},
    "second passes": {"micro": 2, "aot_kept_memory": 0},
    "held gradients": {"micro": 1, **LORA},
}


@pytest.fixture(scope="module")
def model(word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tied embeddings and random weights it expects a word to be repeated."""
    path = tmp_path_factory.mktemp("models") / "words"
    sizes = {"max_position_embeddings": 128, "tie_word_embeddings": True}
    random_model(word_tokenizer, scale=1.0, **sizes).save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


def rows_of_pairs(n: int) -> list[dict[str, Any]]:
    """Responses that repeat words, of other lengths, so that a mean over tokens is not one over
    rows."""
    rng = random.Random(0)

    def says(role: str) -> dict[str, str]:
        words = [word for _ in range(rng.randint(1, 4)) for word in [rng.choice(WORDS)] * 2]
        return {"role": role, "content": " ".join(words)}

    return [
        {"messages": [says("user")], "chosen": says("assistant"), "rejected": says("assistant")}
        for _ in range(n)
    ]


def labelled(pair: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"messages": pair["messages"], "completion": pair[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
    ]


class Bench:
    """Runs on the same rows and weights, which hardly move: a run learns 1e-9 a step."""

    def __init__(self, work: Path, model: Path) -> None:
        self.work, self.model = work, model
        self.data: dict[str, Path] = {}
        pairs = rows_of_pairs(ROWS + HELD_OUT)
        for mode in ("paired", "unpaired"):
            for name, some in {"": pairs[:ROWS], "-eval": pairs[ROWS:]}.items():
                rows = some if mode == "paired" else list(chain.from_iterable(map(labelled, some)))
                self.data[mode + name] = write_rows(work / f"{mode}{name}.jsonl", rows)

    def run(self, name: str, mode: str, step: int, micro: int, **keys: Any) -> Run:
        keys = {
            "micro_batch_size": micro,
            "gradient_accumulation_steps": step // micro,
            "max_steps": 4,
            "num_epochs": 4,
            "learning_rate": 1e-9,
            "eval_steps": 4,
            "eval_batch_size": 2 * HELD_OUT,
            **({"aot_mode": mode} if "rl" not in keys else {}),
            **keys,
        }
        cfg = config(self.model, self.data[mode], self.work / name, **keys)
        cfg["datasets"][0]["type"] = "chat_template.default"
        cfg["test_datasets"] = [{**cfg["datasets"][0], "path": str(self.data[f"{mode}-eval"])}]
        return train(cfg)

    @cached_property
    def trl(self) -> Run:
        """TRL's steps of 8, 8 and 4 pairs, in one micro-batch each, as its means are over these."""
        return self.run("trl", "paired", 8, 8, rl="dpo")

    @cached_property
    def trl_whole(self) -> Run:
        return self.run("trl-whole", "paired", ROWS, ROWS, rl="dpo")


@pytest.fixture(scope="module")
def bench(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("watched"), model)


def assert_watched(run: Run, expected: Run) -> None:
    for name in (*WATCHED, *(f"eval_{name}" for name in WATCHED)):
        values = run.logged(name)
        assert values, name
        assert values == pytest.approx(expected.logged(name), rel=1e-5), name


@pytest.mark.parametrize("cut", CUTS)
def test_as_trl_logs_them(cut: str, bench: Bench) -> None:
    with watched_steps() as steps:
        ours = bench.run(cut, "paired", 8, **CUTS[cut])
    assert len(set(bench.trl.logged("mean_token_accuracy"))) > 1
    assert_watched(ours, bench.trl)
    carries = [name for step in steps for name in step.carries]
    expected = {"second passes": "Rescore", "held gradients": "HoldGradient"}
    assert carries.count(expected.get(cut, "KeepGraph")) > len(carries) / 3


def test_labelled_rows_are_watched_like_pairs(bench: Bench) -> None:
    """The same responses, in steps of an epoch: the order of rows is another one."""
    ours = bench.run("unpaired", "unpaired", 2 * ROWS, 10)
    assert_watched(ours, bench.trl_whole)
    alone = bench.run("micro_batch", "unpaired", 2 * ROWS, 10, aot_batch="micro_batch")
    assert alone.logged("num_tokens") == ours.logged("num_tokens")
    assert alone.logged("entropy") == pytest.approx(ours.logged("entropy"), rel=0.1)


def test_tokens_per_second(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    """Of the steps alone, so they took less time than the run; logged after steps 1, 2 and 4."""
    ours = bench.run("rate", "paired", 8, 4, logging_steps=2)
    tokens, rates = ours.logged("num_tokens"), ours.logged("aot/tokens_per_second")
    assert len(tokens) == len(rates) == 3
    names = ("train_runtime", "train_tokens_per_second")  # printed, after the last checkpoint
    said = "".join(capfd.readouterr())
    runtime, rate = (float(re.findall(rf"'{name}': '?([\d.]+)", said)[-1]) for name in names)
    assert rate == pytest.approx(tokens[-1] / runtime, rel=0.01)
    since = [after - before for before, after in pairwise([0, *tokens])]
    assert 0 < sum(map(truediv, since, rates)) < runtime
