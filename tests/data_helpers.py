"""Real tokenizers with real templates, and rows on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
from axolotl.utils.chat_templates import get_chat_template
from transformers import AutoTokenizer

SMOLLM2 = Path(__file__).parents[1] / "outputs" / "smollm2-135m-instruct"
MISTRAL_VOCAB = (
    Path(mistral_common.__file__).parent / "data/mistral_instruct_tokenizer_240323.model.v3"
)

MISTRAL = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] + '\n\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- for turn in turns %}
  {%- if turn['role'] == 'user' %}
    {{- '[INST] ' + (system if loop.last or loop.index0 == turns|length - 2 else '') }}
    {{- turn['content'] + '[/INST]' }}
  {%- else %}{{- ' ' + turn['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

MERLINITE = """{%- for turn in messages %}
  {%- if turn['role'] == 'system' %}{{- '<|system|>\n' + turn['content'] + '\n' }}
  {%- elif turn['role'] == 'user' %}{{- '<|user|>\n' + turn['content'] + '\n' }}
  {%- else %}
    {{- '<|assistant|>\n' + turn['content'] + eos_token + ('' if loop.last else '\n') }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

FAMILIES = {
    "smollm2": None,
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "template": MISTRAL},
    "llama3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "special": ["<|start_header_id|>", "<|end_header_id|>"],
        "template": get_chat_template("llama3"),
    },
    "merlinite": {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "special": ["<|system|>", "<|user|>", "<|assistant|>"],
        "template": MERLINITE,
    },
    "chatml": {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "special": ["<|im_start|>"],
        "template": get_chat_template("chatml"),
    },
}


def make_tokenizer(folder: Path, family: str) -> None:
    spec = FAMILIES[family]
    if spec is None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(SMOLLM2 / name, folder)
        return
    shutil.copy(MISTRAL_VOCAB, folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "add_bos_token": True}
    config |= {key: spec[key] for key in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = [spec["bos_token"], spec["eos_token"], *spec.get("special", [])]
    shrink(AutoTokenizer.from_pretrained(folder), folder, special)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": spec.get("special", [])})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = spec["template"]
    tokenizer.save_pretrained(folder)


def shrink(tokenizer: Any, folder: Path, special: list[str], pieces: int = 1500) -> None:
    """Leaves a SentencePiece tokenizer its bytes, characters and first ``pieces``.

    The host hashes the vocabulary with every map of rows: of all 32,768 tokens, that takes longer
    than all else in a test.
    """
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    model = data["model"]
    named = ["<unk>", "<s>", "</s>"]
    first = next(id for piece, id in model["vocab"].items() if piece == "<0xFF>") + 1
    kept = [
        piece
        for piece, id in model["vocab"].items()
        if piece in named
        or first - 256 <= id < first + pieces
        or (len(piece) == 1 and ord(piece) < 0x2600)
    ]
    model["vocab"] = {piece: id for id, piece in enumerate(kept)}
    model["merges"] = [[a, b] for a, b in model["merges"] if {a, b, a + b} <= model["vocab"].keys()]
    further = [token for token in dict.fromkeys(special) if token not in named]
    ids = {token: id for id, token in enumerate(kept + further) if token in (*named, *further)}
    added = [token for token in data["added_tokens"] if token["content"] in ids]
    data["added_tokens"] = [token | {"id": ids[token["content"]]} for token in added]
    for token, found in data["post_processor"].get("special_tokens", {}).items():
        found["ids"] = [ids[token]]
    path.write_text(json.dumps(data))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
