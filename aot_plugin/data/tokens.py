"""From the rendered strings to token ids, in both modes, in place of TRL's own tokenization.

TRL tokenizes the prompt, and then prompt and completion together, and takes what is longer. Where a
token reaches across the border of the two, the first characters of the completion are lost; where
a template has written the begin-of-sequence token, there are two; and an end-of-sequence token is
appended to a completion that ends in another end-of-turn token. So the trainer takes the ids that
are made here: of what our strategies render, by them; of text, when the trainer prepares it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

COMPLETIONS = {"paired": ("chosen", "rejected"), "unpaired": ("completion",)}
"""The columns of completions, by mode."""

ANCHOR = "\n"
"""A tokenizer of the SentencePiece kind writes a blank before a text; after this it does not."""


def ids_columns(mode: str) -> dict[str, str]:
    """TRL's columns of ids, and ours: TRL overwrites its own, and ours are null in rows of other
    strategies."""
    return {f"{name}_ids": f"template_{name}_ids" for name in ("prompt", *COMPLETIONS[mode])}


def features(mode: str) -> Features:
    """A prepared row of ours: what the host expects, and our token ids."""
    texts = {name: Value("string") for name in ("prompt", *COMPLETIONS[mode])}
    label = {"label": Value("bool")} if mode == "unpaired" else {}
    return Features(
        texts | label | {name: ListOf(Value("int32")) for name in ids_columns(mode).values()}
    )


def token_ids(
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    tokenizer: Any,
    begin: bool = False,
) -> list[list[list[int]]]:
    """The ids of prompts and of their completions.

    A completion continues the ids of its prompt, as in generation, and no character is lost. It
    ends with an end-of-turn token of its own or, if it has none, with the end-of-sequence token.

    Args:
        completions: for each prompt equally many.
        begin: a begin-of-sequence token comes first where the tokenizer writes one and the text
            has none (a chat template knows by itself whether there is one).

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
                # A token reaches across the border.
                alone, anchored = ids([completion, ANCHOR + completion])
                at_anchor = anchored[: len(anchor)] == anchor
                completion_ids = anchored[len(anchor) :] if at_anchor else alone
            ended = completion_ids and completion_ids[-1] in endings
            if not ended and tokenizer.eos_token_id is not None:
                completion_ids = [*completion_ids, tokenizer.eos_token_id]
            found[-1].append(completion_ids)
    return found


def same_ids(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[bool]:
    """Of each pair of texts, whether both become the same ids, whatever they look like."""
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
    """What is done to a text before it becomes ids that hold every byte of it; None where ids may
    lose something (unknown characters, white space beside a token or in front)."""
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
    """The text of the tokens that can end a turn, by id."""
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def is_text(dataset: Dataset, mode: str) -> bool:
    """Whether prompts and completions are strings (and not, for instance, turns)."""
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
    """What a TRL trainer's ``_prepare_dataset`` is to return for rows of text.

    Args:
        dataset: the host's prepared dataset.
        mode: ``paired`` or ``unpaired``.
        max_length: rows whose prompt alone fills it are dropped, as TRL does; None for none.
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


def _encode(batch: dict[str, list[Any]], tokenizer: Any, mode: str) -> dict[str, list[list[int]]]:
    """Ids of the rows of text; those that are ours have theirs."""
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
