"""Answers of the policy to a few held-out prompts, for people to read (``aot_samples``)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ..report import Samples, log_table_to_loggers
from ..report.scores import DIRECTORY
from ..scoring.model_head import is_sharded
from .scoring import ScoringMixin

LOG = get_logger("axolotl.aot_plugin.samples")

LONGEST = 64
"""Tokens of an answer at most."""


class SamplesMixin(ScoringMixin):
    """Lets the policy answer prompts of an evaluation set.

    The main process does it alone, and with its own module, so nothing is asked of other ranks;
    they wait for it at their next common operation.
    """

    _samples_are_off = False

    def _sample(self, dataset: Any, eval_set: str) -> None:
        """Answers the first ``aot_samples`` distinct prompts greedily, writes the answers next to
        the evaluation and sends them to the loggers that take tables.

        Whatever fails is said once and ends neither the evaluation nor the training.

        Args:
            dataset: the tokenized evaluation set.
            eval_set: its name.
        """
        if self._samples_are_off or not self.is_world_process_zero():
            return
        try:
            if is_sharded(self.model):
                raise NotImplementedError("the weights are sharded over the ranks")
            prompts = distinct_prompts(dataset, self.args.aot_samples)
            answers = self._greedy_answers(prompts)
            texts = [self._tokenizer.batch_decode(ids) for ids in (prompts, answers)]
            samples = Samples(self.state.global_step, eval_set, *texts)
            path = samples.save(Path(self.args.output_dir) / DIRECTORY)
            log_table_to_loggers(samples.table(), path, samples.step, self.args.report_to)
        except Exception as error:
            self._samples_are_off = True
            LOG.warning("no answers for `aot_samples` in this run: %r", error)

    def _greedy_answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The answers' token ids, without what ends them."""
        tokenizer, model = self._tokenizer, self.model
        own = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        how = GenerationConfig(
            do_sample=False,
            max_new_tokens=LONGEST,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
        )
        answers = []
        for some in batched(prompts, self.args.eval_batch_size):
            rows = [torch.tensor(ids, device=self.args.device) for ids in some]
            ids, mask = (
                pad_sequence(values, batch_first=True, padding_value=value, padding_side="left")
                for values, value in (
                    (rows, tokenizer.pad_token_id),
                    ([torch.ones_like(row) for row in rows], 0),
                )
            )
            with self._without_gradient(), _generating_only_by(model, how):
                found = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            answers += [_until(ends, row) for row in found[:, ids.shape[1] :].tolist()]
        return answers


def distinct_prompts(dataset: Any, number: int) -> list[list[int]]:
    """The token ids of the first ``number`` different prompts, or of all if there are fewer."""
    found: dict[tuple[int, ...], None] = {}
    for row in dataset.select_columns("prompt_ids"):
        found[tuple(row["prompt_ids"])] = None
        if len(found) == number:
            break
    return [list(ids) for ids in found]


@contextmanager
def _generating_only_by(model: Any, how: GenerationConfig) -> Iterator[None]:
    """Exchanges the model's own generation config, of which ``generate`` takes what ``how`` leaves
    open: penalties on repetition, say, or a number of beams."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, how
    try:
        yield
    finally:
        base.generation_config = own


def _until(ends: set[int], ids: list[int]) -> list[int]:
    """The ids before the first one that is in ``ends``."""
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]
