"""Builds examples from rows; the only module that knows dataset schemas.

A strategy's ``examples(row, options)`` yields, for every response in the row, an ``Example`` or the
reason why it is dropped. A response may be a string, an assistant turn, or a list of turns that
ends with the assistant's. A list that starts with the user or the system is a whole conversation
and contains its own prompt.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from datasets import Dataset
from pydantic import BaseModel

from .labels import (
    Drop,
    Label,
    label_from_rating,
    level_from_rating,
    parse_label,
    parse_number,
)
from .options import (
    ConversationOptions,
    DefaultOptions,
    ListwiseOptions,
    PairedOptions,
    PairOptions,
    ThreadsOptions,
)
from .threads import threads

Row = Mapping[str, Any]
Turn = dict[str, Any]
"""A message as chat templates expect it: ``role``, ``content`` and further mapped properties."""


@dataclass(frozen=True)
class Example:
    """One labelled completion of one prompt.

    Attributes:
        prompt: the turns before the answer.
        completion: the answer, an assistant turn.
        label: True for positive or chosen; with ``grades`` the level.
        tools: definitions of the tools that the prompt offers.
        ignored_prompt: True if the row has a prompt of its own that is not part of the
            conversation.
        weight: the row's relative mass in the loss.
    """

    prompt: list[Turn]
    completion: Turn
    label: Label
    tools: list[dict[str, Any]] | None = None
    ignored_prompt: bool = dataclasses.field(default=False, compare=False)
    weight: float = 1.0


Outcome = Example | Drop


@dataclass(frozen=True)
class PromptStrategy:
    """What a ``type:`` stands for: the options it takes and how it reads a row.

    Attributes:
        options: class of the options; unknown keys are refused. It subclasses
            ``ConversationOptions``, which has chat template, roles and system prompt.
        examples: called with a row and an instance of ``options``; gives an outcome per response.
        arrange: if given, called first with the dataset and the options; returns the rows that
            ``examples`` is called with.
    """

    options: type[ConversationOptions]
    examples: Callable[[Row, Any], Iterable[Outcome]]
    arrange: Callable[[Dataset, Any], Dataset] | None = None


class RowError(ValueError):
    """A row that can't be read; the message names the field and shows the value."""


def default_examples(row: Row, options: DefaultOptions) -> Iterator[Outcome]:
    """One response per row, with its label or rating."""
    has_completion = options.field_completion in row or "field_completion" in explicit(options)
    field = options.field_completion if has_completion else options.field_messages
    if not has_completion and not _has(row, field) and "field_messages" not in explicit(options):
        cell(row, options.field_completion)  # the error names the column that is usual
    label = judge(row, options.field_label, options)
    yield from examples(row, [(cell(row, field), field, label)], options, prompted=has_completion)


def paired_examples(row: Row, options: PairedOptions) -> Iterator[Outcome]:
    """Two responses to one prompt: the chosen one is positive, the rejected one negative."""
    fields = ((options.field_chosen, True), (options.field_rejected, False))
    chosen, rejected = examples(row, [(cell(row, f), f, label) for f, label in fields], options)
    both = isinstance(chosen, Example) and isinstance(rejected, Example)
    if both and replace(chosen, label=False) == rejected:  # type: ignore[type-var]
        chosen = rejected = Drop.IDENTICAL
    yield from (chosen, rejected)


def listwise_examples(row: Row, options: ListwiseOptions) -> Iterator[Outcome]:
    """Several responses to one prompt, labelled one by one or by comparison."""
    responses = [(cell(part, field), field) for part, field in options.responses(row, cell)]
    if options.field_preference is not None:
        labels = _prefer(row, options.field_preference)
    elif options.best_and_worst:
        ratings = [(cell(part, field), field) for part, field in options.labels(row, cell)]
        labels = _best_and_worst(ratings, options.lower_is_better)
    else:
        labels = [judge(part, field, options) for part, field in options.labels(row, cell)]
    judged = [(*response, label) for response, label in zip(responses, labels, strict=True)]
    yield from examples(row, judged, options)


def threads_examples(row: Row, options: ThreadsOptions) -> Iterator[Outcome]:
    """The answers to one message of a tree (``threads``).

    The answer of best rank (0 is the best) is positive, that of worst rank negative.
    """
    ranks = [(reply["rank"], options.field_rank) for reply in row["replies"]]
    labels = _best_and_worst(ranks, lower_is_better=True)
    texts = [(reply["text"], options.field_text) for reply in row["replies"]]
    judged = [(*text, label) for text, label in zip(texts, labels, strict=True)]
    yield from examples(row, judged, options)


STRATEGIES: dict[str, PromptStrategy] = {
    "chat_template.default": PromptStrategy(DefaultOptions, default_examples),
    "chat_template.paired": PromptStrategy(PairedOptions, paired_examples),
    "chat_template.listwise": PromptStrategy(ListwiseOptions, listwise_examples),
    "chat_template.threads": PromptStrategy(ThreadsOptions, threads_examples, threads),
}


PAIRED = {
    name: PromptStrategy(PairOptions, paired_examples)
    for name in ("chat_template.default", "chat_template.argilla_chat")
}
"""Strategies in place of Axolotl's chat-template types for pairs, by their names there."""


def examples(
    row: Row,
    responses: Iterable[tuple[Any, str, Label | Drop]],
    options: ConversationOptions,
    prompted: bool = True,
) -> Iterator[Outcome]:
    """Builds the examples of a row's responses.

    Args:
        row: the row.
        responses: (value, field, label) of each; the field is for messages.
        options: the entry's options.
        prompted: True if the row has a prompt of its own, for responses that contain none.

    Yields:
        An ``Example`` or the reason for dropping it, for each response in order.

    Raises:
        RowError: if prompt or response are not text, a role is unknown, or the prompt's last turn
            is an answer that is not a response of this row.
    """
    own = prompted and _prompt_field(row, options) is not None

    def turns_of(value: Any, name: str) -> list[Turn]:
        literal = own and not _serialized(value, row, options)
        return as_turns(value, "assistant", options, name, literal)

    judged = [
        (label if isinstance(label, Drop) else turns_of(value, name), label)
        for value, name, label in responses
    ]
    answers = [turns[-1] for turns, _ in judged if not isinstance(turns, Drop) and turns]
    for turns, label in judged:
        if isinstance(turns, Drop):
            yield turns
            continue
        ignored = False
        if prompted and (not turns or turns[0]["role"] == "assistant"):
            turns = [*_prompt(row, options, answers), *turns]
        elif own:
            turns, ignored = _within(_prompt_or_nothing(row, options, answers), turns)
        outcome = _outcome(_with_system(row, turns, options), label, _tools(row, options))
        yield replace(outcome, ignored_prompt=True) if _is_kept(outcome) and ignored else outcome


def _is_kept(outcome: Outcome) -> TypeGuard[Example]:
    return isinstance(outcome, Example)


def _within(prompt: list[Turn], turns: list[Turn]) -> tuple[list[Turn], bool]:
    """Completes a response's conversation with the earlier turns of the row's own prompt.

    Returns:
        The turns, and True if the row's prompt is a different one and thus ignored.
    """

    def said(some: Sequence[Turn]) -> list[tuple[str, str]]:
        return [(turn["role"], turn["content"].strip()) for turn in some]

    own, before = said(prompt), said(turns[:-1])
    if not own or any(before[i : i + len(own)] == own for i in range(len(before))):
        return turns, False
    if before and own[-len(before) :] == before:
        return [*prompt, turns[-1]], False
    return turns, True


def _prompt_or_nothing(
    row: Row, options: ConversationOptions, answers: Sequence[Turn]
) -> list[Turn]:
    try:
        return _prompt(row, options, answers)
    except RowError:  # harmless, since the response is a whole conversation
        return []


def example(
    row: Row,
    response: Any,
    label: Label | Drop,
    options: ConversationOptions,
    prompted: bool = True,
) -> Outcome:
    """The example of a single response of a row, or the reason for dropping it.

    Args:
        row: the row.
        response: text, an assistant turn, or a list of turns that ends with one.
        label: its label, or the reason for dropping it.
        options: the entry's options.
        prompted: True if the row has a prompt of its own, for a response that contains none.

    Raises:
        RowError: if prompt or response can't be read.
    """
    (outcome,) = examples(row, [(response, "response", label)], options, prompted)
    return outcome


def _outcome(turns: list[Turn], label: Any, tools: list[dict[str, Any]] | None) -> Outcome:
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        return Drop.EMPTY
    if turns[-2]["role"] == "assistant":
        return Drop.UNASKED
    asked = any(turn["content"].strip() for turn in turns[:-1] if turn["role"] != "system")
    if not asked or not (turns[-1]["content"].strip() or turns[-1].get("tool_calls")):
        return Drop.EMPTY
    return Example(turns[:-1], turns[-1], label, tools)


def cell(row: Row, field: str) -> Any:
    """The value of a column; ``a.b`` is the member ``b`` of column ``a``.

    Raises:
        RowError: if there is no such column.
    """
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            has = ", ".join(row)
            raise RowError(
                f"there is no column `{field}`; the row has {has}; {_column(row, field)}"
            )
        value = value[part]
    return value


_KEYS = {
    "prompt": "`field_prompt`",
    "messages": "`field_prompt` (or `field_messages`)",
    "completion": "`field_completion` (or `field_messages`, if it holds whole conversations)",
    "label": "`field_label`",
    "chosen": "`field_chosen`",
    "rejected": "`field_rejected`",
}
"""The key that names another column in place of a default one, for messages."""


def _column(row: Row, field: str) -> str:
    """Advice on a missing column, for messages."""
    for name, mark in (("semicolons", ";"), ("tabs", "\t")):
        if any(mark in column for column in row):
            return f"if this is a CSV file, separate its cells by commas, not by {name}"
    key = _KEYS.get(field, "a `field_...` key")
    if field in ("chosen", "rejected"):
        instead = "`aot_mode: unpaired` reads single responses with a label"
    elif {"chosen", "rejected"} <= row.keys():
        instead = "`aot_mode: paired`, or `type: chat_template.paired`, reads pairs"
    else:
        return f"name the column with {key} of the entry"
    return f"{instead}, and {key} of the entry names another column"


def judge(row: Row, field: str, options: DefaultOptions | ListwiseOptions) -> Label | Drop:
    """The label in a column: parsed as it is or, with thresholds, derived from a rating.

    Raises:
        RowError: if the value is not a label (or, with thresholds, not a number).
    """
    value = cell(row, field)
    low, high = options.negative_max, options.positive_min
    try:
        if options.grades is None and (low is None or high is None):
            return parse_label(value)
        rating = parse_number(value)
    except ValueError as error:
        advice = ""
        if options.grades and not any(letter.isdigit() for letter in str(value)):
            advice = "; entries with other labels than ratings need no `grades`: instead of "
            advice += "`aot_grades`, write `grades` in the entries that have ratings"
        raise RowError(f"`{field}`: {error}{advice}") from None
    if isinstance(rating, Drop):
        return rating
    if low is not None and high is not None:
        return label_from_rating(rating, high, low)
    return level_from_rating(rating, options.grades or ())


def as_turns(
    value: Any,
    role: str,
    options: ConversationOptions,
    field: str | None = None,
    literal: bool = False,
) -> list[Turn]:
    """Turns from a string, a turn, a list of turns (also as JSON text) or a transcript.

    Args:
        value: the value of a column.
        role: role of a string that is a single turn.
        options: the entry's options.
        field: the column, for messages.
        literal: True if a string is always the text of one turn, even if it looks like JSON or a
            transcript.

    Raises:
        RowError: for any other value, or a role that the entry's ``roles`` do not map.
    """
    if value is None:
        return []
    if isinstance(value, str) and not literal:
        value = _turns_in_json(value, options) or value
    if isinstance(value, str):
        turns = [] if literal else _from_transcript(value)
        return turns or [{"role": role, "content": value}]
    try:
        if isinstance(value, Mapping):
            return [_turn(value, options)]
        if isinstance(value, Sequence):
            return [_turn(message, options) for message in value]
        raise RowError(f"{_short(value)} is neither text nor a list of turns")
    except RowError as error:
        raise RowError(f"`{field}`: {error}" if field else str(error)) from None


def _serialized(value: Any, row: Row, options: ConversationOptions) -> bool:
    """Whether a response is a list of turns stored as JSON, in a row with a prompt of its own.

    A response may also be plain text that happens to be such JSON. It is taken for turns only if
    the prompt is stored as JSON too, or is one of these turns.
    """
    turns = _turns_in_json(value, options) if isinstance(value, str) else None
    if turns is None:
        return False
    prompt = cell(row, str(_prompt_field(row, options)))
    if isinstance(prompt, str) and _turns_in_json(prompt, options):
        return True
    last = as_turns(prompt, "user", options)[-1:]
    content = options.message_property_mappings["content"]
    return bool(last) and any(last[0]["content"] == turn[content] for turn in turns)


def _turns_in_json(text: str, options: ConversationOptions) -> list[Any] | None:
    """The turns of a conversation stored as JSON; None if the text is not one."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        turns = json.loads(text)
    except json.JSONDecodeError:
        return None
    return turns if _are_turns(turns, options) else None


def explicit(options: BaseModel) -> set[str]:
    """Names of the options that the entry sets itself, as opposed to defaults."""
    return options.model_fields_set


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
"""Anthropic/hh-rlhf: begins each turn of a conversation that is stored as one string."""

_HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
"""nvidia/HelpSteer and HelpSteer2: separates the turns of a prompt that is stored as one string."""


def _from_transcript(text: str) -> list[Turn]:
    """The turns of a conversation stored as one string; empty if the string is not one."""
    if _HH_TURN.match(text):
        parts = _HH_TURN.split(text)[1:]
    elif _HELPSTEER_TURN.search(text):
        parts = ["User", *_HELPSTEER_TURN.split(text)]
    else:
        return []
    roles = {"Human": "user", "User": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    # A prompt may end with the header of the assistant's turn, the cue for the answer.
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _turn(message: Any, options: ConversationOptions) -> Turn:
    """Converts a message with all its properties: templates read reasoning, tool calls and more."""
    mapping = options.message_property_mappings
    named = isinstance(message, Mapping) and mapping["role"] in message
    if not named or not (mapping["content"] in message or message.get("tool_calls")):
        raise RowError(
            f"{_short(message)} is not a turn with `{mapping['role']}` and `{mapping['content']}`; "
            "set `message_property_mappings`"
        )
    source = message[mapping["role"]]
    targets = {name: role for role, names in options.roles.items() for name in names}
    if source not in targets:
        raise RowError(f"role {source!r} is unknown; known are {', '.join(targets)}: set `roles`")
    content = _text(message.get(mapping["content"]))
    turn: Turn = {"role": targets[source], "content": content}
    sources = set(mapping.values())
    further = {name: name for name in message if name not in sources} | mapping
    for name, field in further.items():
        if name not in turn and message.get(field) is not None:
            turn[name] = without_nulls(message[field])
    if turn.get("tool_calls"):
        turn["tool_calls"] = _calls(turn["tool_calls"])
    return turn


def _calls(calls: Any) -> list[Any]:
    """Converts tool calls to the form that templates expect, with arguments as mappings.

    Many datasets, and OpenAI's API, store the arguments (or the calls) as JSON text, which a
    template would write as a string.
    """
    if isinstance(calls, str):
        calls = _from_json(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"`tool_calls`: {_short(calls)} is not a list of calls")
    found = []
    for call in calls:
        inner = call.get("function", call)
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
            inner = {**inner, "arguments": _from_json(inner["arguments"])}
        found.append({**call, "function": inner} if "function" in call else dict(inner))
    return found


def _from_json(text: str) -> Any:
    """The mapping or list that a text encodes as JSON; the text itself if it encodes neither."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict | list) else text


def _text(content: Any) -> str:
    """The text of a turn, which some datasets store in parts."""
    if isinstance(content, str | None):
        return content or ""
    if not isinstance(content, Sequence):
        raise RowError(f"{_short(content)} is not the text of a turn")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise RowError(
                f"{_short(part)} is not a part with text; images belong into a column `images`"
            )
        texts.append(text)
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """Nested values without members that are null.

    In a column of structs, a dataset adds the members of other rows as nulls, and a template would
    print them.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _tools(row: Row, options: ConversationOptions) -> list[dict[str, Any]] | None:
    required = "field_tools" in explicit(options)
    tools = cell(row, options.field_tools) if required else row.get(options.field_tools)
    return as_tools(tools, options.field_tools)


def as_tools(tools: Any, column: str) -> list[dict[str, Any]] | None:
    """The tools of a row, which many datasets store as JSON text; None if it has none.

    Raises:
        RowError: if the value is not a list of tools; names the column and the value.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"`{column}`: {_short(tools)} is not JSON: {error}") from None
    else:
        tools = without_nulls(tools)
    if tools and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise RowError(f"`{column}`: {_short(tools)} is not a list of tools")
    return tools or None


def _prompt_field(row: Row, options: ConversationOptions) -> str | None:
    """The column with the prompt; None if this row has none (other rows of the dataset may)."""
    written = explicit(options)
    names = [options.field_prompt, options.field_messages]
    if options.prefers_messages:
        names.reverse()
    if "field_messages" in written:
        names = [options.field_messages]
    elif "field_prompt" in written:
        names = [options.field_prompt]
    return next((name for name in names if _has(row, name)), None)


def _has(row: Row, name: str) -> bool:
    try:
        return cell(row, name) is not None
    except RowError:
        return False


def _prompt(row: Row, options: ConversationOptions, answers: Sequence[Turn]) -> list[Turn]:
    """The turns of the prompt column.

    Some datasets store the whole conversation there. So a final answer that is one of the row's own
    ``answers`` is removed.
    """
    field = _prompt_field(row, options)
    if field is None:
        # Null is an empty prompt; a missing column is an error that names it.
        written = explicit(options)
        named = "field_prompt" in written or options.field_prompt in row
        field = options.field_prompt if named else options.field_messages
    turns = as_turns(cell(row, field), "user", options, field)
    if turns and turns[-1]["role"] == "assistant":
        if turns[-1] not in answers:
            raise RowError(
                f"`{field}` ends with an answer ({_short(turns[-1]['content'])}), and the row's "
                "responses would follow it as a second one: remove it, or name the column of the "
                "prompt (`field_prompt`, `field_messages`)"
            )
        turns = turns[:-1]
    return turns


def _with_system(row: Row, turns: list[Turn], options: ConversationOptions) -> list[Turn]:
    if turns and turns[0]["role"] == "system":
        return turns
    required = "field_system" in explicit(options)
    system = cell(row, options.field_system) if required else row.get(options.field_system)
    if _are_turns(system, options):
        (own, *others) = as_turns(system, "system", options, options.field_system)
        if others or own["role"] != "system":
            raise RowError(f"`{options.field_system}`: {_short(system)} is not one system turn")
        system = own["content"]
    elif required and system and not isinstance(system, str):
        raise RowError(f"`{options.field_system}`: {_short(system)} is not text")
    # Without the key a column of that name may hold anything, the number of a system, say.
    text = system if isinstance(system, str) and system.strip() else options.system_prompt
    return [{"role": "system", "content": text}, *turns] if text else turns


def _are_turns(value: Any, options: ConversationOptions) -> bool:
    turns = value if isinstance(value, list) else [value]
    names = {options.message_property_mappings[name] for name in ("role", "content")}
    return bool(turns) and all(isinstance(t, Mapping) and names <= t.keys() for t in turns)


def _prefer(row: Row, field: str) -> list[Label | Drop]:
    try:
        preference = parse_number(cell(row, field))
    except ValueError as error:
        raise RowError(f"`{field}`: {error}") from None
    if isinstance(preference, Drop):
        return [preference, preference]
    if preference == 0:
        return [Drop.BETWEEN, Drop.BETWEEN]
    return [preference < 0, preference > 0]


def _best_and_worst(values: Iterable[tuple[Any, str]], lower_is_better: bool) -> list[Label | Drop]:
    """Labels the best of some ratings positive and the worst negative.

    Args:
        values: (rating, field) of each response; the field is for messages.
        lower_is_better: True if the lowest rating is the best.
    """
    labels: list[Label | Drop] = []
    ratings: dict[int, float] = {}
    for index, (value, field) in enumerate(values):
        try:
            rating = parse_number(value)
        except ValueError as error:
            raise RowError(f"`{field}`: {error}") from None
        if isinstance(rating, Drop):
            labels.append(rating)
            continue
        labels.append(Drop.BETWEEN)
        ratings[index] = -rating if lower_is_better else rating
    # If all ratings are equal, there is no best and no worst.
    if ratings and max(ratings.values()) > min(ratings.values()):
        labels[max(ratings, key=ratings.__getitem__)] = True
        labels[min(ratings, key=ratings.__getitem__)] = False
    return labels


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
