"""Batches of rows with images: the host's collator, and a look at what it makes of them.

TRL tokenizes such rows and cuts them at `max_length` when it collates them. It says nothing if an
image's tokens or a whole completion are cut off, or if the chat template has no place for images.
A processor takes its placeholder in a row's text for one more image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from ..scoring.model_input import FIELDS, MORE, Batch

LOG = get_logger("axolotl.aot_plugin.images")

OTHERS = ("label",)
"""What a batch holds that is no argument of the model's forward pass."""
TURNS = ("prompt", "chosen", "rejected", "completion")
"""Columns of turns."""
SHOWN = 80
"""Characters of a prompt that a message shows, its last ones."""

Row = dict[str, Any]


class ImageCollator:
    """Collates rows with images into a ``Batch`` whose ``MORE`` holds all that belongs to them.

    Args:
        collate: the host's collator, or TRL's.
        max_length: tokens to which a row is cut; None for no limit.
    """

    def __init__(self, collate: Any, max_length: int | None) -> None:
        # It would cut rows without a word, and tokenize the completions again for KTO's KL term.
        instead = {"max_length": None, "calculate_kl": False}
        known = {field.name for field in dataclasses.fields(collate)}
        self._collate = dataclasses.replace(
            collate, **{name: value for name, value in instead.items() if name in known}
        )
        self._max_length = max_length
        self._image_tokens = _image_tokens(collate.processor)
        known_by = (collate.processor, collate.processor.tokenizer)
        found = (getattr(holder, "image_token", None) for holder in known_by)
        self._places: set[str] = {place for place in found if place}
        self._has_warned = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of some rows, in TRL's order of sequences.

        Raises:
            ValueError: naming the prompt of the row that can't be collated, that has a placeholder
                in its text, or that would lose an image's tokens or its whole completion.
        """
        self._check_texts(rows)
        batch = self._collated(rows)
        prompts = [_shown(row) for row in rows] * (len(batch["input_ids"]) // len(rows))
        self._check(batch, prompts)
        ids, limit = batch["input_ids"], self._max_length
        if limit is not None and ids.shape[1] > limit:
            self._check_cut(batch, limit, prompts)
            for name, values in batch.items():
                of_tokens = isinstance(values, Tensor) and not values.is_floating_point()
                if of_tokens and values.shape == ids.shape:
                    batch[name] = values[:, :limit]
        more = {name: v for name, v in batch.items() if name not in (*FIELDS, *OTHERS)}
        return {name: v for name, v in batch.items() if name not in more} | {MORE: more}

    def _collated(self, rows: Sequence[Row]) -> dict[str, Any]:
        # Of the columns of messages TRL looks at any one to tell turns from text.
        rows = [{k: v for k, v in row.items() if k != "messages"} for row in rows]
        try:
            return dict(self._collate(list(map(dict, rows))))
        except Exception:
            for row in rows:
                try:
                    self._collate([dict(row)])
                except Exception as error:
                    reason = str(error) or repr(error)
                    raise ValueError(
                        f"the row with the prompt {_shown(row)} can't be read: {reason}"
                    ) from error
            raise

    def _check_texts(self, rows: Sequence[Row]) -> None:
        for row in rows:
            # A prompt that is text is rendered already, and has its placeholders.
            texts = [text for name in TURNS for text in _texts(row.get(name))]
            typed = [place for place in self._places if any(place in text for text in texts)]
            if typed:
                raise ValueError(
                    f"the row with the prompt {_shown(row)} has {typed[0]!r} in its text, which "
                    'stands for an image: write a part `{"type": "image"}` of the turn instead, or '
                    "remove it"
                )

    def _check(self, batch: dict[str, Any], prompts: Sequence[str]) -> None:
        imageless = ~torch.isin(batch["input_ids"], self._image_tokens).any(dim=1)
        if imageless.any() and len(self._image_tokens):
            raise ValueError(
                f"the row with the prompt {prompts[int(imageless.nonzero()[0])]} has no image "
                "token: the chat template leaves out its images; set a `chat_template` of the model"
            )
        empty = batch["completion_mask"].sum(dim=1) == 0
        if empty.any():
            prompt = prompts[int(empty.nonzero()[0])]
            raise ValueError(f"the row with the prompt {prompt} has an empty completion")

    def _check_cut(self, batch: dict[str, Any], limit: int, prompts: Sequence[str]) -> None:
        lengths = batch["attention_mask"].sum(dim=1)
        lost = batch["completion_mask"][:, :limit].sum(dim=1) == 0
        lost |= torch.isin(batch["input_ids"][:, limit:], self._image_tokens).any(dim=1)
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"`sequence_len: {limit}` cuts off an image or a whole completion: the row with "
                f"the prompt {prompts[row]} has {int(lengths[row])} tokens, those of its images "
                "included. Raise it, set a smaller `image_size`, or remove the row"
            )
        if not self._has_warned:
            self._has_warned = True
            LOG.warning(
                "a completion that ends after %d tokens is cut at `sequence_len: %d`, and so will "
                "be others: how long a row with images is, is known only when it is collated, so "
                "`excess_length_strategy` can't drop it",
                int(lengths.max()),
                limit,
            )


def _image_tokens(processor: Any) -> Tensor:
    """The ids that stand for an image's features, [0 or more] int64."""
    found = getattr(processor, "image_token_ids", None)
    if found is None:
        found = [getattr(processor, "image_token_id", None)]
    return torch.tensor([token for token in found if token is not None], dtype=torch.int64)


def _texts(turns: Any) -> list[str]:
    """The text of turns, in parts; none for what is no list of turns."""
    contents = [turn.get("content") for turn in turns] if isinstance(turns, list) else []
    return [
        part if isinstance(part, str) else str(part.get("text") or "")
        for content in contents
        for part in (content if isinstance(content, list) else [content or ""])
    ]


def _shown(row: Row) -> str:
    """The end of a row's prompt, for messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = " ".join(filter(None, _texts(prompt)))
    return repr(str(prompt)[-SHOWN:])
