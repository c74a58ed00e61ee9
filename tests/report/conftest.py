"""Made-up evaluations with known shapes."""

import numpy as np
import pytest
from hypothesis import settings

from aot_plugin.report.scores import Scores

# A shared machine says nothing about how long an example takes.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def make_paired():
    def make(n=60, shift=2.0, spread=1.3, seed=0, beta=0.1, step=20, eval_set="eval"):
        random = np.random.default_rng(seed)
        ref_chosen, ref_rejected = random.normal(-60, 15, n), random.normal(-62, 15, n)
        moved = random.normal(0, spread, n)
        return Scores.paired(
            beta=beta,
            step=step,
            eval_set=eval_set,
            chosen_logps=ref_chosen + shift / 2 + moved,
            rejected_logps=ref_rejected - shift / 2 + random.normal(0, 1, n),
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_tokens=random.integers(5, 60, n),
            rejected_tokens=random.integers(5, 60, n),
        )

    return make


@pytest.fixture
def make_unpaired():
    def make(n=60, positives=25, shift=1.0, seed=0, beta=0.1, step=20, eval_set="eval"):
        random = np.random.default_rng(seed)
        label = np.arange(n) < positives
        ref = random.normal(-60, 15, n)
        return Scores.unpaired(
            beta=beta,
            step=step,
            eval_set=eval_set,
            logps=ref + np.where(label, shift, 0) + random.normal(0, 1, n),
            ref_logps=ref,
            label=random.permutation(label) if shift == 0 else label,
            tokens=random.integers(5, 60, n),
        )

    return make
