"""From the rendered strings to token ids, and past what TRL's KTO trainer would make of them.

TRL tokenizes prompt and completion as plain text. The tokenizer then adds a begin-of-sequence
token even where the template has written it (or where it has none), an end-of-sequence token is
appended to a completion that ends in another end-of-turn token, and where a token reaches across
the border of prompt and completion, characters are lost. So our strategies tokenize what they
render, as ``apply_chat_template(tokenize=True)`` does, and the trainer takes these ids.
"""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

IDS = {"prompt_ids": "template_prompt_ids", "completion_ids": "template_completion_ids"}
"""TRL's columns, and ours. (TRL overwrites its own; ours are None in rows of other strategies.)"""


def template_ids(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any
) -> dict[str, list[list[int]]]:
    """The ids of rendered prompts and completions, by our column names.

    A completion continues the ids of its prompt, as in generation. It ends with the template's
    own end-of-turn token or, if the template has none, with the end-of-sequence token.
    """
    if not prompts:
        return {name: [] for name in IDS.values()}

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    special = {tokenizer.eos_token_id, *special_tokens(tokenizer)}
    wholes = ids([p + c for p, c in zip(prompts, completions, strict=True)])
    columns: dict[str, list[list[int]]] = {name: [] for name in IDS.values()}
    for prompt_ids, whole, completion in zip(ids(prompts), wholes, completions, strict=True):
        if whole[: len(prompt_ids)] == prompt_ids:
            completion_ids = whole[len(prompt_ids) :]
        else:
            # A token reaches across the border.
            (completion_ids,) = ids([completion])
        if completion_ids[-1] not in special and tokenizer.eos_token_id is not None:
            completion_ids = [*completion_ids, tokenizer.eos_token_id]
        columns[IDS["prompt_ids"]].append(prompt_ids)
        columns[IDS["completion_ids"]].append(completion_ids)
    return columns


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The text of the tokens that can end a turn, by id."""
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def prepare_tokens(
    dataset: Dataset,
    prepare: Callable[[Dataset], Dataset],
    max_length: int | None,
    num_proc: int | None = None,
) -> Dataset:
    """What ``KTOTrainer._prepare_dataset`` is to return for a dataset of an unpaired run.

    Args:
        dataset: the host's prepared dataset.
        prepare: TRL's own preparation, for rows of the host's strategies.
        max_length: rows whose prompt alone fills it are dropped, as TRL does.
    """
    if not set(IDS.values()) <= set(dataset.column_names):
        return prepare(dataset)
    if dataset.data.column(IDS["prompt_ids"]).null_count:
        dataset = prepare(dataset).map(_take_template_ids, num_proc=num_proc)
        return dataset.remove_columns(list(IDS.values()))
    dataset = dataset.rename_columns({name: trl for trl, name in IDS.items()})
    if max_length is None:
        return dataset
    return dataset.filter(_has_room, fn_kwargs={"max_length": max_length}, num_proc=num_proc)


def _take_template_ids(example: dict[str, Any]) -> dict[str, Any]:
    if example[IDS["prompt_ids"]] is None:
        return {}
    return {trl: example[name] for trl, name in IDS.items()}


def _has_room(example: dict[str, Any], max_length: int) -> bool:
    return len(example["prompt_ids"]) < max_length


COMPLETIONS = ("completion", "chosen", "rejected")
"""Text columns that TRL ends with the end-of-sequence token; their ids are in ``<name>_ids``."""


def prepare_text_rows(
    dataset: Dataset,
    prepare: Callable[[Dataset], Dataset],
    tokenizer: Any,
    num_proc: int | None = None,
) -> Dataset:
    """TRL's tokens for rows of text, in both modes, with one begin and one end.

    The host's strategies render strings that may begin with the begin-of-sequence token, and TRL
    lets the tokenizer add its own. (The host's trainer means to mend that in a method that this TRL
    no longer calls.) And to strings that end their turn with another special token TRL appends the
    end-of-sequence token, which no model that ends its turns so would generate.

    Args:
        prepare: TRL's own preparation.
    """
    ended = _ended_otherwise(dataset, tokenizer)
    for name, rows in ended.items():
        dataset = dataset.add_column(_flag(name), rows)
    dataset = prepare(dataset)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or tokenizer("")["input_ids"][:1] != [bos]:
        bos = None
    if bos is None and not ended:
        return dataset
    mend = {"bos": bos, "eos": eos, "names": list(ended)}
    dataset = dataset.map(_mend, fn_kwargs=mend, num_proc=num_proc)
    return dataset.remove_columns([_flag(name) for name in ended])


def _ended_otherwise(dataset: Dataset, tokenizer: Any) -> dict[str, list[bool]]:
    """By column with any such text: whether a text ends with a special token that is not eos."""
    eos = tokenizer.eos_token
    ends = tuple(text for text in special_tokens(tokenizer).values() if text != eos)
    columns = [name for name in COMPLETIONS if name in dataset.column_names]
    found: dict[str, list[bool]] = {name: [] for name in columns}
    for batch in dataset.select_columns(columns).iter(1000):
        for name, texts in batch.items():
            found[name] += [isinstance(text, str) and text.endswith(ends) for text in texts]
    return {name: rows for name, rows in found.items() if any(rows)}


def _flag(name: str) -> str:
    return f"aot_{name}_ended"


def _mend(
    example: dict[str, Any], bos: int | None, eos: int | None, names: list[str]
) -> dict[str, Any]:
    mended: dict[str, Any] = {}
    ids = example["prompt_ids"]
    if bos is not None and ids[:2] == [bos, bos]:
        mended["prompt_ids"] = ids[1:]
    for name in names:
        ids = example[f"{name}_ids"]
        if example[_flag(name)] and ids[-1:] == [eos]:
            mended[f"{name}_ids"] = ids[:-1]
    return mended
