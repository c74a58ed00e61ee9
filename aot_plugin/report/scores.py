"""The data of one evaluation, which the trainer saves and all statistics are computed from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import write_atomically
from ..ot.coupling import FloatArray

if TYPE_CHECKING:
    from ..ot.losses import ScoreKind  # the report does not import torch

Mode = Literal["paired", "unpaired"]

DIRECTORY = "aot"
"""Subdirectory of a run's output directory that holds its evaluations."""

COLUMNS: dict[str, dict[str, type]] = {
    "paired": {
        "chosen_logps": np.float64,
        "rejected_logps": np.float64,
        "ref_chosen_logps": np.float64,
        "ref_rejected_logps": np.float64,
        "chosen_tokens": np.int64,
        "rejected_tokens": np.int64,
    },
    "unpaired": {
        "logps": np.float64,
        "ref_logps": np.float64,
        "label": np.bool_,
        "tokens": np.int64,
    },
}
"""Names and dtypes of the columns of each mode."""

WEIGHT = "weight"
"""Name of a further column, float64: relative masses of the rows, where they are not all equal."""

LEVEL = "level"
"""Name of a further column of unpaired evaluations, float64: levels of graded rows, 0 to 1."""

UNITS = {"sum": "nats", "mean": "nats per token"}
"""Of what is compared, by ``aot_score``."""

_METADATA_KEY = b"aot_plugin"
_FORMAT = 1


class Level(NamedTuple):
    """The rows of one level of an evaluation.

    Attributes:
        value: from 0 (the lowest) to 1 (the highest).
        logratios: log(pi/pi_ref), [n].
        mass: relative masses, [n]; None if all rows have the same.
    """

    value: float
    logratios: FloatArray
    mass: FloatArray | None


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities of one evaluation set under policy and reference.

    Use ``Scores.paired`` or ``Scores.unpaired`` to create an instance.

    All log-probabilities are of whole completions, in nats: log pi(completion | prompt) summed
    over completion tokens. Non-finite values can be stored; the statistics refuse them.

    Attributes:
        mode: "paired" or "unpaired".
        beta: reward = beta * log-ratio.
        step: optimizer step at which the model was evaluated; None if it is not known.
        eval_set: name of the evaluation set.
        columns: arrays [n], one for each name in ``COLUMNS[mode]`` and perhaps ``WEIGHT`` and
            ``LEVEL``; read-only copies.
        score: what the statistics compare, whole completions ("sum") or per-token means ("mean").
    """

    mode: Mode
    beta: float
    step: int | None
    eval_set: str
    columns: Mapping[str, NDArray[Any]]
    score: ScoreKind = "sum"

    def __post_init__(self) -> None:
        if self.mode not in COLUMNS:
            raise ValueError(f"mode: expected one of {sorted(COLUMNS)}, got {self.mode!r}")
        further = (WEIGHT, LEVEL) if self.mode == "unpaired" else (WEIGHT,)
        expected = COLUMNS[self.mode] | {n: np.float64 for n in further if n in self.columns}
        if self.columns.keys() != expected.keys():
            raise ValueError(
                f"columns of a {self.mode} evaluation are {sorted(expected)}, "
                f"got {sorted(self.columns)}"
            )
        columns: dict[str, NDArray[Any]] = {
            name: np.array(self.columns[name], dtype=dtype) for name, dtype in expected.items()
        }
        shapes = {name: column.shape for name, column in columns.items()}
        if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(f"columns must be vectors of one length, got {shapes}")
        for column in columns.values():
            column.setflags(write=False)
        object.__setattr__(self, "columns", columns)

    @classmethod
    def paired(
        cls,
        *,
        beta: float,
        step: int | None,
        eval_set: str,
        chosen_logps: ArrayLike,
        rejected_logps: ArrayLike,
        ref_chosen_logps: ArrayLike,
        ref_rejected_logps: ArrayLike,
        chosen_tokens: ArrayLike,
        rejected_tokens: ArrayLike,
        weight: ArrayLike | None = None,
        score: ScoreKind = "sum",
    ) -> Scores:
        """Scores of n pairs of completions, each pair with one prompt.

        Args:
            beta: reward = beta * log-ratio.
            step: optimizer step of the evaluation.
            eval_set: name of the evaluation set.
            chosen_logps: the policy's log-probabilities of chosen completions, [n].
            rejected_logps: of rejected completions, [n].
            ref_chosen_logps: the reference's log-probabilities of chosen completions, [n].
            ref_rejected_logps: of rejected completions, [n].
            chosen_tokens: numbers of tokens of chosen completions, [n].
            rejected_tokens: of rejected completions, [n].
            weight: relative masses of the pairs, [n]; None if all are equal.
            score: see the class.

        Raises:
            ValueError: if columns have different lengths.
        """
        columns: dict[str, Any] = {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
        }
        columns = _with(columns, WEIGHT, weight)
        return cls(
            "paired", float(beta), None if step is None else int(step), eval_set, columns, score
        )

    @classmethod
    def unpaired(
        cls,
        *,
        beta: float,
        step: int | None,
        eval_set: str,
        logps: ArrayLike,
        ref_logps: ArrayLike,
        label: ArrayLike,
        tokens: ArrayLike,
        weight: ArrayLike | None = None,
        level: ArrayLike | None = None,
        score: ScoreKind = "sum",
    ) -> Scores:
        """Scores of n single completions.

        Args:
            beta: reward = beta * log-ratio.
            step: optimizer step of the evaluation.
            eval_set: name of the evaluation set.
            logps: the policy's log-probabilities, [n].
            ref_logps: the reference's, [n].
            label: True for positive completions, [n].
            tokens: numbers of completion tokens, [n].
            weight: relative masses of the rows, [n]; None if all are equal.
            level: levels of graded rows, [n], from 0 (the lowest) to 1; ``label`` is True for the
                highest one in the evaluation. None for two labels.
            score: see the class.

        Raises:
            ValueError: if columns have different lengths.
        """
        columns: dict[str, Any] = {
            "logps": logps,
            "ref_logps": ref_logps,
            "label": label,
            "tokens": tokens,
        }
        columns = _with(columns, WEIGHT, weight)
        columns = _with(columns, LEVEL, level)
        return cls(
            "unpaired", float(beta), None if step is None else int(step), eval_set, columns, score
        )

    @property
    def is_paired(self) -> bool:
        return self.mode == "paired"

    @property
    def chosen_logratios(self) -> FloatArray:
        """log(pi/pi_ref) of chosen completions (unpaired: of positives), in ``unit``."""
        if self.is_paired:
            return self._scored("chosen_logps") - self._scored("ref_chosen_logps")
        return self._logratios[self.columns["label"]]

    @property
    def rejected_logratios(self) -> FloatArray:
        """log(pi/pi_ref) of rejected completions (unpaired: of negatives), in ``unit``."""
        if self.is_paired:
            return self._scored("rejected_logps") - self._scored("ref_rejected_logps")
        return self._logratios[~self.columns["label"]]

    @property
    def _logratios(self) -> FloatArray:
        return self._scored("logps") - self._scored("ref_logps")

    def _scored(self, name: str) -> FloatArray:
        """A column of log-probabilities, [n], in ``unit``."""
        column = self.columns[name]
        if self.score == "sum":
            return column
        tokens = self.columns[name.removeprefix("ref_").replace("logps", "tokens")]
        return column / np.maximum(tokens, 1)

    @property
    def unit(self) -> str:
        """Unit of what is compared."""
        return UNITS[self.score]

    @property
    def chosen_rewards(self) -> FloatArray:
        """beta * chosen_logratios, in ``unit``."""
        return self.beta * self.chosen_logratios

    @property
    def rejected_rewards(self) -> FloatArray:
        """beta * rejected_logratios, in ``unit``."""
        return self.beta * self.rejected_logratios

    @property
    def chosen_tokens(self) -> NDArray[np.int64]:
        """Numbers of tokens of chosen completions (unpaired: of positives)."""
        if self.is_paired:
            return self.columns["chosen_tokens"]
        return self.columns["tokens"][self.columns["label"]]

    @property
    def rejected_tokens(self) -> NDArray[np.int64]:
        """Numbers of tokens of rejected completions (unpaired: of negatives)."""
        if self.is_paired:
            return self.columns["rejected_tokens"]
        return self.columns["tokens"][~self.columns["label"]]

    @property
    def u_mass(self) -> FloatArray | None:
        """Relative masses of ``u``, and of chosen completions (unpaired: of positives); None if all
        rows have the same."""
        weight = self.columns.get(WEIGHT)
        return weight if weight is None or self.is_paired else weight[self.columns["label"]]

    @property
    def v_mass(self) -> FloatArray | None:
        """Relative masses of ``v``, and of rejected completions (unpaired: of negatives)."""
        weight = self.columns.get(WEIGHT)
        return weight if weight is None or self.is_paired else weight[~self.columns["label"]]

    @property
    def u(self) -> FloatArray:
        """The sample that should dominate, in ``unit``.

        Paired: the policy's margins log pi(chosen) - log pi(rejected), [n]. Unpaired: the
        log-ratios of positives.
        """
        if self.is_paired:
            return self._scored("chosen_logps") - self._scored("rejected_logps")
        return self.chosen_logratios

    @property
    def v(self) -> FloatArray:
        """The sample that ``u`` should dominate, in ``unit``.

        Paired: the reference's margins, [n]. Unpaired: the log-ratios of negatives.
        """
        if self.is_paired:
            return self._scored("ref_chosen_logps") - self._scored("ref_rejected_logps")
        return self.rejected_logratios

    @property
    def levels(self) -> list[Level]:
        """The levels of graded rows that the evaluation has, lowest first; none without grades."""
        column = self.columns.get(LEVEL)
        if column is None:
            return []
        weight, found = self.columns.get(WEIGHT), []
        for value in np.unique(column):
            rows = column == value
            mass = None if weight is None else weight[rows]
            found.append(Level(float(value), self._logratios[rows], mass))
        return found

    @property
    def stem(self) -> str:
        """<eval set>-step<step>, safe as part of a file name and different for every eval set."""
        return file_stem(self.eval_set, self.step)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``directory``/scores-<eval set>-step<step>.parquet.

        The write is atomic. An older file of the same name is replaced.

        Returns:
            The path of the file.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        about = {
            "format": _FORMAT,
            "mode": self.mode,
            "beta": self.beta,
            "step": self.step,
            "eval_set": self.eval_set,
            "score": self.score,
        }
        table = pa.table(dict(self.columns)).replace_schema_metadata(
            {_METADATA_KEY: json.dumps(about).encode()}
        )
        path = Path(directory) / f"scores-{self.stem}.parquet"
        write_atomically(path, lambda file: pq.write_table(table, file))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Reads a file that ``save`` wrote.

        Raises:
            ValueError: if the Parquet file has another origin.
        """
        import pyarrow.parquet as pq

        table = pq.read_table(os.fspath(path))
        about = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
        if about.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: not an evaluation in format {_FORMAT} of aot-plugin "
                f"(format found: {about.get('format')})"
            )
        columns = {name: table[name].to_numpy() for name in table.column_names}
        score = about.get("score", "sum")  # older files have sums only
        return cls(about["mode"], about["beta"], about["step"], about["eval_set"], columns, score)


def load_run(output_dir: str | os.PathLike[str]) -> list[Scores]:
    """Loads all evaluations in ``output_dir``/aot, sorted by step and eval set.

    Raises:
        ValueError: if a scores file was not written by ``Scores.save``.
    """
    paths = (Path(output_dir) / DIRECTORY).glob("scores-*.parquet")
    return sorted(map(Scores.load, paths), key=lambda scores: (scores.step or 0, scores.eval_set))


def _with(columns: dict[str, Any], name: str, column: ArrayLike | None) -> dict[str, Any]:
    return columns if column is None else {**columns, name: column}


def file_stem(eval_set: str, step: int | None) -> str:
    """What the names of all files of an evaluation end with."""
    return _file_name_part(eval_set) + ("" if step is None else f"-step{step}")


def _file_name_part(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".")[:80]
    if plain == name and name:
        return name
    # Names that differ only in what was replaced or cut off must stay different.
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
