"""The paper's experiments at a small scale: train every config of a sweep, sample, and measure.

The sweeps are the host's (`axolotl train base.yml --sweep matched.yml` trains the same configs);
this script adds what comes after training. Responses to held-out prompts are sampled from the
trained model and scored by the rule that ranked the training data (rules.py; by default VADER, in
[-1, 1]). The divergence KL(policy | reference), in nats per response, is taken along them, token by
token. A line per run goes into results/SWEEP.jsonl; a run that has its line is not repeated.

    python benchmarks/experiments/run.py beta
    python benchmarks/experiments/run.py matched unpaired_batch --workers 12 --responses 16
    python benchmarks/experiments/run.py kto --model student --workers 2 --responses 16

`--model student` takes the small model of student.py, its own data (data.py) and its own folder of
results. Several sweeps are trained seed by seed, those named first before the others of the same
seed, so that what a cut-off leaves are whole seeds.
"""

import argparse
import contextlib
import copy
import gc
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "example_configs" / "quickstart"))
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The host saves prepared rows by processes, one at least, each of which imports everything anew.
os.environ.setdefault("AXOLOTL_DATASET_NUM_PROC", "0")

import numpy as np
import torch
import yaml
from data import as_text
from model import FIRST_MODEL, MODELS, Model
from peft import PeftModel
from rules import MEASURES, RULES, Measure
from sampling import (
    PROMPTS_PER_BATCH,
    read_jsonl,
    sample_tokens,
    whole_sentences,
    write_jsonl,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
SAMPLING_SEED = 7
SWEEPS = sorted(file.stem for file in HERE.glob("*.yml") if file.stem != "base")
USUAL_DATA = {"paired_train", "unpaired_train", "kto_rows"}
FOLDERS = {"output_dir", "dataset_prepared_path"}
LONGEST_NAME = 200  # file systems allow 255 bytes, endings included
RESPONSES_AT_ONCE = 1024
"""On a GPU: 2 GB of keys and values of SmolLM2-135M. A CPU gains nothing from so many."""
ROWS_AT_ONCE = 32
"""Rows of the divergence: 0.3 GB a tensor of log-probabilities over a vocabulary of 49,152."""


@dataclass(frozen=True)
class Run:
    """A config to train and measure; the model before training if it is None."""

    sweeps: tuple[str, ...]
    """Those that contain it: it is trained once, and each of them gets its line."""
    config: dict[str, Any] | None
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        changes = (f"{key}={value}" for key, value in sorted(self.changes.items()))
        name = "-".join([self.sweeps[0], *changes]).replace("/", "_")
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Options:
    model: Model
    responses: int
    prompts: int | None
    divergences: int | None
    workers: int
    keep: bool


def configs(sweep: str, model: Model) -> list[dict[str, Any]]:
    """The host's expansion of a sweep."""
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    space = yaml.safe_load((HERE / f"{sweep}.yml").read_text())
    # The host prints each config.
    with contextlib.redirect_stdout(None):
        found = generate_sweep_configs(model.base(), space)
    set_keys = ({key: value for key, value in cfg.items() if value is not None} for cfg in found)
    return [model.with_own_rows(cfg) for cfg in set_keys]


def changes_of(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What distinguishes a config: keys with other values than in base.yml, and other data."""
    found = {k: v for k, v in config.items() if base.get(k) != v and not k.endswith("datasets")}
    files = [Path(entry["path"]).stem for entry in config["datasets"]]
    return found if USUAL_DATA.issuperset(files) else found | {"data": "+".join(files)}


def plan(sweeps: list[str], results: Path, model: Model) -> list[Run]:
    """The runs that have no line yet, in the order in which they are trained."""
    base = model.base()
    found: dict[tuple[str, Measure], Run] = {}
    for sweep in sweeps:
        file = results / f"{sweep}.jsonl"
        done = [row["changes"] for row in read_jsonl(file)] if file.exists() else []
        untrained = (None, {"rl": "none"})
        trained = ((config, changes_of(config, base)) for config in configs(sweep, model))
        for config, changes in [untrained, *trained]:
            if changes in done:
                continue
            key = json.dumps(changes, sort_keys=True), MEASURES.get(sweep, Measure())
            others = found[key].sweeps if key in found else ()
            found[key] = Run((*others, sweep), config, changes)
    return sorted(
        found.values(),
        key=lambda run: (run.config["seed"] if run.config else 0, sweeps.index(run.sweeps[0])),
    )


def render_kto_rows(model: Model) -> None:
    """The unpaired rows as text: the host's KTO strategies know no chat template."""
    from transformers import AutoTokenizer

    rows = read_jsonl(model.quickstart / "unpaired_train.jsonl")
    model.outputs.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model.base()["base_model"])
    write_jsonl(model.outputs / "kto_rows.jsonl", as_text(rows, tokenizer))


def train(config: dict[str, Any], output: Path, prepared: Path) -> list[dict[str, Any]]:
    """Train by the function of the host's command; what the trainer logged."""
    import axolotl.train
    import axolotl.utils.distributed
    import transformers.modelcard
    import transformers.training_args
    from accelerate.state import AcceleratorState, GradientState

    logged: list[dict[str, Any]] = []
    execute = axolotl.train.execute_training

    def execute_and_remember(cfg: Any, trainer: Any, *args: Any) -> None:
        execute(cfg, trainer, *args)
        logged.extend(trainer.state.log_history)

    path = output / "config.yml"
    output.mkdir(parents=True, exist_ok=True)
    # The host shuffles KTO's rows by the seed, and keeps them in a file whose name lacks it.
    of_seed = prepared / str(config["seed"])
    folders = {"output_dir": str(output), "dataset_prepared_path": str(of_seed)}
    path.write_text(yaml.safe_dump(config | folders))
    # A run starts as in a process of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    axolotl.utils.distributed.distributed_state = None
    card = transformers.modelcard.AUTOGENERATED_TRAINER_COMMENT
    with contextlib.ExitStack() as patches:
        for module, name, value in (
            (sys, "argv", ["train"]),
            (axolotl.train, "execute_training", execute_and_remember),
            # The host appends each run's config to it.
            (transformers.modelcard, "AUTOGENERATED_TRAINER_COMMENT", card),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        if not torch.cuda.is_available():
            # transformers asks for a GPU before it allows bf16, and the host has no `use_cpu`.
            patches.enter_context(
                mock.patch.object(
                    transformers.training_args, "is_torch_bf16_gpu_available", lambda: True
                )
            )
        from axolotl.cli.train import do_cli

        do_cli(config=str(path))
    return logged


def alone(config: dict[str, Any], options: Options) -> dict[str, Any]:
    """The config with a bound of its own on a GPU's memory, where AOT would take what is free now
    and the other workers need next. The gradient does not depend on it."""
    if config["rl"] != "aot" or options.workers == 1:
        return config
    return {"aot_kept_memory": 1.0, **config}


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def divergence(
    model: Any, reference: Any, ids: torch.Tensor, start: int, tokenizer: Any
) -> np.ndarray:
    """[responses] KL(policy | reference) in nats along sampled responses.

    The divergence of the next token's distribution is summed over the places up to the
    end-of-sequence token. Its mean over samples of the policy is the divergence of the whole
    response (the chain rule), without the noise of the sampled tokens' own log-ratios.
    """
    prompt, response = ids[:, :start], ids[:, start:]
    ends = response == tokenizer.eos_token_id
    places = ends.cumsum(dim=1) - ends.long() == 0
    padded_left = (prompt != tokenizer.pad_token_id).long().cummax(dim=1).values
    attended = torch.cat([padded_left, places], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": attended,
        "position_ids": (attended.cumsum(dim=1) - 1).clamp(min=0),
        "logits_to_keep": response.shape[1] + 1,
    }
    policy, base = (m(**inputs).logits[:, :-1].log_softmax(dim=-1) for m in (model, reference))
    found = ((policy.exp() * (policy - base)).sum(dim=-1) * places).sum(dim=1)
    return found.cpu().numpy()


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """TF32 products on a GPU, within: 8 times nearer to float32 than bf16, and several times faster
    than float32. Training before or after is not affected."""
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def untrained(model: Model) -> tuple[Any, Any, Any]:
    """The model before training, the same in float32, and the tokenizer."""
    loaded, tokenizer = model.load()
    return loaded, copy.deepcopy(loaded).float(), tokenizer


def measure(adapter: Path | None, what: Measure, options: Options) -> dict[str, Any]:
    """Score and divergence of responses to held-out prompts: summaries, and the scores."""
    model, reference, tokenizer = untrained(options.model)
    policy = model
    if adapter is not None:
        policy = PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload()
    prompts, n = what.prompts()[: options.prompts], options.responses
    drawn = min(n, options.divergences or n)
    at_once = RESPONSES_AT_ONCE // n if torch.cuda.is_available() else PROMPTS_PER_BATCH
    batches = list(
        sample_tokens(policy, tokenizer, prompts, n, SAMPLING_SEED, "sampling", max(at_once, 1))
    )
    texts = [
        whole_sentences(text)
        for ids, start in batches
        for text in tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    ]
    free_memory()
    # Both in float32: rounding of bf16 logits adds up to a divergence of its own.
    policy = reference if adapter is None else policy.float()
    with tf32():
        ratios = np.concatenate(
            [
                divergence(policy, reference, rows, start, tokenizer)
                for ids, start in batches
                for rows in ids.unflatten(0, (-1, n))[:, :drawn].flatten(0, 1).split(ROWS_AT_ONCE)
            ]
        )
    score = RULES[what.rule].score
    scores = np.array([score(text) for text in texts]).reshape(len(prompts), n)
    of_prompts = scores.mean(axis=1)
    return {
        "responses": scores.size,
        "score": float(scores.mean()),
        "score_standard_error": float(of_prompts.std(ddof=1) / len(prompts) ** 0.5),
        "kl": float(ratios.mean()),
        "kl_standard_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "scores": [[round(value, 3) for value in row] for row in scores.tolist()],
        "prompt_kl": [round(x, 3) for x in ratios.reshape(-1, drawn).mean(axis=1).tolist()],
    }


def training_summary(logged: list[dict[str, Any]]) -> dict[str, Any]:
    """The losses, and the last step's statistics of margins and rewards."""
    steps = [entry for entry in logged if "loss" in entry]
    found: dict[str, Any] = {"losses": [entry["loss"] for entry in steps]}
    if steps:
        found["last_step"] = {
            key: float(f"{value:.4g}")
            for key, value in steps[-1].items()
            if key.startswith(("aot/", "rewards/"))
        }
    return found


def trained_before(config: dict[str, Any], output: Path) -> bool:
    """Whether the folder holds an adapter that was trained with the very config."""
    config_of_it = output / "config.yml"
    if not ((output / "adapter_model.safetensors").exists() and config_of_it.exists()):
        return False
    kept = yaml.safe_load(config_of_it.read_text())
    return {key: value for key, value in kept.items() if key not in FOLDERS} == config


def discard(output: Path) -> None:
    """Delete what a training saved, but for the scores of its evaluations."""
    for file in output.glob("*"):
        if file.is_dir() and file.name != "aot":
            shutil.rmtree(file)
        elif file.is_file():
            file.unlink()
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()


def carry_out(run: Run, options: Options, prepared: Path) -> dict[str, Any]:
    """Train and measure a run; its line."""
    what = MEASURES.get(run.sweeps[0], Measure())
    if run.config is None:
        return {"changes": run.changes, **measure(None, what, options)}
    begin, output = time.perf_counter(), options.model.outputs / run.name
    found: dict[str, Any] = {}
    if not options.keep:
        discard(output)  # left by a process that was killed, perhaps half written
    try:
        config = alone(run.config, options)
        if not trained_before(config, output):
            logged = train(config, output, prepared)
            free_memory()
            found = training_summary(logged)
        if "theorem" in run.sweeps:
            from theorem import measure as violations

            found |= violations(output, run.config)
        trained = time.perf_counter()
        found |= measure(output, what, options)
    finally:
        free_memory()
        if not options.keep:
            discard(output)
    seconds = [round(trained - begin, 1), round(time.perf_counter() - trained, 1)]
    return {"changes": run.changes, **found, "seconds_of_training_and_measurement": seconds}


def work(pipe: Connection, options: Options, prepared: Path, log: Path) -> None:
    """A worker's process: carries out what comes through the pipe, until that is None."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    pipe.send(None)
    while (run := pipe.recv()) is not None:
        try:
            pipe.send((carry_out(run, options, prepared), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Workers:
    """Processes that carry out runs; a worker that dies loses its run and is replaced."""

    def __init__(self, number: int, options: Options) -> None:
        self._number, self._options = number, options

    def carry_out(
        self, runs: Iterator[Run]
    ) -> Iterator[tuple[Run, dict[str, Any] | None, str | None]]:
        """Yields a run with its line, or with an error, as they end. Takes the next when idle."""
        idle: dict[Connection, tuple[int, Any]] = {}
        busy: dict[Connection, tuple[int, Any, Run | None]] = {}
        for index in range(self._number):
            pipe, process = self._start(index)
            busy[pipe] = (index, process, None)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                index, process, run = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    process.join()
                    died = f"worker {index} died (exit code {process.exitcode})"
                    why = f"{died}, see {self._log(index)}"
                    if run is None:
                        raise SystemExit(why) from None
                    yield run, None, why
                    pipe, process = self._start(index)
                    busy[pipe] = (index, process, None)
                    continue
                if run is not None:
                    yield run, *answer
                following = next(runs, None)
                pipe.send(following)
                if following is None:
                    idle[pipe] = (index, process)
                else:
                    busy[pipe] = (index, process, following)
        for _, process in idle.values():
            process.join()

    def _log(self, index: int) -> Path:
        return self._options.model.outputs / "workers" / f"{index}.log"

    def _start(self, index: int) -> tuple[Connection, Any]:
        # Not forked: neither CUDA nor threads survive that. Each has its own prepared rows, so that
        # none reads what another one is writing.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        folder = self._options.model.outputs / "workers" / str(index)
        discard_prepared(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with mock.patch.dict(os.environ, settings):
            process = context.Process(
                target=work,
                args=(theirs, self._options, folder / "prepared", self._log(index)),
                daemon=True,
            )
            process.start()
        theirs.close()
        return ours, process


def discard_prepared(folder: Path) -> None:
    """Delete rows that an earlier session prepared: the host tells them by paths, not contents."""
    shutil.rmtree(folder / "prepared", ignore_errors=True)


def in_this_process(
    runs: Iterator[Run], options: Options
) -> Iterator[tuple[Run, dict[str, Any] | None, str | None]]:
    discard_prepared(options.model.outputs)
    for run in runs:
        try:
            yield run, carry_out(run, options, options.model.outputs / "prepared"), None
        except Exception:
            yield run, None, traceback.format_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", choices=SWEEPS, metavar="sweep")
    parser.add_argument("--responses", type=int, default=2, help="per held-out prompt")
    parser.add_argument("--prompts", type=int, help="only the first held-out prompts, for a trial")
    parser.add_argument(
        "--divergences",
        type=int,
        help="of so many responses per prompt; default: of all (most of the time on a CPU)",
    )
    parser.add_argument("--model", choices=MODELS, default=FIRST_MODEL)
    parser.add_argument("--workers", type=int, default=1, help="processes; 1: this one")
    parser.add_argument("--minutes", type=float, help="no run is begun after so many")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of the lines (another model has a folder in it)",
    )
    parser.add_argument(
        "--keep",
        action=argparse.BooleanOptionalAction,
        help="keep the trained adapters; by default only with one worker",
    )
    parser.add_argument("--only", help="only runs whose name (see --list) has this pattern")
    parser.add_argument("--list", action="store_true", help="print the runs, and train none")
    args = parser.parse_args()
    begin = time.monotonic()
    model = Model(args.model)
    results = model.own(args.results.absolute())
    os.chdir(ROOT)
    results.mkdir(parents=True, exist_ok=True)
    runs = plan(list(dict.fromkeys(args.sweeps)), results, model)
    if args.only:
        runs = [run for run in runs if run.config is None or re.search(args.only, run.name)]
    if args.list:
        print(*(run.name for run in runs), f"{len(runs)} runs", sep="\n")
        return
    render_kto_rows(model)
    keep = args.workers == 1 if args.keep is None else args.keep
    options = Options(model, args.responses, args.prompts, args.divergences, args.workers, keep)

    def in_time() -> Iterator[Run]:
        for run in runs:
            if args.minutes is not None and time.monotonic() - begin > 60 * args.minutes:
                return
            yield run

    number = min(args.workers, len(runs))
    started = in_time()
    ended = (
        Workers(number, options).carry_out(started)
        if args.workers > 1
        else in_this_process(started, options)
    )
    done, failed = 0, 0
    for run, line, error in ended:
        if line is None:
            failed += 1
            print("FAILED", run.name, json.dumps(run.config), error, sep="\n", flush=True)
            continue
        done += 1
        for sweep in run.sweeps:
            with (results / f"{sweep}.jsonl").open("a") as lines:
                lines.write(json.dumps(line, separators=(",", ":")) + "\n")
        short = {key: line[key] for key in ("score", "kl", "words")}
        clock = f"{time.monotonic() - begin:.0f} s, {done} of {len(runs)}"
        print("RUN", run.name, json.dumps(short), clock, flush=True)
    left = len(runs) - done - failed
    print(f"{done} runs done, {failed} failed, {left} not begun", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
