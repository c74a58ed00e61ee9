"""How fast the transport value of a sample approaches that of the distributions.

The paper's sample complexity bound is of the order n^(-1/2). Here U and V are known: rewards from
two normal distributions (or two Student t with 3 degrees of freedom, whose tails are heavier than
the theorem's assumptions allow), so the value of the distributions is an integral over quantile
levels. The mean error over repeated samples is then fitted by a power of n.

    python benchmarks/experiments/rate.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from scipy import integrate, stats

from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.ot.transport import transport_value

RESULTS = Path(__file__).parent / "results"
SIZES = tuple(2**k for k in range(3, 15))
REPEATS = 200
BETAS = {"logistic": 1.0, "squared_hinge": 1.0, "least_squares": 1.0}
LAWS = {
    "normal": (stats.norm(0.5, 1.0), stats.norm(0.0, 1.5)),
    "student_t_3": (stats.t(3, 0.5, 1.0), stats.t(3, 0.0, 1.5)),
}


def error(law: str, penalty: str, n: int, m: int, seed: int) -> tuple[float, float]:
    """Mean absolute error over ``REPEATS`` samples of n and m, and its standard error."""
    u_law, v_law = LAWS[law]

    def h(z: torch.Tensor) -> torch.Tensor:
        return PENALTIES[penalty](z, BETAS[penalty])

    def integrand(t: float) -> float:
        return h(torch.tensor(u_law.ppf(t) - v_law.ppf(t), dtype=torch.float64)).item()

    truth = integrate.quad(integrand, 0, 1, limit=500, epsabs=1e-9)[0]
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(REPEATS):
        u, v = (torch.from_numpy(x.rvs(k, random_state=rng)) for x, k in ((u_law, n), (v_law, m)))
        errors.append(abs(transport_value(u, v, h).item() - truth))
    return float(np.mean(errors)), float(np.std(errors, ddof=1) / REPEATS**0.5)


def main() -> None:
    rows = []
    for law in LAWS:
        for penalty in BETAS:
            for ratio in (1, 2):
                means = []
                for n in SIZES:
                    mean, spread = error(law, penalty, n, ratio * n, seed=n)
                    means.append(mean)
                    rows.append(
                        {
                            "law": law,
                            "penalty": penalty,
                            "n": n,
                            "m": ratio * n,
                            "error": mean,
                            "standard_error": spread,
                        }
                    )
                slope = np.polyfit(np.log(SIZES), np.log(means), 1)[0]
                print(f"{law:12} {penalty:14} m = {ratio}n: error ~ n^{slope:.3f}", flush=True)
    file = RESULTS / "rate.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
