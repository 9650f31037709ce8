"""A page on the scheduler's HTTP server, beside Dask's dashboard: the last figures of each fit on this cluster.

The module travels to the scheduler by value, which needs neither this package nor its libraries there.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping
from typing import Any

import dask.config
from distributed import Scheduler
from tornado.web import RequestHandler

TOPIC = "pavi-scale"  # of Dask's events
PATH = "/pavi-scale"
FIGURES = ("stage", "step", "elbo", "ahead", "workers", "rounds", "tasks", "rounds_per_second", "tasks_per_second")
SECONDS = 2  # after which a browser looks again
STYLE = "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.3em 1em;text-align:right;border-bottom:1px solid #ddd}"


def page(events: Iterable[tuple[float, Mapping[str, Any]]], now: float) -> str:
    """HTML of the last figures of each fit, the newest first.

    Args:
        events: (seconds since the epoch, figures of a fit), oldest first: `fit` names it, the others are those of `Meter.snapshot` and of the fit's last step.
        now: Seconds since the epoch.

    Example:
        >>> "<td>7</td>" in page([(0.0, {"fit": "runs/radon", "step": 7})], 1.0)
        True
    """
    last = {str(figures.get("fit", "")): (when, figures) for when, figures in events}
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("fit", "seconds ago", *FIGURES, "waiting"))
    rows = []
    for fit, (when, figures) in sorted(last.items(), key=lambda item: -item[1][0]):
        each = figures.get("waiting_of") or figures.get("waiting") or {}
        waiting = ", ".join(f"{name} {100 * share:.0f} %" for name, share in each.items())
        cells = [fit, f"{max(0.0, now - when):.0f}", *(_shown(figures.get(name)) for name in FIGURES), waiting]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    body = f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else "<p>No fit has told of itself yet.</p>"
    refresh = f'<meta charset="utf-8"><meta http-equiv="refresh" content="{SECONDS}">'
    return f"<!doctype html><html><head>{refresh}<title>pavi-scale</title><style>{STYLE}</style></head><body><h1>pavi-scale</h1>{body}</body></html>"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class Page(RequestHandler):
    """Serves `page` from the scheduler's own record of events."""

    def initialize(self, scheduler: Scheduler) -> None:
        """Called by tornado for each request."""
        self._scheduler = scheduler

    def get(self) -> None:
        """The page."""
        self.write(page(self._scheduler.get_events(TOPIC), time.time()))


def install(dask_scheduler: Scheduler) -> str:
    """Runs in the scheduler's process: adds the page, once; returns its address. It listens where Dask's HTTP server does, and nowhere else."""
    served = dask_scheduler.http_application
    if not getattr(served, "pavi_page", False):
        served.add_handlers(r".*$", [(PATH, Page, {"scheduler": dask_scheduler})])
        served.pavi_page = True
    server = dask_scheduler.http_server
    return f"{'https' if dask.config.get('distributed.scheduler.dashboard.tls.cert') else 'http'}://{server.address}:{server.port}{PATH}"
