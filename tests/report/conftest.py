"""Made-up evaluations with known shapes, and a saved run to be scored."""

import json

import numpy as np
import pytest
from hypothesis import settings

from aot_plugin.report.scores import Scores

# A shared machine says nothing about how long an example takes.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def make_paired():
    def make(n=60, shift=2.0, spread=1.3, seed=0, beta=0.1, step=20, eval_set="eval"):
        random = np.random.default_rng(seed)
        ref_chosen, ref_rejected = random.normal(-60, 15, n), random.normal(-62, 15, n)
        moved = random.normal(0, spread, n)
        return Scores.paired(
            beta=beta,
            step=step,
            eval_set=eval_set,
            chosen_logps=ref_chosen + shift / 2 + moved,
            rejected_logps=ref_rejected - shift / 2 + random.normal(0, 1, n),
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_tokens=random.integers(5, 60, n),
            rejected_tokens=random.integers(5, 60, n),
        )

    return make


@pytest.fixture
def make_unpaired():
    def make(n=60, positives=25, shift=1.0, seed=0, beta=0.1, step=20, eval_set="eval"):
        random = np.random.default_rng(seed)
        label = np.arange(n) < positives
        ref = random.normal(-60, 15, n)
        return Scores.unpaired(
            beta=beta,
            step=step,
            eval_set=eval_set,
            logps=ref + np.where(label, shift, 0) + random.normal(0, 1, n),
            ref_logps=ref,
            label=random.permutation(label) if shift == 0 else label,
            tokens=random.integers(5, 60, n),
        )

    return make


@pytest.fixture
def make_graded():
    """Four levels, of which the third lies below the second; one has rows of unequal weights."""

    def make(n=20, seed=0, step=20, weighted=False, eval_set="eval"):
        random = np.random.default_rng(seed)
        level = np.repeat([0.0, 1 / 3, 2 / 3, 1.0], [n, n + 3, n + 5, n + 7])
        shift = np.repeat([0.0, 3.0, 1.0, 6.0], [n, n + 3, n + 5, n + 7])
        ref = random.normal(-60, 15, len(level))
        return Scores.unpaired(
            beta=0.1,
            step=step,
            eval_set=eval_set,
            logps=ref + shift + random.normal(0, 1, len(level)),
            ref_logps=ref,
            label=level == 1,
            level=level,
            weight=random.uniform(0.1, 2, len(level)) if weighted else None,
            tokens=random.integers(5, 60, len(level)),
        )

    return make


@pytest.fixture(scope="session")
def pair_rows():
    words = ["red", "green", "blue", "white", "black"]
    return [
        {"prompt": f"Say {word}.", "chosen": f"{word} " * n, "rejected": "No, thank you."}
        for n, word in enumerate(words, start=1)
    ]


@pytest.fixture(scope="session")
def pairs(pair_rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "held out.jsonl"
    path.write_text("\n".join(map(json.dumps, pair_rows)))
    return path


@pytest.fixture(scope="session")
def save_arguments():
    """Saves training arguments as the Trainer does."""
    import torch
    from transformers import TrainingArguments

    def save(directory, **attributes):
        arguments = TrainingArguments(output_dir=str(directory), use_cpu=True)
        arguments.__dict__.update(attributes)
        torch.save(arguments, directory / "training_args.bin")

    return save


@pytest.fixture(scope="session")
def lora_run(tiny_model, save_arguments, tmp_path_factory):
    """A LoRA adapter with random weights, and the state and arguments of its checkpoint."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = tmp_path_factory.mktemp("lora") / "run"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(run)
    checkpoint = run / "checkpoint-12"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 12}')
    save_arguments(checkpoint, beta=0.25)
    return run
