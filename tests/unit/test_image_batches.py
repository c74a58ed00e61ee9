"""Batches with images: what the collator makes of rows, and their log-probabilities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vision
from axolotl.utils.collators.mm_rl import (
    AxolotlVisionPreferenceCollator,
    AxolotlVisionUnpairedPreferenceCollator,
)

from aot_plugin.host.images import ImageCollator
from aot_plugin.scoring.layout import Padded
from aot_plugin.scoring.logps import sequence_logps
from aot_plugin.scoring.model_input import FIELDS, MORE, is_divisible, padded_rows
from aot_plugin.scoring.scorer import Scorer
from aot_plugin.scoring.settle import Settled

KINDS = ["Llava", "Gemma3"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    made: dict[str, tuple[Any, Any]] = {}

    def load(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            path = vision.save_model(tmp_path_factory.mktemp(kind), kind)
            model = transformers.AutoModelForImageTextToText.from_pretrained(path)
            made[kind] = model, transformers.AutoProcessor.from_pretrained(path)
        return made[kind]

    return load


def pairs(n: int, folder: Path) -> list[dict[str, Any]]:
    rows = vision.image_pairs(n, folder)
    return [
        {
            "prompt": row["messages"],
            "chosen": [row["chosen"]],
            "rejected": [row["rejected"]],
            "images": row["images"],
        }
        for row in rows
    ]


def collator(processor: Any, limit: int | None = None) -> ImageCollator:
    return ImageCollator(AxolotlVisionPreferenceCollator(processor, max_length=limit), limit)


@torch.no_grad()
def logps(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return sequence_logps(model, model.lm_head, padded_rows(batch))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_probabilities_are_those_of_a_plain_forward_pass(
    kind: str, load: Callable, tmp_path: Path
) -> None:
    model, processor = load(kind)
    rows = pairs(4, tmp_path / "images")
    batch = collator(processor)(rows)
    expected = []
    for response in ("chosen", "rejected"):
        for row in rows:
            turns = [*row["prompt"], *row[response]]
            text = [
                processor.apply_chat_template(with_parts(some), add_generation_prompt=more)
                for some, more in ((turns, False), (row["prompt"], True))
            ]
            images = [transformers.image_utils.load_image(image) for image in row["images"]]
            whole, prompt = (
                processor(text=t, images=images, return_tensors="pt", add_special_tokens=False)
                for t in text
            )
            logits = model(**whole).logits[0].double()
            begin = prompt["input_ids"].shape[1]
            targets = whole["input_ids"][0, begin:]
            of_tokens = logits[begin - 1 : -1].log_softmax(-1).gather(1, targets[:, None])
            expected.append(of_tokens.sum())
    found = logps(model, batch)
    torch.testing.assert_close(found, torch.stack(expected).float(), atol=1e-4, rtol=0)
    without = {name: values for name, values in batch.items() if name != MORE}
    assert (logps(model, without) - found).abs().min() > 0.01  # the images do count
    alone = torch.stack([logps(model, collator(processor)([row])) for row in rows], dim=1)
    torch.testing.assert_close(alone.flatten(), found, atol=1e-4, rtol=0)


def with_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents as lists of parts; the images of a prompt without places for them come first."""
    made = []
    for turn in turns:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        places = [part for part in parts if part["type"] == "image"]
        first = [{"type": "image"}] if turn["role"] == "user" and not places else []
        made.append({"role": turn["role"], "content": [*first, *parts]})
    return made


def test_rows_are_cut_where_nothing_but_an_end_is_lost(load: Callable, tmp_path: Path) -> None:
    """As TRL cuts them, and all that is one number a token with the ids."""
    _, processor = load("Gemma3")
    rows = pairs(4, tmp_path / "images")  # the last one has two images, and 27 tokens
    expected = AxolotlVisionPreferenceCollator(processor, max_length=24)(rows)
    found = collator(processor, 24)(rows)
    more = found.pop(MORE)
    assert more.keys() == {"pixel_values", "token_type_ids"}
    for name, values in (found | more).items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`sequence_len: 20` cuts off.*has 27 tokens"):
        collator(processor, 20)(rows)
    assert len(collator(processor, 20)(rows[:3])["input_ids"]) == 6
    with pytest.raises(ValueError, match="`sequence_len: 5` cuts off an image"):
        collator(processor, 5)(rows[:1])


def test_labelled_rows_have_no_pairs_for_a_kl_term(load: Callable, tmp_path: Path) -> None:
    _, processor = load("Llava")
    rows = vision.image_completions(3, tmp_path / "images")
    batch = ImageCollator(AxolotlVisionUnpairedPreferenceCollator(processor), None)(rows)
    assert batch.keys() == {*FIELDS, "label", MORE}
    assert batch["label"].tolist() == [True, False, False]
    assert batch[MORE].keys() == {"pixel_values"}


def test_what_can_t_be_collated_is_named(load: Callable, tmp_path: Path) -> None:
    _, processor = load("Llava")
    rows = pairs(3, tmp_path / "images")
    prompt = rows[1]["prompt"][0]["content"][0]["text"]
    (tmp_path / "bad.png").write_bytes(Path(rows[1]["images"][0]).read_bytes()[:60])
    for image in ("bad.png", "none.png"):
        bad = rows[1] | {"images": [str(tmp_path / image)]}
        with pytest.raises(ValueError, match=f"the row with the prompt '{prompt}' can't be read"):
            collator(processor)([rows[0], bad, rows[2]])
    empty = rows[1] | {"rejected": [{"role": "assistant", "content": ""}]}
    silent = processor.chat_template.replace("' </s>'", "''")
    with using(processor, silent), pytest.raises(ValueError, match=f"'{prompt}' has an empty comp"):
        collator(processor)([rows[0], empty])
    blind = processor.chat_template.replace("<image> ", "")
    with using(processor, blind), pytest.raises(ValueError, match=r"image|leaves out"):
        collator(processor)(rows)


@pytest.mark.parametrize("place", ["prompt", "rejected"])
@pytest.mark.parametrize(("kind", "token"), [("Llava", "<image>"), ("Gemma3", "<begin>")])
def test_a_placeholder_in_a_text_is_named(
    kind: str, token: str, place: str, load: Callable, tmp_path: Path
) -> None:
    """It would be expanded without an image, or stop the model in the middle of a run."""
    _, processor = load(kind)
    rows = pairs(2, tmp_path / "images")
    texts = {"prompt": [{"type": "text", "text": f"{token} stone"}], "rejected": f"stone {token}"}
    rows[1][place] = [rows[1][place][0] | {"content": texts[place]}]
    with pytest.raises(ValueError, match=f"has '{token}' in its text, which stands for an image"):
        collator(processor)(rows)


@contextmanager
def using(processor: Any, template: str) -> Iterator[None]:
    own, processor.chat_template = processor.chat_template, template
    try:
        yield
    finally:
        processor.chat_template = own


def test_a_batch_with_images_is_never_cut(load: Callable, tmp_path: Path) -> None:
    """Its images could not be divided among its rows."""
    model, processor = load("Llava")
    batch = collator(processor)(pairs(2, tmp_path / "images"))
    assert not is_divisible(batch)
    assert is_divisible({name: batch[name] for name in FIELDS})
    calls = []

    def exhausted(*_: Any) -> Any:
        calls.append(1)
        raise torch.OutOfMemoryError("no")

    settled = Settled(Padded(), None, None)
    scorer = Scorer(
        policy=lambda: model,
        wrapped=lambda: model,
        head=lambda: model.lm_head,
        reference=lambda policy: nullcontext((policy, model.lm_head)),
        settle=lambda model: settled,
        with_gradient=nullcontext,
        without_gradient=torch.no_grad,
    )
    with model.register_forward_pre_hook(exhausted), pytest.raises(torch.OutOfMemoryError):
        scorer.logps(batch)
    assert len(calls) == 1
    torch.testing.assert_close(scorer.logps(batch), logps(model, batch))
