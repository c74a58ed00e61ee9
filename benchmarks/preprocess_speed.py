"""Rows per second from a JSONL file to token ids: ours against the host's.

Both read the same rows in one run, in turns, in one process, and ours count them as well.
Unpaired, the host reads them by `chatml.argilla` (`rl: kto`); paired, by `chat_template.default`
(`rl: dpo`); then TRL tokenizes. Ours are of `chat_template.default` with the ChatML template.
Needs a directory with a tokenizer and a `config.json` (`--model`).

    python benchmarks/preprocess_speed.py --model outputs/smollm2-135m-instruct
    python benchmarks/preprocess_speed.py --mode paired

`--save` goes through the length filter and the prepared dataset on disk, as `axolotl preprocess`
and the training after it do. The memory reported is the largest sum over the process and its
children of what is theirs alone (RssAnon; Arrow files that are mapped into memory are not, the
kernel can drop them), above what was there before the rows were read. A million short rows:

    python benchmarks/preprocess_speed.py --rows 1000000 --repeats 1 --short --save

`results/preprocess_speed.jsonl` holds what was measured, one run per line.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import datasets
import psutil
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from aot_plugin.data import prepare_tokens
from aot_plugin.data.loading import load_datasets

LENGTH = 1024
WORDS = "apple river stone cloud green happy table light music dance bread water house".split()


def write_rows(path: Path, count: int, short: bool, paired: bool) -> None:
    """Rows that both strategies read, of lengths as in UltraFeedback (a few hundred words), or of
    a few words."""
    prompt, completion = ((3, 15), (3, 30)) if short else ((10, 150), (20, 400))
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    with path.open("w") as file:
        for number in range(count):
            asked, answers = text(*prompt), [text(*completion) for _ in "ab"]
            row = {"instruction": asked, "completion": answers[0], "label": number % 2 == 0}
            if paired:
                row = {"messages": [{"role": "user", "content": asked}]}
                row |= dict(zip(("chosen", "rejected"), answers, strict=True))
            file.write(json.dumps(row) + "\n")


def load(model: str, folder: Path, entry: dict[str, Any], save: bool, **rl: Any) -> DictDefault:
    cfg = load_cfg(
        DictDefault(
            base_model=model,
            **rl,
            chat_template="chatml",
            datasets=[{"path": str(folder / "rows.jsonl")} | entry],
            output_dir=str(folder / "out"),
            sequence_len=LENGTH,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            num_epochs=1,
            learning_rate=1e-4,
            dataset_num_proc=0,
            skip_prepare_dataset=not save,
            dataset_prepared_path=str(folder / "prepared"),
        )
    )
    cfg.is_preprocess = True  # no results of an earlier run from the cache
    return cfg


def trl_trainer(tokenizer: Any, folder: Path, paired: bool) -> KTOTrainer | DPOTrainer:
    """A trainer with a tiny model, for its way of tokenizing."""
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    common = dict(output_dir=str(folder / "trl"), max_length=LENGTH, report_to="none")
    common |= dict(use_cpu=True, bf16=False)
    model = LlamaForCausalLM.from_pretrained(folder)
    if paired:
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        make, arguments = DPOTrainer, DPOConfig(**common)
    else:
        rows = [{"prompt": "a", "completion": "b", "label": i == 0} for i in range(2)]
        make, arguments = KTOTrainer, KTOConfig(loss_type="apo_zero_unpaired", **common)
    data = datasets.Dataset.from_list(rows)
    return make(model=model, processing_class=tokenizer, args=arguments, train_dataset=data)


def anonymous_mib() -> float:
    """Memory of this process and its children that no file stands behind."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)
    return total / 1024


@contextmanager
def peak(values: list[float]) -> Iterator[None]:
    """Adds to ``values`` the peak of ``anonymous_mib`` above its value at the start."""
    start, highest, stop = anonymous_mib(), 0.0, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(0.2):
            highest = max(highest, anonymous_mib())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        values.append(max(0.0, highest - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="outputs/smollm2-135m-instruct")
    parser.add_argument("--mode", default="unpaired", choices=["paired", "unpaired"])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()

    paired = args.mode == "paired"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", args.rows, args.short, paired)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trainer = trl_trainer(tokenizer, folder, paired)
        host_type = "chat_template.default" if paired else "chatml.argilla"
        host_rl = {"rl": "dpo"} if paired else {"rl": "kto", "remove_unused_columns": False}
        host = load(args.model, folder, {"type": host_type}, args.save, **host_rl)
        entry = {"type": "chat_template.default"}
        if not paired:
            entry["field_prompt"] = "instruction"
        ours = load(args.model, folder, entry, args.save, rl="aot", aot_mode=args.mode)

        def host_rows() -> Any:
            rows = load_preference_datasets(cfg=host).train_dataset
            return trainer._prepare_dataset(rows, tokenizer, trainer.args, "train")

        def our_rows() -> Any:
            rows = load_datasets(ours).train_dataset
            return prepare_tokens(rows, tokenizer, args.mode, LENGTH)

        sides: dict[str, Callable[[], Any]] = {"host": host_rows, "ours": our_rows}
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        memory: dict[str, list[float]] = {side: [] for side in sides}
        # Warms the imports, and has the rows of the file in the form in which both read them.
        load_dataset_with_config(host.datasets[0], False)
        for _ in range(args.repeats):
            for side, run in sides.items():
                with peak(memory[side]):
                    start = time.perf_counter()
                    prepared = run()
                    speeds[side].append(args.rows / (time.perf_counter() - start))
                assert len(prepared) == args.rows
                del prepared
        result: dict[str, Any] = {
            "mode": args.mode,
            "rows": args.rows,
            "short": args.short,
            "save": args.save,
            "repeats": args.repeats,
        }
        for side in sides:
            result[f"{side}_rows_per_second"] = round(statistics.median(speeds[side]))
            result[f"{side}_peak_mib"] = round(max(memory[side]))
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["host"], strict=True)]
        result["ratio"] = round(statistics.median(ratios), 2)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
