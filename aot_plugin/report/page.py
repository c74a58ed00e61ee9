"""One self-contained HTML page that compares runs, without scripts or external resources."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..ot.second_order import STATISTICS
from .comparison import Named, gaps, history, side_by_side
from .curves import Log, training_curves
from .plots import (
    Panel,
    margins_panel,
    matplotlib_is_here,
    names_of,
    quantile_figure,
    rewards_panel,
)
from .samples import Samples
from .summary import samples_of, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = dict[str, Any]

_STYLE = """
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #bbb; padding: .3em .6em; text-align: right; vertical-align: top; }
th { background: #f1f1f1; font-weight: 600; } th[scope=row] { text-align: left; }
td small { color: #666; display: block; white-space: nowrap; }
td.text { text-align: left; white-space: pre-wrap; min-width: 15em; }
nav ol { columns: 20em; padding-left: 1.5em; margin: 1em 0; }
img { max-width: 100%; } .wide { overflow-x: auto; } p { max-width: 55em; }
"""


def comparison_page(
    evaluations: Sequence[Named],
    n_resamples: int = 1000,
    answers: Mapping[str, Sequence[Samples]] | None = None,
    logs: Mapping[str, Log] | None = None,
) -> str:
    """Builds the page for the given evaluations.

    Tables and quantile plots show the last step of each run and eval set, the history shows all
    steps. Without matplotlib the plots are missing, and the page says so.

    Args:
        evaluations: evaluations of one or several runs.
        n_resamples: number of bootstrap resamples.
        answers: the answers to held-out prompts by run, if there are any; the page shows those of
            the first and the last step.
        logs: the training logs by run, if there are any.

    Returns:
        The page as HTML.

    Raises:
        ValueError: if in every evaluation a sample is empty or not finite; names run and eval set.
            Some such evaluations are left out, and the page names them.
    """
    evaluations, left_out = _comparable(evaluations)
    by_step = sorted(evaluations, key=lambda e: e.scores.step or 0)
    latest = list({(e.run, e.scores.eval_set): e for e in by_step}.values())
    latest.sort(key=lambda e: [named.run for named in evaluations].index(e.run))
    names = [_name(evaluation) for evaluation in latest]
    summaries = [summarize(evaluation.scores, n_resamples) for evaluation in latest]
    body = [
        "<h1>Dominance report</h1>",
        f"<p>{_t(len(latest))} evaluation(s). Intervals in brackets are 95 % bootstrap intervals "
        f"from {_t(n_resamples)} resamples. Log-probabilities are of whole completions, in nats. "
        "In evaluations that a run wrote while it trained they are what its loss compares: divided "
        "by the tokens with <code>aot_score: mean</code>, with less weight for the excess of a "
        "longer response with <code>dpo_ld_alpha</code>.</p>",
        *(f"<p>Left out: {_t(reason)}.</p>" for reason in left_out),
        *_on_weights(names, summaries),
        _evaluations_table(names, summaries),
        "<h2>Margins: what AOT compares</h2>",
        "<p>Paired: margins log π(chosen) − log π(rejected) of the policy (first sample) against "
        "the reference's (second). Unpaired: log-ratios log π/π_ref of positives against those of "
        "negatives.</p>",
        _dominance_table(names, [summary["margins"] for summary in summaries]),
        *_plots(latest, names, _margins_or_logratios, share_scale=True),
        _second_order_table(names, [summary["margins"] for summary in summaries]),
        "<h2>Rewards: chosen against rejected</h2>",
        "<p>Rewards are β·log(π/π_ref). Runs with different β have different scales.</p>",
        _dominance_table(names, [summary["rewards"] for summary in summaries]),
        *_plots(
            latest,
            names,
            lambda evaluation: rewards_panel(evaluation.scores),
            share_scale=len({evaluation.scores.beta for evaluation in latest}) == 1,
        ),
        *_levels(latest, names, summaries),
        _reading(),
        "<h2>Length bias</h2>",
        "<p>Spearman correlation of reward and completion tokens, within the chosen and within "
        "the rejected completions (unpaired: positives, negatives), and the mean reward by quarter "
        "of the lengths. Without length bias the correlation is near 0 and the quarters agree.</p>",
        _length_table(names, summaries),
    ]
    if matplotlib_is_here():
        figure = history(evaluations)
        if figure is not None:
            body += ["<h2>Over the steps</h2>", _image(figure, "violation and W1 over the steps")]
        if (figure := training_curves(logs or {})) is not None:
            body += ["<h2>Training</h2>", "<p>What the runs logged of their training steps.</p>"]
            body.append(_image(figure, "training curves"))
    else:
        body.append("<p>No plots: matplotlib isn't installed (the extra <code>plot</code>).</p>")
    for run, samples in (answers or {}).items():
        body += _answers(run, samples)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Dominance report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(_with_contents(body))
        + "\n</body></html>\n"
    )


def _comparable(evaluations: Sequence[Named]) -> tuple[list[Named], list[str]]:
    """The evaluations that have something to compare, and why the others have not.

    Raises:
        ValueError: if there are none.
    """
    kept, left_out = [], []
    for evaluation in evaluations:
        try:
            samples_of(evaluation.scores)
            kept.append(evaluation)
        except ValueError as error:
            left_out.append(f"{_name(evaluation)}: {error}")
    if not kept:
        raise ValueError("; ".join(left_out) or "no evaluations")
    return kept, left_out


def _levels(
    latest: Sequence[Named], names: Sequence[str], summaries: Sequence[Summary]
) -> list[str]:
    """The comparisons of neighbouring levels of graded rows."""
    graded = [(e, n, s["levels"]) for e, n, s in zip(latest, names, summaries, strict=True)]
    graded = [(evaluation, name, found) for evaluation, name, found in graded if found]
    if not graded:
        return []
    rows = [
        (f"{name} · level {found['high']:.2g} against {found['low']:.2g}", found)
        for _, name, comparisons in graded
        for found in comparisons
    ]
    parts = [
        "<h2>Levels: each against the next lower one</h2>",
        "<p>Log-ratios log π/π_ref of graded rows, from level 0 (the lowest) to 1 (the highest). "
        "In the tables above, the highest level is compared with all others.</p>",
        _dominance_table(*zip(*rows, strict=True)),
        _second_order_table(*zip(*rows, strict=True)),
    ]
    if matplotlib_is_here():
        parts += [_image(quantile_figure(e.scores), f"levels of {name}") for e, name, _ in graded]
    return parts


def _with_contents(parts: Sequence[str]) -> list[str]:
    """The parts of the page with a table of contents after the title; headings get anchors."""
    titles: list[str] = []

    def anchored(heading: re.Match[str]) -> str:
        titles.append(heading[1])
        return f'<h2 id="part-{len(titles)}">{heading[1]}</h2>'

    title, *rest = [re.sub("<h2>(.*?)</h2>", anchored, part) for part in parts]
    links = (f'<li><a href="#part-{n}">{text}</a></li>' for n, text in enumerate(titles, 1))
    return [title, f"<nav><ol>{''.join(links)}</ol></nav>", *rest]


def _answers(run: str, samples: Sequence[Samples]) -> list[str]:
    """The answers of each evaluation set after the last step, beside those after the first."""
    parts = []
    for eval_set in dict.fromkeys(found.eval_set for found in samples):
        steps = sorted(
            (found for found in samples if found.eval_set == eval_set), key=lambda found: found.step
        )
        shown = {found.step: found for found in (steps[0], steps[-1])}
        first = steps[0]
        given = [dict(zip(found.prompts, found.answers, strict=True)) for found in shown.values()]
        rows = [
            [f'<td class="text">{_t(text)}</td>' for text in (prompt, *texts)]
            for prompt in first.prompts
            for texts in [[answers.get(prompt, "–") for answers in given]]
        ]
        head = ("prompt", *(f"answer after step {step}" for step in shown))
        parts += [
            f"<h2>Answers: {_t(run)} · {_t(eval_set)}</h2>",
            "<p>Greedy answers, cut short.</p>",
            '<div class="wide"><table><tr>'
            + "".join(f'<th scope="col">{_t(cell)}</th>' for cell in head)
            + "</tr>\n"
            + "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
            + "</table></div>",
        ]
    return parts


def _name(evaluation: Named) -> str:
    step = evaluation.scores.step
    name = f"{evaluation.run} · {evaluation.scores.eval_set}"
    return name if step is None else f"{name} · step {step}"


def _margins_or_logratios(evaluation: Named) -> Panel:
    scores = evaluation.scores
    if scores.is_paired:
        return margins_panel(scores)
    names = names_of(scores)
    quantity = f"log-ratio log(π/π_ref) [{scores.unit}]"
    masses = scores.u_mass, scores.v_mass
    return Panel(scores.u, scores.v, names, quantity, "", scores.unit, masses)


def _plots(
    latest: Sequence[Named],
    names: Sequence[str],
    panel_of: Callable[[Named], Panel],
    share_scale: bool,
) -> list[str]:
    if not matplotlib_is_here():
        return []
    panels = [panel_of(evaluation) for evaluation in latest]
    # Margins of pairs and log-ratios of single completions are different quantities.
    same_quantity = len({panel.quantity for panel in panels}) == 1
    rows = [range(start, min(start + 3, len(panels))) for start in range(0, len(panels), 3)]
    images = [
        _image(
            side_by_side(
                [names[i] for i in row],
                [panels[i] for i in row],
                share_scale and same_quantity,
            ),
            "quantile functions of " + "; ".join(names[i] for i in row),
        )
        for row in rows
    ]
    if len(panels) > 1 and same_quantity and share_scale:
        images.append(_image(gaps(names, panels), "gaps of the quantile functions"))
    return images


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p class="wide"><img alt="{_t(description)}" src="data:image/png;base64,{data}"></p>'


def _on_weights(names: Sequence[str], summaries: Sequence[Summary]) -> list[str]:
    weighted = [name for name, found in zip(names, summaries, strict=True) if found["weighted"]]
    if not weighted:
        return []
    return [
        f"<p>The rows of {_t('; '.join(weighted))} have weights (<code>field_weight</code>). Every "
        "number counts them, except the numbers of completions and the length bias. There is no "
        "p-value then: the test is for rows that count alike.</p>"
    ]


def _evaluations_table(names: Sequence[str], summaries: Sequence[Summary]) -> str:
    head = ["mode", "chosen", "rejected", "β", "accuracy", "recoupled"]
    rows = [
        [
            _t(found["mode"]),
            _t(found["n_chosen"]),
            _t(found["n_rejected"]),
            _t(f"{found['beta']:g}"),
            _with_interval(found["accuracy"], found["accuracy_interval"], ".1%"),
            _number(found["recoupled_fraction"], ".1%"),
        ]
        for found in summaries
    ]
    return _table(head, names, rows)


def _dominance_table(names: Sequence[str], comparisons: Sequence[Summary]) -> str:
    keys = ("violation_fraction", "violation_amount", "dominance_amount", "w1", "gap_q05")
    head = [
        "violated share of t",
        "violation",
        "dominance",
        "W1",
        "gap at t = 0.05",
        "mean, first",
        "mean, second",
        "violation ratio",
        "p (H0: first dominates)",
    ]
    rows = []
    for found in comparisons:
        statistics, intervals = found["statistics"], found["intervals"]
        formats = [".1%", *[".4g"] * 4]
        upper = _number(found["violation_ratio_upper"], ".3f")
        rows.append(
            [
                *(
                    _with_interval(statistics[key], intervals[key], form)
                    for key, form in zip(keys, formats, strict=True)
                ),
                _number(found["first_mean"], ".4g"),
                _number(found["second_mean"], ".4g"),
                f"{_number(found['violation_ratio'], '.3f')}<small>upper {upper}</small>",
                f"{_number(found['test']['p_value'], '.3g')}"
                f"<small>{_t(found['test']['method'])}</small>",
            ]
        )
    return _table(head, names, rows)


def _second_order_table(names: Sequence[str], comparisons: Sequence[Summary]) -> str:
    head = ["violated share of t, 2nd order", "violation", "dominance", "p (H0: first dominates)"]
    rows = []
    for found in (comparison["second_order"] for comparison in comparisons):
        cells = [
            _with_interval(found["statistics"][key], found["intervals"][key], form)
            for key, form in zip(STATISTICS, (".1%", ".4g", ".4g"), strict=True)
        ]
        test = found["test"]
        rows.append(
            [*cells, f"{_number(test['p_value'], '.3g')}<small>{_t(test['method'])}</small>"]
        )
    return _table(head, names, rows)


def _length_table(names: Sequence[str], summaries: Sequence[Summary]) -> str:
    rows = []
    row_names = []
    for name, found in zip(names, summaries, strict=True):
        for kind, bias in found["length"].items():
            row_names.append(f"{name} · {kind}")
            quarters = [
                f"{_number(quarter['mean_reward'], '.4g')}<small>{_t(quarter['tokens_from'])}–"
                f"{_t(quarter['tokens_to'])} tokens, n = {_t(quarter['n'])}</small>"
                for quarter in bias["quartiles"]
            ]
            rows.append([_number(bias["spearman"], ".3f"), *quarters, *[""] * (4 - len(quarters))])
    head = ["Spearman", *(f"mean reward, quarter {k}" for k in range(1, 5))]
    return _table(head, row_names, rows)


def _reading() -> str:
    return (
        "<p>The first sample dominates the second when no level t is violated. "
        "<b>violation</b> is the hatched area, <b>dominance</b> the grey one, <b>W1</b> their sum. "
        "<b>violation ratio</b>: the violating share of the squared Wasserstein-2 distance, with "
        "its one-sided 95 % upper limit; a limit below 0.5 says that the first sample is closer to "
        "dominating than the second. <b>2nd order</b>: the same of the gap integrated from 0 to t, "
        "which compares the means of the worst shares t. "
        "<b>p</b>: a small value is evidence <em>against</em> dominance; a large one is no proof "
        "of it. "
        "<b>accuracy</b>: how often a chosen reward exceeds a rejected one, in its pair or over "
        "all pairs. <b>recoupled</b>: the share of pairs whose margins AOT compares with another "
        "row's; at 0 its loss is the pairwise one.</p>"
    )


def _table(head: Iterable[str], row_names: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as HTML. Head and row names are text, cells are HTML."""
    header = "".join(f'<th scope="col">{_t(cell)}</th>' for cell in ("evaluation", *head))
    lines = [
        f'<tr><th scope="row">{_t(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in zip(row_names, rows, strict=True)
    ]
    return f'<div class="wide"><table><tr>{header}</tr>\n' + "\n".join(lines) + "</table></div>"


def _with_interval(value: float, interval: Sequence[float], form: str) -> str:
    low, high = (_number(end, form) for end in interval)
    return f"{_number(value, form)}<small>[{low}, {high}]</small>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else _t(format(value, form))


def _t(text: object) -> str:
    return escape(str(text))
