"""The facts of a training as text for a terminal."""

import textwrap
from collections.abc import Iterator, Sequence

from ..data.accounting import table
from ..data.sampler import NOTABLE
from .facts import Entry, Facts, Lengths, Logged, Memory, Part, Shown, Step

WIDTH = 100
PIECE = 600
"""Characters of a piece that are shown; the middle of a longer one is left out."""

DIM, GREEN, BOLD, END = "\033[2m", "\033[32m", "\033[1m", "\033[0m"


def written(facts: Facts, colours: bool) -> str:
    """The facts as text.

    Args:
        facts: what to write.
        colours: whether to use the colours of a terminal.
    """
    sections = {
        "Config": _config(facts),
        "Rows": _rows(facts),
        "What is trained": _trained(facts.shown, colours),
        "Lengths": _lengths(facts.entries),
        "A step": _step(facts.step),
        "Shared prompts": _prompts(facts.entries, facts.step),
        "Memory": _memory(facts),
        "What is recorded": _logged(facts.logged),
    }
    return "\n\n".join(
        "\n".join([f"{BOLD}{title}{END}" if colours else f"== {title}", *lines])
        for title, lines in sections.items()
    )


def _filled(text: str, indent: str = "  ") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _config(facts: Facts) -> Iterator[str]:
    yield _filled(f"{facts.config}: Axolotl and the plugin accept it.")
    options = ", ".join(f"{key}: {value}" for key, value in facts.settings.items())
    yield _filled(f"rl: aot, {options}")


def _rows(facts: Facts) -> Iterator[str]:
    for line in table(entry.counts for entry in facts.entries).splitlines():
        yield f"  {line}"
    for entry in facts.entries:
        yield _filled(f"{entry.where}: {'; '.join(_about(entry, facts.asked))}")
        for warning in entry.counts.warnings():
            yield _filled(f"Warning: {warning}")
    if facts.held_out:
        yield _filled(_held_out(facts))


def _held_out(facts: Facts) -> str:
    size = f"{facts.held_out:,.15g}"
    said = f"`val_set_size: {size}` will hold out rows at random"
    if all(count == 1 for entry in facts.entries for count in entry.prompts.values()):
        return f"{said}."
    return (
        f"{said}. Hint: some prompts have several rows, so most of these would be trained and "
        "evaluated; rows of other prompts in a file of their own (`test_datasets`) measure more."
    )


def _about(entry: Entry, asked: int) -> Iterator[str]:
    yield f"type {entry.kind}"
    yield f"the first {asked:,} rows, there are more" if entry.more else "all of its rows"
    if entry.mixing:
        keys = ", ".join(f"`{key}: {value}`" for key, value in entry.mixing.items())
        yield f"{keys} will choose among all rows, which is not applied here"
    if entry.levels:
        yield "kept by level: " + ", ".join(f"{n} of {at:.2g}" for at, n in entry.levels.items())
    if entry.weights:
        least, mean, most = entry.weights
        yield f"weights from {least:g} to {most:g}, mean {mean:.3g}"
    if entry.images:
        yield "rows with images, which are checked here, and rendered when a batch is made"


def _trained(rows: Sequence[Shown], colours: bool) -> Iterator[str]:
    if not rows:
        yield _filled(
            "No row was kept; the table above says why. Hint: `--rows` looks at more rows; a "
            "training without any row fails."
        )
        return
    yield _filled(
        "The prompt is given; the loss depends on the log-probability of what is trained. Special "
        "tokens are shown as they are."
    )
    for number, row in enumerate(rows, 1):
        yield f"  example {number}, of {row.where}"
        for part in row.parts:
            yield from _part(part, colours)


def _part(part: Part, colours: bool) -> Iterator[str]:
    what = part.name if part.name == "prompt" else f"{part.name}, trained"
    tokens = "" if part.ids is None else f" ({len(part.ids):,} tokens)"
    mark, colour = ("+", GREEN) if part.trained else ("|", DIM)
    yield f"    {what}{tokens}"
    for line in _printable(shortened(part.text)).split("\n"):
        marked = f"{mark} {line}" if line else mark
        yield f"    {colour}{marked}{END}" if colours else f"    {marked}"


def shortened(text: str) -> str:
    """A text, of a long one its beginning and its end."""
    left_out = len(text) - PIECE
    if left_out <= 0:
        return text
    half = PIECE // 2
    return f"{text[:half]} […{left_out:,} characters…] {text[-half:]}"


def _printable(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def _lengths(entries: Sequence[Entry]) -> Iterator[str]:
    yield _filled("Tokens of a sequence: a prompt and one response.")
    for entry in entries:
        if entry.lengths is not None:
            yield _filled(f"{entry.where}: {_length(entry.lengths)}")
        elif not entry.tokenized:
            yield _filled(f"{entry.where}: not known before the training tokenizes its turns")


def _length(found: Lengths) -> str:
    spread = f"median {found.median:,}, 95% up to {found.most:,}, longest {found.longest:,}"
    if not found.longer:
        return f"{spread}; none is longer than `sequence_len: {found.limit}`"
    # The host counts prompt and response apart, which can make a token more or less.
    done = {
        "drop": "Axolotl drops what it counts as longer (`too long` above)",
        "truncate": "Axolotl cuts the response, or drops the row if its prompt alone is as long",
    }.get(found.strategy, "Axolotl refuses what it counts as longer")
    rows, are = _number(found.longer, "row"), "is" if found.longer == 1 else "are"
    return f"{spread}; {rows} {are} longer than `sequence_len: {found.limit}`: {done}"


def _step(step: Step) -> Iterator[str]:
    noun = "pair" if step.paired else "row"
    yield _filled(
        f"{step.micro_batch} (micro_batch_size) x {step.accumulation} (gradient_accumulation_steps)"
        f" x {step.ranks} (ranks, from WORLD_SIZE) = {_number(step.rows, noun)}"
    )
    if step.whole:
        yield _filled(f"Sorted together: all of the step, {_number(step.rows, noun)}.")
    else:
        yield _filled(
            f"Sorted together: each micro-batch of each rank, {_number(step.micro_batch, noun)}. "
            "Hint: without `aot_batch: micro_batch` all of the step is sorted together."
        )
    if step.together == 1:
        alone = "is sorted with nothing, and AOT is DPO" if step.paired else "is refused"
        key = "gradient_accumulation_steps" if step.whole else "micro_batch_size"
        yield _filled(f"Hint: one {noun} alone {alone}; write a larger `{key}`.")
    if step.labels:
        each = ", ".join(f"{number:.3g} {label}" for label, number in step.labels.items())
        how = "equal numbers" if step.balanced else "the proportion of the rows looked at"
        yield _filled(f"On average {each}, in {how}.")
        present = [label for label, number in step.labels.items() if number]
        if len(present) == 1:
            yield _filled(
                f"Hint: all of the rows looked at are {present[0]}. Is the label column the right "
                "one, and do the thresholds fit its numbers? `--rows` looks at more rows."
            )
        elif rare := [label for label, number in step.labels.items() if number < 1]:
            larger = "effective batch" if step.whole else "`micro_batch_size`"
            yield _filled(
                f"Hint: often there is no {' or '.join(rare)} row to compare with; "
                f"{'' if step.balanced else 'write `aot_draw: balanced`, or '}use a larger "
                f"{larger}."
            )
        if step.variance > NOTABLE and not step.balanced:
            numbers = [number for number in step.labels.values() if number]
            yield _filled(
                "Hint: `aot_draw: balanced` draws the labels in equal numbers, which divides the "
                f"variance of a step's gradient by about {step.variance:.2g}; an epoch then reads "
                f"the rows of the rarest one {max(numbers) / min(numbers):.0f} times."
            )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _prompts(entries: Sequence[Entry], step: Step) -> Iterator[str]:
    train = [entry for entry in entries if entry.is_train]
    kept = sum(entry.prompts.total() for entry in train)
    prompts = len(set().union(*(entry.prompts for entry in train)))
    if not kept:
        yield _filled("Not known before rows are tokenized; prompts with images are never shared.")
        return
    if step.paired:
        saved = sum(entry.shared_tokens for entry in train)
        whole = sum(entry.all_tokens for entry in train)
        yield _filled(
            "The responses of a pair follow one prompt. Encoded once for both, it spares "
            f"{saved / whole:.0%} of the tokens of these rows."
        )
    if prompts == kept:
        yield _filled("All prompts of these rows are different, so no two rows share one.")
    else:
        yield _filled(
            f"The {kept} kept rows have {prompts} different prompts; rows with the same one can "
            "share it if they meet in a step."
        )
    yield _filled(
        "Whether prompts are really encoded once is decided on the model, when the training "
        "starts: the line `speed:` of its log says so."
    )


def _memory(facts: Facts) -> Iterator[str]:
    memory = facts.memory
    if memory is None:
        yield _filled(f"Not known: {facts.no_memory}.")
    else:
        yield from _sizes(memory)
    if facts.precomputed:
        yield _filled("The reference is scored once, before the first step.")
    elif facts.adapter:
        yield _filled("The reference is the model without its adapter: no second model.")
    else:
        yield _filled("The reference is a second, frozen copy of the model.")
    yield _filled(
        "Not known without the weights: theirs, gradients, optimizer. See docs/memory.md."
    )


def _sizes(memory: Memory) -> Iterator[str]:
    yield _filled(
        f"{memory.model}: vocabulary {memory.vocabulary:,}, {memory.layers} layers of "
        f"{memory.width:,}; numbers of {memory.itemsize} bytes on this machine."
    )
    lengths = {memory.limit: "`sequence_len`", memory.longest: "the longest row looked at"}
    for length, which in sorted(lengths.items()):
        tokens = memory.tokens(length)
        yield _filled(
            f"With sequences as long as {which}, a micro-batch has at most {memory.sequences} x "
            f"{length:,} = {tokens:,} tokens:"
        )
        yield _filled(
            f"logits of all tokens {size(memory.logits(length))} a copy, with the chunked head "
            f"{size(memory.chunk(length))};",
            "    ",
        )
        waits = "inputs of the layers, kept" if memory.checkpointing else "activations, kept"
        about = "" if memory.checkpointing else "about "
        assert memory.per_token is not None
        yield _filled(
            f"{waits} for the backward pass: {about}{size(memory.per_token * tokens)}.", "    "
        )


def size(number: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def _logged(logged: Logged) -> Iterator[str]:
    yield _filled(f"Metrics of training: {_by_room(logged.train)}")
    if logged.evaluation:
        yield _filled(f"Metrics of evaluations, after eval_: {_by_room(logged.evaluation)}")
    else:
        yield _filled("No evaluations: set `val_set_size` or `test_datasets`.")
    yield _filled(f"In output_dir: {'; '.join(logged.files)}")
    yield _filled(f"Loggers: {', '.join(logged.loggers) or 'none beside the console'}")


def _by_room(keys: Sequence[str]) -> str:
    """Keys, those with a common beginning together: aot/{w1, nll}."""
    rooms: dict[str, list[str]] = {}
    for key in keys:
        room, _, name = key.rpartition("/")
        rooms.setdefault(room, []).append(name)
    parts = [
        f"{room}/{{{', '.join(names)}}}" if room else ", ".join(names)
        for room, names in rooms.items()
    ]
    return ", ".join(parts)
