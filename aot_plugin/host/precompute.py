"""Reference log-probabilities before the first step: TRL's pass, with our own cache files."""

from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn

from ..digests import digest
from . import compat
from .adapters import settle_reference
from .loaded_models import begin_as_policy
from .nodes import EachNodeWrites, ask_each_node
from .reference_cache import Identity, identify, reference_file, rows_digest
from .scoring import ScoringMixin

LOG = get_logger("axolotl.aot_plugin.precompute")

CACHED_FOR = (
    *("max_length", "truncation_mode", "bf16", "fp16", "tf32", "disable_dropout"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "ld_alpha"),
)
"""Training arguments that reference log-probabilities depend on."""


class PrecomputeMixin(ScoringMixin):
    """``precompute_ref_log_probs`` with a cache that later runs reuse (see ``reference_cache``)."""

    # Set before TRL's constructor runs, which precomputes reference log-probabilities.
    _only_evaluates: bool
    _reference_is_settled = False
    _reference: Identity | None = None
    _reference_passes = 0

    def _reference_columns(self, logps: Tensor) -> tuple[Tensor | None, ...]:
        """A batch's log-probabilities, [sequences], as the columns in which TRL stores them."""
        raise NotImplementedError

    def _settle_reference(self) -> None:
        # Only once, since the policy is trained afterwards; and before TRL precomputes in __init__.
        if self._reference_is_settled:
            return
        settle_reference(self.model, self._only_evaluates)
        changed = []
        if self.ref_model is not None and not isinstance(self.model, PeftModel):
            changed = begin_as_policy(self.ref_model, self.model)
        if changed:
            LOG.info("the reference begins with the policy's %s", ", ".join(changed))
        self._reference_is_settled = True

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Runs TRL's method with a cache file that later runs reuse.

        The file is next to the prepared rows. Its name is a hash of everything that the
        log-probabilities depend on, so runs with the same reference and tokens find it.
        """
        self._settle_reference()

        def identity() -> Identity:
            # Computed once, for the first dataset: a pass may change the model's buffers.
            if self._reference is not None:
                return self._reference._replace(rows=rows_digest(dataset))
            settings = {name: getattr(self.args, name, None) for name in CACHED_FOR}
            settings["autocast"] = self.accelerator.mixed_precision
            self._reference = identify(dataset, self.model, self.ref_model, settings)
            return self._reference

        file, is_there = reference_file(Path(self.args.aot_reference_folder), identity)
        if is_there:
            LOG.info("the %s dataset's reference log-probabilities are read: %s", name, file)

        # `datasets` caches results by fingerprint. TRL's fingerprint of the new columns depends on
        # rows and weights only, so it might match results of another reference.
        if dataset._indices is not None:
            dataset = dataset.flatten_indices()
        dataset._fingerprint = digest([dataset._fingerprint, file.name])[:16]

        self._reference_passes = 0
        accelerator: Any = self.accelerator
        self.accelerator = EachNodeWrites(accelerator)
        try:
            with compat.cached_at(dataset, file) as asked:
                found = super()._precompute_ref_logps(  # type: ignore[misc]  # TRL's
                    dataset, name, batch_size
                )
        finally:
            self.accelerator = accelerator
        if not asked or (self._reference_passes == 0) != is_there:
            # TRL did not use our file or our forward pass, so its numbers can't be trusted.
            ask_each_node(lambda: file.unlink(missing_ok=True) if not is_there else None)
            raise RuntimeError(
                "the installed trl computes or keeps reference log-probabilities in a way that "
                f"this aot-plugin does not know ({compat.releases()}); remove "
                "`precompute_ref_log_probs`"
            )
        return found

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Called by TRL for each batch of the pass."""
        self._reference_passes += 1
        return self._reference_columns(self._scorer.reference_logps(self._sequences(inputs), model))
