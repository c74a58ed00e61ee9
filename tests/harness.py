"""Runs of the host on tiny inputs: configs, data, and what a run left behind.

``train`` calls what the host's own command calls (``axolotl.cli.train.do_cli``) in this process,
since an import of the host takes longer than a tiny run; ``axolotl`` starts the real command.
"""

import gc
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file

WORDS = (
    "apple river stone cloud green happy table light music dance bread water house dream garden "
    "winter summer forest ocean silver"
).split()

SMALLEST = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
"""Sizes of a model whose numbers do not matter."""

ENV = {
    **os.environ,
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


@dataclass(frozen=True)
class Run:
    """What a training run wrote into its last checkpoint."""

    checkpoint: Path

    @classmethod
    def last(cls, output_dir: Path) -> "Run":
        checkpoints = sorted(
            output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
        )
        assert checkpoints, f"no checkpoint in {output_dir}: {sorted(output_dir.iterdir())}"
        return cls(checkpoints[-1])

    @property
    def history(self) -> list[dict[str, float]]:
        return json.loads((self.checkpoint / "trainer_state.json").read_text())["log_history"]

    def logged(self, key: str) -> list[float]:
        """The values of a metric, in the order of the steps."""
        return [entry[key] for entry in self.history if key in entry]

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        names = ("model.safetensors", "adapter_model.safetensors")
        path = next(self.checkpoint / name for name in names if (self.checkpoint / name).exists())
        return load_file(path)


def random_model(
    tokenizer: Any = None, kind: str = "Llama", seed: int = 0, scale: float = 3.0, **sizes: Any
) -> Any:
    """A random causal language model; two layers of 64 dimensions where ``sizes`` say nothing.

    Args:
        tokenizer: what the vocabulary's size and the special tokens are taken from.
        kind: prefix of the classes' names in transformers.
        scale: factor on all weights. At three times their usual size the log-probabilities of
            responses differ by nats, and a few steps move them.
        sizes: keys of the model's config.
    """
    import transformers

    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if tokenizer is not None:
        defaults |= {"vocab_size": len(tokenizer)} | {k: getattr(tokenizer, k) for k in tokens}
    config = getattr(transformers, f"{kind}Config")(**defaults | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def base_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def save_adapter(model: Path, path: Path, **keys: Any) -> Path:
    """An adapter that moves log-probabilities by nats, as supervised training would leave it."""
    from peft import LoraConfig, get_peft_model

    keys = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **keys}
    policy = get_peft_model(base_model(model), LoraConfig(task_type="CAUSAL_LM", **keys))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                size = 0.3 if "lora_" in name else 0.03
                parameter += size * torch.randn(parameter.shape, generator=generator)
    policy.save_pretrained(path)
    return path


def word_tokenizer(template: str, roles: list[str], special: list[str], **tokens: str) -> Any:
    """One token per word: responses of equally many words have equal length.

    Args:
        template: the chat template, whose marks stand apart from words.
        roles, special: tokens beside ``WORDS`` that the template writes; the latter are special.
        tokens: ``bos_token``, ``eos_token``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<unk>", *tokens.values(), *special, *roles, *WORDS]
    ids = {token: i for i, token in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special,
        **tokens,
    )
    tokenizer.chat_template = template
    return tokenizer


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def paired_rows(n: int, seed: int = 0, words: int = 6) -> list[dict[str, Any]]:
    """Responses of equal length, so that couplings differ from the identity (see DESIGN)."""
    rng = random.Random(seed)
    return [
        {
            "messages": [{"role": "user", "content": sentence(rng, 5)}],
            "chosen": {"role": "assistant", "content": sentence(rng, words)},
            "rejected": {"role": "assistant", "content": sentence(rng, words)},
        }
        for _ in range(n)
    ]


def unpaired_rows(
    n: int, seed: int = 0, words: int = 6, positive_every: int = 3
) -> list[dict[str, Any]]:
    """Every third row positive, as strings that the host's own KTO strategies read."""
    rng = random.Random(seed)
    return [
        {
            "prompt": sentence(rng, 5),
            "completion": sentence(rng, words),
            "label": i % positive_every == 0,
        }
        for i in range(n)
    ]


def config(model: Path, data: Path, output_dir: Path, **keys: Any) -> dict[str, Any]:
    """A config that trains a tiny model in float32 on the CPU, deterministic, saved at the end."""
    steps = keys.get("max_steps", 5)
    unpaired = keys.get("aot_mode") == "unpaired" or keys.get("rl") == "kto"
    return {
        "base_model": str(model),
        "rl": "aot",
        "rl_beta": 0.1,
        "datasets": [
            {
                "path": str(data),
                "ds_type": "json",
                "split": "train",
                "type": "chatml.ultra" if unpaired else "chat_template.default",
            }
        ],
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": steps,
        "optimizer": "adamw_torch",
        "learning_rate": 0.003,
        "lr_scheduler": "constant",
        "save_strategy": "steps",
        "save_steps": steps,
        "logging_steps": 1,
        "output_dir": str(output_dir),
        "dataset_prepared_path": str(output_dir.parent / "prepared"),
        "bf16": False,
        "fp16": False,
        "seed": 1,
        "dataset_num_proc": 0,  # any other number starts processes, which takes seconds
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        **({"remove_unused_columns": False} if keys.get("rl") == "kto" else {}),
        **keys,
    }


def write_config(path: Path, cfg: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(cfg))
    return path


def saved_in_process() -> Any:
    """A patch of ``Dataset.save_to_disk``: the same files, written by this process. The host has
    them written by a new interpreter, even a few rows, which takes longer than a tiny run."""
    from datasets import Dataset

    save = Dataset.save_to_disk

    def without_pool(self: Dataset, path: str, **keys: Any) -> None:
        save(self, path, **keys | {"num_proc": None})

    return mock.patch.object(Dataset, "save_to_disk", without_pool)


def train(cfg: dict[str, Any]) -> Run:
    """Train in this process, by the function that the host's command calls."""
    import axolotl.train  # noqa: F401  (all of the host, before the freeze)
    from axolotl.cli.train import do_cli

    gc.freeze()  # the host collects garbage often; what it imported need not be looked at again
    output_dir = Path(cfg["output_dir"])
    path = write_config(output_dir.parent / f"{output_dir.name}.yml", cfg)
    # The host parses sys.argv for its own options.
    with mock.patch.object(sys, "argv", ["train"]), mock.patch.dict(os.environ, ENV):
        do_cli(config=str(path))
    return Run.last(output_dir)


def axolotl(*args: str | Path, timeout: int = 600, check: bool = True, **env: str) -> str:
    """Run the host's command; returns its whole output."""
    done = subprocess.run(
        ["axolotl", *map(str, args)],
        env={**ENV, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"axolotl {args} failed:\n{done.stdout[-6000:]}")
    return done.stdout
