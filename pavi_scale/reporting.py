"""The report of a run: pictures as PNG, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pavi_scale.calibration.predictive import Predictive, predictive_check
from pavi_scale.calibration.truth import Calibration, calibrate
from pavi_scale.durable import disk_errors
from pavi_scale.errors import InputError
from pavi_scale.pictures import new_figure
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.summary import summary_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIMIT = 0.7  # Pareto k-hat above which importance weights are not to be trusted (Vehtari et al. 2024)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow-x:auto}"
    ".ok{color:#1a7f37}.unconverged,.unreliable{color:#b42318}"
)


def report(posterior: Posterior, folder: str | Path | None = None, truth: Any = None, figures: Mapping[str, Figure] | None = None) -> Path:
    """Write the report of a run.

    Args:
        posterior: The posterior.
        folder: Where it goes; `report` in the run directory by default.
        truth: Dataset of true values of latents, for a simulated cohort: adds calibration.
        figures: Further pictures, title -> figure.

    Returns:
        Path of the page, `index.html`; the pictures lie beside it.

    Raises:
        InputError: The first argument is no posterior.
        RunError: The folder cannot be written, or the run is not complete.
    """
    if not isinstance(posterior, Posterior):
        raise InputError(
            "the first argument is not a posterior", where="report", expected="what fit or open_posterior returned", got=repr(posterior)[:200],
            remedy="pavi_scale.report(pavi_scale.open_posterior(run))",
        )
    home = Path(posterior.run) / "report" if folder is None else Path(folder)
    sections: list[tuple[str, str]] = [("The fit", f"<pre>{html.escape(repr(posterior))}</pre>")]
    drawn: dict[str, Figure] = {}
    drawn["ELBO"] = plot_trace(posterior)
    calibration = None if truth is None else calibrate(posterior, truth)
    if calibration is not None and calibration.ranks:
        drawn["Calibration"] = plot_calibration(calibration)
        sections.append(("Coverage of the truth", _coverage(calibration)))
    checks = predictive_check(posterior)
    if checks:
        drawn["Predictive check"] = plot_predictive(checks)
        sections.append(("Observed and replicated", _predictive(checks)))
    drawn |= dict(figures or {})
    sections.append(("Global variables", _globals(posterior)))
    sections.append(("Diagnostics by unit", _khat(posterior)))
    with disk_errors("the report cannot be written", home):
        home.mkdir(parents=True, exist_ok=True)
        pictures = [(title, _picture(home, title, figure)) for title, figure in drawn.items()]
        page = home / "index.html"
        page.write_text(_page(posterior, [sections[0], *pictures, *sections[1:]]), encoding="utf-8")
    return page


def plot_trace(posterior: Posterior) -> Figure:
    """The bound over the steps, a panel for each stage of the fit: stages bound different things, and their scales differ."""
    trace = posterior.datatree["fit"].dataset
    bound = np.asarray(trace["elbo"].values)
    stage = [str(s) for s in trace["stage"].values.tolist()] if "stage" in trace else ["fit"] * len(bound)
    names = list(dict.fromkeys(stage))
    figure = new_figure(max(4.5, 3.2 * len(names)), 3)
    for name, axes in zip(names, np.ravel(figure.subplots(1, max(1, len(names)))), strict=True):
        steps = np.array([i for i, s in enumerate(stage) if s == name and np.isfinite(bound[i])], dtype=int)
        values = bound[steps]
        axes.plot(steps, values, marker="." if len(steps) < 40 else "", color="C0")
        if len(steps) > 10:
            # The first steps dwarf the rest: show the part that still says something.
            low, high = np.quantile(values, 0.1), values.max()
            axes.set_ylim(low - 0.1 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
        axes.set(title=name, xlabel="step")
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.axes[0].set_ylabel("bound (nats)")
    return figure


def plot_calibration(calibration: Calibration, figure: Figure | None = None) -> Figure:
    """Share of true values inside central intervals, against the intervals' probability: on the diagonal if calibrated."""
    figure = figure or new_figure(4.5, 4.5)
    axes = figure.subplots()
    levels = np.linspace(0.0, 1.0, 101)
    axes.plot([0, 1], [0, 1], color="0.6", lw=1)
    for name in calibration.ranks:
        # A handful of values makes a staircase that says nothing.
        if len(calibration.ranks[name]) >= 20:
            axes.plot(levels, calibration.coverage(name, levels), label=f"{name} ({len(calibration.ranks[name]):,})")
    axes.set(xlabel="probability of the interval", ylabel="share of true values inside", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def plot_predictive(checks: Mapping[str, Predictive], figure: Figure | None = None) -> Figure:
    """Distribution of the observed values over those of replicates, a panel for each observed variable."""
    columns = min(3, len(checks))
    rows = -(-len(checks) // columns)
    figure = figure or new_figure(max(4.5, 3.2 * columns), 3 * rows)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for (name, check), axes in zip(checks.items(), panels, strict=False):
        share = (np.arange(check.observed.size) + 1) / check.observed.size
        # A heavy tail of a replicate or two would leave the rest without a picture.
        low, high = np.quantile(np.append(check.replicated.ravel(), check.observed), [0.001, 0.999])
        for again in check.replicated[:40]:
            axes.plot(np.sort(again), share, color="0.75", lw=0.5, drawstyle="steps-post")
        axes.plot(np.sort(check.observed), share, color="C0", lw=1.5, drawstyle="steps-post")
        margin = 0.03 * (high - low) + 1e-9
        axes.set(title=name, xlabel="value", xlim=(low - margin, high + margin), ylim=(0, 1))
    for axes in panels[len(checks) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("share of values below")
    return figure


def _predictive(checks: Mapping[str, Predictive]) -> str:
    legend = "<p>Replicated: median and 90 % interval over draws of the same units; p: Bayesian p-value, near 0 or 1 where the model misses the data.</p>"
    return legend + "".join(f"<h3>{html.escape(name)} ({check.observed.size:,} values)</h3>{_table(check.table())}" for name, check in checks.items())


def _coverage(calibration: Calibration) -> str:
    rows = {name: (len(ranks), *calibration.coverage(name, np.array([0.5, 0.9]))) for name, ranks in calibration.ranks.items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["values looked at", "in the 50 % interval", "in the 90 % interval"])
    share = "{:.1%}".format
    return _table(table.assign(**{c: table[c].map(share) for c in table.columns[1:]}))


def _globals(posterior: Posterior) -> str:
    table = summary_table(posterior)
    more = table.attrs["left out"]
    note = f"<p>Too large for a table: {html.escape(', '.join(more))}.</p>" if more else ""
    return (_table(table) if len(table) else "<p>None.</p>") + note


def _khat(posterior: Posterior) -> str:
    diagnostics = posterior.diagnostics
    rows = {}
    for name, values in diagnostics.data_vars.items():
        known = values.values[np.isfinite(values.values)]
        if "khat" in str(name) and known.size:
            rows[str(name)] = (known.size, float(np.median(known)), float(known.max()), float((known > _LIMIT).mean()))
    if not rows:
        return "<p>None stored.</p>"
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["units looked at", "median", "largest", f"share above {_LIMIT}"])
    legend = f"<p>Pareto k-hat of importance weights; above {_LIMIT} the approximation of that unit is not to be trusted; -1 where it is exact.</p>"
    return legend + _table(table)


def _table(table: pd.DataFrame) -> str:
    return str(table.to_html(border=0, float_format=lambda x: f"{x:.4g}", escape=True))


def _picture(home: Path, title: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    name = "".join(c if c.isalnum() else "_" for c in title.lower())
    (home / f"{name}.png").write_bytes(buffer.getvalue())
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _page(posterior: Posterior, sections: list[tuple[str, str]]) -> str:
    body = "".join(f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections)
    name = html.escape(Path(posterior.run).name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>'
        f'<body><h1>{name}: <span class="{html.escape(posterior.status)}">{html.escape(posterior.status)}</span></h1>{body}</body></html>'
    )
