"""Rows per second from a JSONL file to token ids: our unpaired rows against the host's KTO rows.

Both read the same rows in one run, in turns, in one process: the host by its `chatml.argilla` and
TRL's tokenization, ours by `chat_template.default` with the ChatML template, whose row counting is
timed as well. Needs a directory with a tokenizer and a `config.json` (`--model`).

    python benchmarks/preprocess_speed.py --model outputs/smollm2-135m-instruct
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import datasets
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import KTOConfig, KTOTrainer

from aot_plugin.data import prepare_tokens
from aot_plugin.data.loading import load_datasets

LENGTH = 1024
WORDS = "apple river stone cloud green happy table light music dance bread water house".split()


def write_rows(path: Path, count: int) -> None:
    """Rows that both strategies read, of lengths as in UltraFeedback (a few hundred words)."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    with path.open("w") as file:
        for number in range(count):
            row = {"instruction": text(10, 150), "completion": text(20, 400)}
            file.write(json.dumps(row | {"label": number % 2 == 0}) + "\n")


def load(model: str, folder: Path, entry: dict[str, Any]) -> DictDefault:
    cfg = load_cfg(
        DictDefault(
            base_model=model,
            rl="aot",
            aot_mode="unpaired",
            plugins=["aot_plugin.AOTPlugin"],
            datasets=[{"path": str(folder / "rows.jsonl")} | entry],
            output_dir=str(folder / "out"),
            sequence_len=LENGTH,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            num_epochs=1,
            learning_rate=1e-4,
            dataset_num_proc=0,
            skip_prepare_dataset=True,
        )
    )
    cfg.is_preprocess = True  # no results of an earlier run from the cache
    return cfg


def trl_trainer(tokenizer: Any, folder: Path) -> KTOTrainer:
    """A trainer with a tiny model, for its way of tokenizing."""
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    row = {"prompt": "a", "completion": "b"}
    return KTOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder),
        processing_class=tokenizer,
        args=KTOConfig(
            output_dir=str(folder / "kto"),
            loss_type="apo_zero_unpaired",
            max_length=LENGTH,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([row | {"label": i == 0} for i in range(2)]),
    )


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="outputs/smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()

    def refuse(rows: Any) -> Any:
        raise AssertionError("no row is left to TRL")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", args.rows)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trainer = trl_trainer(tokenizer, folder)

        def trl(rows: Any) -> Any:
            return trainer._prepare_dataset(rows, tokenizer, trainer.args, "train")

        host = load(args.model, folder, {"type": "chatml.argilla"})
        ours = load(
            args.model,
            folder,
            {
                "type": "chat_template.default",
                "field_prompt": "instruction",
                "chat_template": "chatml",
            },
        )
        load_preference_datasets(cfg=host)  # warms the file system and the imports
        speeds: dict[str, list[float]] = {"host": [], "ours": []}
        for _ in range(args.repeats):
            prepared, dataset = seconds(lambda: load_preference_datasets(cfg=host).train_dataset)
            tokenized, theirs = seconds(lambda: trl(dataset))  # noqa: B023
            speeds["host"].append(args.rows / (prepared + tokenized))
            prepared, dataset = seconds(lambda: load_datasets(ours).train_dataset)
            tokenized, mine = seconds(lambda: prepare_tokens(dataset, refuse, LENGTH))  # noqa: B023
            speeds["ours"].append(args.rows / (prepared + tokenized))
            assert len(theirs) == len(mine) == args.rows
        median = {side: statistics.median(values) for side, values in speeds.items()}
        ratio = statistics.median(
            mine / theirs for mine, theirs in zip(speeds["ours"], speeds["host"], strict=True)
        )
        print(
            json.dumps(
                {
                    "rows": args.rows,
                    "repeats": args.repeats,
                    "host_rows_per_second": round(median["host"]),
                    "ours_rows_per_second": round(median["ours"]),
                    "ratio": round(ratio, 2),
                }
            )
        )


if __name__ == "__main__":
    main()
