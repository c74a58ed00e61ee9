"""The order of labelled rows: both labels in every step."""

from typing import Any

from transformers import Trainer

from ..data.sampler import StratifiedSampler


class StratifiedSamplingMixin(Trainer):
    """Orders labelled rows so that every step has both labels (``StratifiedSampler``)."""

    args: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """A sampler of steps with both labels, unless the YAML asks for another order."""
        self._refuse_single_rows()
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StratifiedSampler(dataset["label"], self._step_rows(), seed)

    def _step_rows(self) -> int:
        """Number of rows of an optimizer step, over all ranks."""
        accumulation = self.args.gradient_accumulation_steps
        ranks = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        return self.args.train_batch_size * accumulation * ranks

    def _refuse_single_rows(self) -> None:
        per_step = self.args.aot_batch == "step"
        if (self._step_rows() if per_step else self.args.train_batch_size) > 1:
            return
        batch = "a step" if per_step else "a micro-batch (`aot_batch: micro_batch`)"
        keys = "`micro_batch_size`" + (" or `gradient_accumulation_steps`" if per_step else "")
        raise ValueError(
            f"{batch} of one row has no other label to compare with, so nothing would be trained: "
            f"raise {keys} (the more rows are sorted together, the better)"
        )
