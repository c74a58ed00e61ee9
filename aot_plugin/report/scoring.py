"""Scores given rows with a saved model, under the policy and under its reference.

So any output directory can be compared, including those of the host's ``rl: dpo``, ``ipo`` and
``kto``, which contain none of our evaluation files. torch, transformers and peft are imported when
a model is loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.options import ConversationOptions
from ..data.render import Renderer
from ..data.rendering import read_rendering
from ..ot.coupling import FloatArray
from .rows import Sequence as TokenSequence
from .rows import read_rows, sequences_of
from .saved_arguments import (
    check_start,
    checkpoints,
    find_arguments,
    saved_items,
    start_adapter,
)
from .scores import Scores

LOG = logging.getLogger(__name__)


class Policy(NamedTuple):
    """A loaded model with its reference.

    Attributes:
        model: the policy.
        reference: the reference model; the same object as ``model`` if an adapter was trained.
        tokenizer: the run's tokenizer.
        as_reference: context in which ``reference`` computes the reference's log-probabilities.
    """

    model: Any
    reference: Any
    tokenizer: Any
    as_reference: Callable[[], contextlib.AbstractContextManager[Any]]


def score_run(
    run: str | os.PathLike[str],
    eval_data: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    plain: bool = False,
    dtype: str = "auto",
    batch_tokens: int = 8192,
    max_tokens: int | None = None,
) -> Scores:
    """Log-probabilities of every completion in ``eval_data`` under a saved model and its reference.

    Rows become the same tokens as in the run's training (``data.render``), with the chat template
    and the keys that the run used, or the tokenizer's template if the run was not ``rl: aot``.
    Log-probabilities are computed in float32 from logits in the model's dtype.

    Args:
        run: output directory that holds a LoRA adapter or a full model, itself or in its latest
            checkpoint. The reference of an adapter is the base model with the adapter disabled, or
            replaced by the adapter from which training started.
        eval_data: JSON Lines file, see ``read_rows``.
        base_model: base model of an adapter; default: named by adapter_config.json.
        reference: reference of a full model, which needs one.
        beta: default: from the run's training arguments.
        plain: True to use prompt and completion as plain text, without a chat template.
        dtype: dtype of the model's weights; "auto": as saved.
        batch_tokens: maximum number of tokens of a batch, including padding; a longer sequence is
            a batch of its own.
        max_tokens: rows with a longer sequence are left out and counted in the log.

    Raises:
        ValueError, FileNotFoundError: naming what was looked for and where.
    """
    run = Path(run)
    saved = find_model(run)
    beta = read_beta(run) if beta is None else beta
    mode, rows = read_rows(eval_data)
    policy = load_policy(saved, base_model, reference, dtype)
    render, options = run_renderer(run, policy.tokenizer, plain)
    sequences = []
    labels = []
    for number, row in enumerate(rows, start=1):
        try:
            found = sequences_of(row, mode, render, policy.tokenizer, options)
        except ValueError as error:
            raise ValueError(f"{eval_data}, row {number}: {error}") from None
        if max_tokens and max(len(s.prompt) + len(s.completion) for s in found) > max_tokens:
            continue
        sequences.extend(found)
        labels.append(bool(row.get("label")))
    if len(labels) < len(rows):
        LOG.warning(
            "%d of %d rows are longer than %s tokens and left out",
            len(rows) - len(labels),
            len(rows),
            max_tokens,
        )
    if not sequences:
        raise ValueError(f"{eval_data}: no row within {max_tokens} tokens")
    logps = _logps(policy.model, sequences, batch_tokens, f"{run.name}: policy")
    with policy.as_reference():
        ref_logps = _logps(policy.reference, sequences, batch_tokens, f"{run.name}: reference")
    tokens = np.array([len(sequence.completion) for sequence in sequences])
    about: dict[str, Any] = {
        "beta": beta,
        "step": read_step(saved),
        "eval_set": Path(eval_data).stem,
    }
    if mode == "unpaired":
        return Scores.unpaired(
            **about, logps=logps, ref_logps=ref_logps, label=labels, tokens=tokens
        )
    return Scores.paired(
        **about,
        chosen_logps=logps[0::2],
        rejected_logps=logps[1::2],
        ref_chosen_logps=ref_logps[0::2],
        ref_rejected_logps=ref_logps[1::2],
        chosen_tokens=tokens[0::2],
        rejected_tokens=tokens[1::2],
    )


def run_renderer(
    run: Path, tokenizer: Any, plain: bool = False
) -> tuple[Renderer | None, ConversationOptions]:
    """The renderer of a run's training and the options of its entry that concern turns.

    Args:
        run: the run's output directory.
        tokenizer: the run's tokenizer.
        plain: True for rows of plain text, which have no renderer (None).

    Raises:
        ValueError: if neither the run nor its tokenizer has a chat template.
    """
    cfg = read_rendering(run) or {}
    options = ConversationOptions(**cfg.get("options", {}))
    if plain:
        return None, options
    if not cfg and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use --plain for rows of plain text")
    return Renderer(cfg, ConversationOptions(), tokenizer), options


def find_model(run: Path) -> Path:
    """``run`` if it holds a model, otherwise its latest checkpoint that does.

    Raises:
        FileNotFoundError: if there is no model; names what was looked for.
    """
    places = [run, *reversed(checkpoints(run))]
    for place in places:
        if (place / "adapter_config.json").is_file() or (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"{run}: no model here; looked for adapter_config.json (LoRA) and config.json (full model) "
        f"in {', '.join(map(str, places))}"
    )


def read_step(saved: Path) -> int | None:
    """The optimizer step of a saved model; None if it is not known (without checkpoints).

    It is read from the model's trainer state or that of its latest checkpoint.
    """
    for place in [saved, *reversed(checkpoints(saved))]:
        state = place / "trainer_state.json"
        if state.is_file():
            return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    return None


def read_beta(run: Path) -> float:
    """The run's beta, from the training arguments that the Trainer saved.

    The arguments are a pickle. Its opcodes are read; nothing is executed.

    Raises:
        FileNotFoundError: if there are no training arguments.
        ValueError: if they contain no number ``beta``.
    """
    found, places = find_arguments(run)
    if found is None:
        raise FileNotFoundError(
            f"{run}: no training arguments to read beta from; looked for "
            f"{', '.join(map(str, places))}. Give --beta, for all runs; "
            "Axolotl's own methods save the arguments in checkpoints only"
        )
    for name, value in saved_items(found):
        if name == "beta" and not isinstance(value, str):
            return float(value)
    raise ValueError(f"{found}: holds no beta. Give --beta")


def load_policy(saved: Path, base_model: str | None, reference: str | None, dtype: str) -> Policy:
    """Loads a saved model and its reference, on the GPU if there is one.

    Args:
        saved: folder with an adapter or a full model.
        base_model: base model of an adapter; default: named by adapter_config.json.
        reference: reference of a full model.
        dtype: dtype of the weights; "auto": as saved.

    Raises:
        ValueError: if a full model has no ``reference``.
        FileNotFoundError, OSError: if a model can't be found.
    """
    adapter_config = saved / "adapter_config.json"
    if adapter_config.is_file():
        from peft import PeftModel

        base = base_model or json.loads(adapter_config.read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(_load_model(base, dtype, adapter_config), str(saved))
        tokenizer = _load_tokenizer(saved, base)
        start = start_adapter(saved)
        as_reference = _load_start(model, start, saved) if start else model.disable_adapter
        return Policy(model.eval(), model, tokenizer, as_reference)
    if reference is None:
        raise ValueError(f"{saved}: a full model; give the model it was trained from, --reference")
    tokenizer = _load_tokenizer(saved, reference)
    return Policy(
        _load_model(str(saved), dtype, saved),
        _load_model(reference, dtype, "--reference"),
        tokenizer,
        contextlib.nullcontext,
    )


def _load_start(
    model: Any, start: str, saved: Path
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Loads the adapter from which training started; returns a context in which it is active."""
    check_start(saved, start)
    try:
        model.load_adapter(start, "start")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no adapter at {start!r}, with which the training of {saved} began (`lora_model_dir`) "
            f"and which is its reference: {error}"
        ) from error
    model.set_adapter("default")

    @contextlib.contextmanager
    def as_reference() -> Iterator[None]:
        model.set_adapter("start")
        try:
            yield
        finally:
            model.set_adapter("default")

    return as_reference


def _load_model(name: str, dtype: str, named_by: object) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        # The user's own model, by the name given to the host.
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)  # nosec B615
    except OSError as error:
        raise FileNotFoundError(
            f"no model at {name!r} (named by {named_by}, working directory {os.getcwd()}): "
            f"{error}\nFor a LoRA run, --base-model says where its base model is"
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load_tokenizer(saved: Path, otherwise: str) -> Any:
    from transformers import AutoTokenizer

    has_its_own = (saved / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(str(saved) if has_its_own else otherwise)  # nosec B615


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups indices into batches of similar length, longest first.

    Starting with the longest, memory runs out in the first batch or never.

    Args:
        lengths: number of tokens of each sequence.
        batch_tokens: limit of a batch's size times its longest length, unless the size is 1.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _logps(
    model: Any, sequences: Sequence[TokenSequence], batch_tokens: int, description: str
) -> FloatArray:
    """log pi(completion | prompt) of each sequence, [n], in nats, summed in float32."""
    import torch
    from tqdm import tqdm

    from ..scoring.logps import sequence_logps
    from ..scoring.model_input import padded_rows

    logps = np.empty(len(sequences))
    lengths = [len(s.prompt) + len(s.completion) for s in sequences]
    with torch.inference_mode(), tqdm(total=len(sequences), desc=description, unit="seq") as bar:
        for batch in batches_by_length(lengths, batch_tokens):
            inputs = _padded([sequences[i] for i in batch], model.device)
            found = sequence_logps(model, model.get_output_embeddings(), padded_rows(inputs))
            logps[batch] = found.double().cpu().numpy()
            bar.update(len(batch))
    return logps


def _padded(sequences: Sequence[TokenSequence], device: Any) -> dict[str, Any]:
    """Collates sequences, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``completion_mask``, each [sequences, width] int64.
    """
    import torch

    width = max(len(s.prompt) + len(s.completion) for s in sequences)
    inputs = {
        key: torch.zeros(len(sequences), width, dtype=torch.int64)
        for key in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        inputs["input_ids"][row, :end] = torch.tensor(prompt + completion)
        inputs["attention_mask"][row, :end] = 1
        inputs["completion_mask"][row, len(prompt) : end] = 1
    return {key: value.to(device) for key, value in inputs.items()}
