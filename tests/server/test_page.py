"""The page on the scheduler's HTTP server: the last figures of each fit, nothing that a name could smuggle in."""

import json
import time
from html.parser import HTMLParser
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from distributed import Client, LocalCluster

import pavi_scale as ps
from pavi_scale.server.runtime.page import FIGURES, page
from pipelines import gre


class Table(HTMLParser):
    """Cells by row, and the names of all elements."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self._inside = [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._inside = tag in ("td", "th")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][-1] += data


def test_the_last_figures_of_each_fit():
    events = [
        (10.0, {"fit": "a", "stage": "pass", "step": 3, "elbo": -1234.5}),
        (12.0, {"fit": "b", "stage": "ascent", "waiting_of": {"w1": 0.25}, "waiting": {"mean": 0.25}}),
        (11.0, {"fit": "a", "stage": "posterior", "step": 4, "elbo": None}),
    ]
    head, *rows = Table(page(events, 13.0)).rows
    assert head[:3] == ["fit", "seconds ago", "stage"]
    assert len(head) == len(FIGURES) + 3
    assert [row[:4] for row in rows] == [["b", "1", "ascent", ""], ["a", "2", "posterior", "4"]]
    assert rows[0][-1] == "w1 25 %"


def test_a_name_is_text():
    found = Table(page([(0.0, {"fit": "<script>alert(1)</script>", "stage": "<img src=x>"})], 0.0))
    assert found.rows[1][0] == "<script>alert(1)</script>"
    assert not {"script", "img"} & found.tags


def test_nothing_told_yet():
    assert "No fit" in page([], 0.0)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_fit_is_shown_on_loopback(tmp_path, monkeypatch):
    monkeypatch.setattr("pavi_scale.watching.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("pavi_scale.watching.LOG_SECONDS", 0.02)
    gre.make_cohort(str(tmp_path / "gre.zarr"), groups=200)
    quiet = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, threads_per_worker=1, **quiet) as cluster, Client(cluster, set_as_default=False) as client:
        for number in range(2):  # the page is added once
            ps.fit(gre.model, str(tmp_path / "gre.zarr"), run=tmp_path / f"run{number}", client=client, progress=False)
        told = [json.loads(line) for line in (tmp_path / "run0" / "events.jsonl").read_text().splitlines()]
        (address,) = [e["address"] for e in told if e["event"] == "page"]
        assert urlsplit(address).hostname == "127.0.0.1"
        until = time.monotonic() + 20
        while len(rows := Table(urlopen(address, timeout=10).read().decode()).rows) < 3 and time.monotonic() < until:
            time.sleep(0.1)
    assert {row[0] for row in rows[1:]} == {str(tmp_path / f"run{number}") for number in range(2)}
    assert all(int(row[1 + 1 + FIGURES.index("tasks")].replace(",", "")) > 0 for row in rows[1:])
