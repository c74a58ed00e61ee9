"""Tiny random vision-language models with their real processors, and rows with images."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import WORDS, paired_rows, sentence, word_tokenizer
from PIL import Image

IMAGES = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
ROLES = ["<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' }}{% for p in m['content'] %}"
    "{{ 'PLACE ' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SIDE, PATCH = 16, 8


def save_model(path: Path, kind: str) -> Path:
    """A random ``Llava`` (CLIP, Llama) or ``Gemma3`` (SigLIP, ``token_type_ids``, windows)."""
    import transformers

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    place = IMAGES["image_token" if kind == "Llava" else "boi_token"]
    words = word_tokenizer("", [], [*IMAGES.values(), *ROLES], **tokens)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        **tokens,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=IMAGES,
    )
    # The processor has the template: a text's is of no use for images.
    template = TEMPLATE.replace("PLACE", place)
    text = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    size = {"height": SIDE, "width": SIDE}
    if kind == "Llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
        processor: Any = transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
        config: Any = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=16),
            image_token_index=tokenizer.image_token_id,
            vision_feature_layer=-1,
        )
    else:
        images = transformers.Gemma3ImageProcessorPil(size=size)
        processor = transformers.Gemma3Processor(
            images, tokenizer, image_seq_length=(SIDE // PATCH) ** 2, chat_template=template
        )
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**text, sliding_window=8, layer_types=layers),
            vision_config=transformers.SiglipVisionConfig(**vision),
            mm_tokens_per_image=(SIDE // PATCH) ** 2,
            image_token_index=tokenizer.image_token_id,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        with torch.no_grad():
            for parameter in model.parameters():  # no bias is 0, where all is rounding
                parameter.mul_(3.0).add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def save_image(path: Path, seed: int) -> str:
    """Noise of a shape of its own."""
    numbers = np.random.default_rng(seed)
    pixels = numbers.integers(0, 256, (20, 20 + seed % 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def image_pairs(n: int, folder: Path) -> list[dict[str, Any]]:
    """Pairs of equal lengths, most with one image before the text, some with two within it."""
    folder.mkdir(exist_ok=True)
    rows = paired_rows(n)
    for number, row in enumerate(rows):
        several = number % 4 == 3
        row["images"] = [
            save_image(folder / f"{number}-{i}.png", 10 * number + i) for i in range(1 + several)
        ]
        if several:
            text = row["messages"][0]["content"]
            parts = [{"type": "text", "text": f"{word} "} for word in WORDS[:2]]
            image = {"type": "image", "text": None}
            row["messages"][0]["content"] = [image, parts[0], image, {"type": "text", "text": text}]
        else:
            content = row["messages"][0]["content"]
            row["messages"][0]["content"] = [{"type": "text", "text": content}]
    return rows


def image_completions(n: int, folder: Path) -> list[dict[str, Any]]:
    """Every third row positive, as turns that TRL's KTO trainer reads as they are."""
    rng = random.Random(1)
    return [
        {
            "prompt": row["messages"],
            "completion": [{"role": "assistant", "content": sentence(rng, 6)}],
            "label": number % 3 == 0,
            "images": row["images"],
        }
        for number, row in enumerate(image_pairs(n, folder))
    ]
