"""DeepSpeed's ZeRO stages and FSDP2 on two ranks train as one process does; save, resume, reload.

All runs on two ranks come out of the same two processes; ``launch.py`` asserts that the model was
wrapped by what the config asks for. Full fine-tuning (with a loaded reference model) has the tied
embeddings of the tiny model: there the LM head, whose input we hook, shares a sharded parameter.
The other runs have an LM head of their own. LoRA runs have one micro-batch a step, so that the
reference pass (the same wrapper, adapter disabled) falls between the policy's forward and its
backward pass.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows
from ranks_helpers import (
    TOLERANCE,
    assert_every_rank_raised,
    assert_same,
    assert_same_evaluation,
    job,
    log,
    on_ranks,
    relative,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STRATEGIES = ("fsdp2", "zero1", "zero2", "zero3")
"""In the order of the runs: ZeRO-3 leaves a process in which models are made of partitions only."""
SHARDED = ("fsdp2", "zero3")
"""Those that shard the parameters, so that every forward pass must go through the wrapper."""

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= {"learning_rate": 0.01}


def cut(micro: int, accumulation: int) -> dict[str, int]:
    return {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}


RUNS: dict[str, dict[str, Any]] = {
    "full": {"aot_mode": "paired", "eval_batch_size": 4, "aot_samples": 2, **cut(4, 2)},
    "precompute": {"aot_mode": "unpaired", "precompute_ref_log_probs": True, **cut(4, 2)},
    "lora": {"aot_mode": "paired", **LORA, **cut(8, 1)},
}


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = model.config.__class__(**{**model.config.to_dict(), "tie_word_embeddings": False})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        untied = type(model)(config)
    with torch.no_grad():
        for parameter in untied.parameters():
            parameter.mul_(3.0)
    path = tmp_path_factory.mktemp("models") / "untied"
    untied.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


class Bench:
    def __init__(self, work: Path, tied: Path, untied: Path) -> None:
        self.work, self.tied, self.untied = work, tied, untied
        self.data = {
            "paired": write_rows(work / "paired.jsonl", paired_rows(64)),
            "unpaired": write_rows(work / "unpaired.jsonl", unpaired_rows(64)),
            "eval": write_rows(work / "eval.jsonl", paired_rows(13, seed=1)),
        }
        self.singles: dict[str, Run] = {}

    def config(self, name: str, run: str, **keys: Any) -> dict[str, Any]:
        keys = {**RUNS[run], **keys}
        cfg = config(
            self.tied if run == "full" else self.untied,
            self.data[keys["aot_mode"]],
            self.work / ("one" if name == run else "ranks") / name,
            dataset_num_proc=0,  # in this process: to start another one takes longer
            **{"max_steps": 6, "save_steps": 3, "learning_rate": 0.001, **keys},
        )
        if run == "full":
            cfg["test_datasets"] = [{**cfg["datasets"][0], "path": str(self.data["eval"])}]
            cfg["eval_steps"] = 3
        return cfg

    def strategy(self, name: str) -> dict[str, Any]:
        """The keys by which a user of the host asks for it."""
        if name == "fsdp2":
            fsdp_config = {
                "offload_params": False,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "state_dict_type": "FULL_STATE_DICT",
                "reshard_after_forward": True,
            }
            return {"fsdp_version": 2, "fsdp_config": fsdp_config}
        zero: dict[str, Any] = {"stage": int(name.removeprefix("zero"))}
        if name == "zero3":
            zero |= {
                "stage3_gather_16bit_weights_on_model_save": True,
                # Nothing is so small that every rank keeps it.
                "stage3_param_persistence_threshold": 0,
            }
        path = self.work / f"{name}.json"
        auto = dict.fromkeys(
            (
                "train_batch_size",
                "train_micro_batch_size_per_gpu",
                "gradient_accumulation_steps",
                "gradient_clipping",
            ),
            "auto",
        )
        path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": False}, **auto}))
        return {"deepspeed": str(path)}

    def on_ranks(self) -> list[dict[str, str]]:
        jobs = []
        for name in STRATEGIES:
            keys = self.strategy(name)
            for run in RUNS if name in SHARDED else ("full",):
                jobs.append(job(self.config(f"{name}-{run}", run, **keys)))
            checkpoint = self.work / "ranks" / f"{name}-full" / "checkpoint-3"
            resume = {"resume_from_checkpoint": str(checkpoint)}
            jobs.append(job(self.config(f"{name}-resumed", "full", **keys, **resume)))
            if name in SHARDED:
                cfg = self.config(f"{name}-not_finite", "full", **keys)
                jobs.append(job(cfg, fault="not_finite"))
        return jobs

    def single(self, run: str) -> Run:
        if run not in self.singles:
            cfg = self.config(run, run, **cut(16, 1))
            if run == "precompute":  # one process scores the reference in every step
                del cfg["precompute_ref_log_probs"]
            self.singles[run] = train(cfg)
        return self.singles[run]

    def output(self, name: str) -> Path:
        return self.work / "ranks" / name


@pytest.fixture(scope="module")
def bench(tiny_model: Path, untied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("sharded"), tiny_model, untied_model)
    code = on_ranks(bench.on_ranks(), bench.work / "log", timeout=1500)
    assert code == 0, f"the ranks failed with {code}:\n{log(bench.work / 'log')[-8000:]}"
    return bench


def reloaded(output: Path) -> dict[str, torch.Tensor]:
    """What a user loads afterwards."""
    adapter = output / "adapter_model.safetensors"
    if adapter.exists():
        return load_file(adapter)
    state = AutoModelForCausalLM.from_pretrained(output).state_dict()
    if state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr():
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_fine_tuning(strategy: str, bench: Bench) -> None:
    output, reference = bench.output(f"{strategy}-full"), bench.single("full")
    run = Run.last(output)
    assert_same(run, reference, reloaded(output))
    assert_same_evaluation(run, reference)
    for rank in range(2):
        carries = json.loads(Path(f"{output}.rank{rank}.carries").read_text())
        kept = 0 if strategy in SHARDED else 2
        assert [step.count("KeepGraph") for step in carries[1:]] == 5 * [kept]


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("run", ["precompute", "lora"])
def test_sharded_parameters(strategy: str, run: str, bench: Bench) -> None:
    output = bench.output(f"{strategy}-{run}")
    assert_same(Run.last(output), bench.single(run), reloaded(output))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on_as_the_unbroken_one(strategy: str, bench: Bench) -> None:
    run, unbroken = (Run.last(bench.output(f"{strategy}-{which}")) for which in ("resumed", "full"))
    for key in ("loss", "grad_norm"):
        values, expected = run.logged(key), unbroken.logged(key)
        assert len(values) == 6
        # The state of a checkpoint holds the log of its own three steps.
        assert values[:3] == expected[:3]
        assert all(relative(a, b) < TOLERANCE for a, b in zip(values, expected, strict=True))
    # Steps 4 to 6 were trained, not copied.
    problems = bench.output(f"{strategy}-resumed.rank0.json").read_text()
    assert len(json.loads(problems)) == 3


@pytest.mark.parametrize("strategy", SHARDED)
def test_every_rank_raises_where_one_is_not_finite(strategy: str, bench: Bench) -> None:
    # A rank that made one forward pass more or less than the others would wait for their shards.
    assert_every_rank_raised(bench.output(f"{strategy}-not_finite"), 16, 32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_need_whole_weights(strategy: str, bench: Bench) -> None:
    files = sorted(file.name for file in bench.output(f"{strategy}-full").glob("aot/samples-*"))
    steps = [] if strategy in SHARDED else [0, 3, 6]
    assert files == [f"samples-eval-step{step}.jsonl" for step in steps]
    assert "no answers for `aot_samples` in this run: NotImplementedError" in log(
        bench.work / "log"
    )
