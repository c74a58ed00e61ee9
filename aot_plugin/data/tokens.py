"""Token ids of rendered strings, in both modes, in place of TRL's own tokenization.

TRL tokenizes the prompt, then prompt and completion together, and cuts the latter at the length of
the former to get the completion. Where a token spans the boundary of the two, the first characters
of the completion are lost. Where a template has written the begin-of-sequence token, there are two.
And a completion that ends with another end-of-turn token still gets an end-of-sequence token. So
the trainer uses the ids that are made here: by our strategies for the rows that they render, and
for text of other strategies when the trainer prepares the dataset.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from .levels import LEVEL
from .weights import WEIGHT

COMPLETIONS = {"paired": ("chosen", "rejected"), "unpaired": ("completion",)}
"""The columns of completions, by mode."""

ANCHOR = "\n"
"""A SentencePiece tokenizer inserts a blank at the beginning of a text, but not after this."""


def ids_columns(mode: str) -> dict[str, str]:
    """TRL's columns of ids, mapped to ours.

    Ours have names of their own because TRL overwrites its columns. They are null in rows of other
    strategies.
    """
    return {f"{name}_ids": f"template_{name}_ids" for name in ("prompt", *COMPLETIONS[mode])}


def features(mode: str, weighted: bool = False, graded: bool = False) -> Features:
    """Features of rows that we prepare: the columns that the host expects, our token ids and, if
    the rows have them, weights and levels."""
    texts = {name: Value("string") for name in ("prompt", *COMPLETIONS[mode])}
    label = {"label": Value("bool")} if mode == "unpaired" else {}
    weight = {WEIGHT: Value("float64")} if weighted else {}
    level = {LEVEL: Value("float64")} if graded else {}
    ids = {name: ListOf(Value("int32")) for name in ids_columns(mode).values()}
    return Features(texts | label | weight | level | ids)


def token_ids(
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    tokenizer: Any,
    begin: bool = False,
) -> list[list[list[int]]]:
    """Tokenizes prompts and their completions.

    A completion continues the ids of its prompt, as in generation, and no character is lost. It
    ends with its own end-of-turn token or, if it has none, with the end-of-sequence token.

    Args:
        prompts: rendered prompts.
        completions: those of each prompt, equally many for all.
        tokenizer: the run's tokenizer.
        begin: True to begin with a begin-of-sequence token, if the tokenizer adds one and the text
            has none (a chat template writes its own).

    Returns:
        [prompts][1 + completions] lists of ids, the prompt's first.
    """
    if not prompts:
        return []

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    bos = tokenizer.bos_token_id
    first = [bos] if begin and bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    endings = {tokenizer.eos_token_id, *special_tokens(tokenizer)}
    wholes = iter(ids([p + c for p, row in zip(prompts, completions, strict=True) for c in row]))
    (anchor,) = ids([ANCHOR])
    found = []
    for prompt_ids, row in zip(ids(prompts), completions, strict=True):
        opening = [] if prompt_ids[:1] == first else first
        found.append([opening + prompt_ids])
        for completion, whole in zip(row, wholes, strict=False):
            if whole[: len(prompt_ids)] == prompt_ids:
                completion_ids = whole[len(prompt_ids) :]
            else:
                # A token spans the boundary.
                alone, anchored = ids([completion, ANCHOR + completion])
                at_anchor = anchored[: len(anchor)] == anchor
                completion_ids = anchored[len(anchor) :] if at_anchor else alone
            ended = completion_ids and completion_ids[-1] in endings
            if not ended and tokenizer.eos_token_id is not None:
                completion_ids = [*completion_ids, tokenizer.eos_token_id]
            found[-1].append(completion_ids)
    return found


def same_ids(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[bool]:
    """Whether the two texts of each pair have the same token ids, even if they differ."""
    normalize = _lossless(tokenizer)
    alike = [n for n, (a, b) in enumerate(pairs) if not normalize or normalize(a) == normalize(b)]
    same = [False] * len(pairs)
    if alike:
        ids = [
            tokenizer([pairs[n][side] for n in alike], add_special_tokens=False)["input_ids"]
            for side in range(2)
        ]
        for n, one, other in zip(alike, *ids, strict=True):
            same[n] = one == other
    return same


def _lossless(tokenizer: Any) -> Callable[[str], str] | None:
    """The normalization of a tokenizer whose ids preserve every byte of the normalized text.

    Returns:
        The function that normalizes a text; None if the ids may lose something (unknown characters,
        white space next to a token or at the beginning).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(
        t.lstrip or t.rstrip for t in tokenizer.added_tokens_decoder.values()
    ):
        return None
    pieces = repr(backend.pre_tokenizer)
    if "ByteLevel(add_prefix_space=False" not in pieces or "Removed" in pieces:
        return None
    return backend.normalizer.normalize_str if backend.normalizer else str


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The texts of the special tokens, which can end a turn, by id."""
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def is_text(dataset: Dataset, mode: str) -> bool:
    """Whether prompts and completions are strings (not turns, for instance)."""
    return all(
        getattr(dataset.features.get(name), "dtype", None) in ("string", "large_string")
        for name in ("prompt", *COMPLETIONS[mode])
    )


def prepare_tokens(
    dataset: Dataset,
    tokenizer: Any,
    mode: str,
    max_length: int | None,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenizes rows of text, in place of a TRL trainer's ``_prepare_dataset``.

    Args:
        dataset: the host's prepared dataset.
        tokenizer: the run's tokenizer.
        mode: ``paired`` or ``unpaired``.
        max_length: rows whose prompt alone has as many tokens or more are dropped, as TRL does;
            None to drop none.
        num_proc: number of processes.

    Returns:
        The dataset with TRL's columns of ids.
    """
    columns = ids_columns(mode)
    ours = set(columns.values()) <= set(dataset.column_names)
    if ours and not dataset.data.column(next(iter(columns.values()))).null_count:
        dataset = dataset.rename_columns({name: trl for trl, name in columns.items()})
    else:
        dataset = dataset.map(
            _encode,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "mode": mode},
            remove_columns=list(columns.values()) if ours else None,
            num_proc=num_proc,
            desc="Tokenizing",
        )
    if max_length is None:
        return dataset
    return dataset.filter(_has_room, fn_kwargs={"max_length": max_length}, num_proc=num_proc)


def rows_cut(dataset: Dataset, mode: str, max_length: int) -> int:
    """How many tokenized rows are longer than ``max_length``, so that TRL's collator cuts them."""
    cut = 0
    names = ["prompt_ids", *(f"{name}_ids" for name in COMPLETIONS[mode])]
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=10_000):
        prompt, *completions = (
            pc.list_value_length(batch[name]).to_numpy(zero_copy_only=False) for name in names
        )
        cut += int((prompt + np.maximum.reduce(completions) > max_length).sum())
    return cut


def _encode(batch: dict[str, list[Any]], tokenizer: Any, mode: str) -> dict[str, list[list[int]]]:
    """Token ids of a batch; rows of our strategies already have theirs."""
    columns = ids_columns(mode)
    given = list(zip(*(batch[name] for name in columns.values() if name in batch), strict=True))
    texts = list(zip(*(batch[name] for name in COMPLETIONS[mode]), strict=True))
    missing = [n for n in range(len(texts)) if not given or given[n][0] is None]
    made = token_ids(
        [batch["prompt"][n] for n in missing], [texts[n] for n in missing], tokenizer, begin=True
    )
    rows: list[Any] = list(given) or [()] * len(texts)
    for number, ids in zip(missing, made, strict=True):
        rows[number] = ids
    return {name: [row[i] for row in rows] for i, name in enumerate(columns)}


def _has_room(example: dict[str, Any], max_length: int) -> bool:
    return len(example["prompt_ids"]) < max_length
