"""Random two-layer models of the architectures that the example configs name, with tokenizers
that have the special tokens and the chat template of the real ones."""

import shutil
from pathlib import Path
from typing import Any

from harness import random_model

MERLINITE = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\n' + message.content }}
{%- if message.role == 'assistant' -%}{{ '<|endoftext|>' }}{%- endif -%}
{%- if not loop.last -%}{{ '\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n<|assistant|>\n' }}{%- endif -%}
"""

# A response without reasoning follows an empty thinking block, which the prompt does not open.
QWEN3 = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{{ message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def merlinite_tokenizer(smollm2: Path, folder: Path) -> Any:
    """The Mistral vocabulary (of mistral-common) and the five tokens that Merlinite adds."""
    import mistral_common
    from transformers import LlamaTokenizer

    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / "tokenizer.model.v1", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        }
    )
    tokenizer.chat_template = MERLINITE
    return tokenizer


def llama3_tokenizer(smollm2: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    roles = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "additional_special_tokens": roles,
        }
    )
    tokenizer.pad_token = None
    return tokenizer


def qwen3_tokenizer(smollm2: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = QWEN3
    return tokenizer


FAMILIES = {
    "instructlab/merlinite-7b-lab": ("Mistral", merlinite_tokenizer),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("Llama", llama3_tokenizer),
    "Qwen/Qwen3-8B": ("Qwen3", qwen3_tokenizer),
}
"""`base_model` of the configs: prefix of its classes in transformers, tokenizer."""


def make_tiny(base_model: str, smollm2: Path, folder: Path) -> Path:
    """Write the stand-in for a base model into an empty folder."""
    prefix, make_tokenizer = FAMILIES[base_model]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(smollm2, folder)
    model = random_model(tokenizer, prefix, scale=1.0, head_dim=16, max_position_embeddings=4096)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
