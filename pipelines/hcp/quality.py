"""How good a posterior of the simulated study is: against the truth, and against what a numerical posterior given the true parameters would say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import xarray as xr

from pipelines.hcp import figures

DRAWS = 400  # lazy draws of each unit that is compared with the oracle
PROPOSALS = 20_000  # importance draws of the oracle
SUBJECTS, VERTICES = 40, 50  # whose product is the units compared
AT_ONCE = 20  # subjects looked at together
LEVELS = {"50 %": 0.67449, "90 %": 1.64485}


def in_order(posterior: Any, truth: xr.Dataset) -> xr.Dataset:
    """The truth, its networks numbered as in the posterior: they are numbered arbitrarily."""
    return truth.isel(network=np.argsort(figures.match(posterior.datatree["posterior_mean"]["mu"].values, truth["mu"].values)))


def against_truth(posterior: Any, truth: xr.Dataset) -> dict[str, float]:
    """Coverage of mean +- z sd, of every latent; share of right labels; correlation of fingerprints. All units are looked at, some subjects at a time."""
    mean, sd = posterior.datatree["posterior_mean"], posterior.datatree["posterior_sd"]
    out: dict[str, float] = {}
    for name in ("mu", "mu_subject", "mu_session", "rho", "label_logits"):
        subjects = truth.sizes["subject"] if "subject" in truth[name].dims else 0
        inside, right, count, units = dict.fromkeys(LEVELS, 0), 0, 0, 0
        for start in range(0, max(subjects, 1), AT_ONCE):
            part = {"subject": slice(start, start + AT_ONCE)} if subjects else {}
            m, s = (group[name].isel(part).values for group in (mean, sd))
            t = truth[name].isel(part).transpose(*mean[name].dims).values
            away = np.abs(t - m) / s
            inside = {level: n + int((away < LEVELS[level]).sum()) for level, n in inside.items()}
            count += away.size
            if name == "label_logits":
                right, units = right + int((m.argmax(-1) == t.argmax(-1)).sum()), units + m[..., 0].size
        out |= {f"{name}, {level} intervals hold": n / count for level, n in inside.items()}
        if units:
            out["right labels"] = right / units
    found, true = (d["mu_session"].transpose("network", ...).values.reshape(truth.sizes["network"], -1) for d in (mean, truth))
    out["lowest correlation of a network's fingerprints"] = float(min(np.corrcoef(a, b)[0, 1] for a, b in zip(found, true, strict=True)))
    return out


def against_oracle(posterior: Any, cohort: xr.Dataset, truth: xr.Dataset, seed: int = 0) -> dict[str, float]:
    """Lazy draws of some units beside the numerical posterior of each given true fingerprints, noise and population logits.

    The oracle is importance-sampled from the prior; the posterior has to find all that the oracle is told. Compared are the probabilities of the
    labels, E[softmax], and logits less their mean over networks, which no label depends on, as normals.
    """
    rng = np.random.default_rng(seed)
    at = {d: np.sort(rng.choice(truth.sizes[d], min(n, truth.sizes[d]), replace=False)) for d, n in (("subject", SUBJECTS), ("vertex", VERTICES))}
    drawn = posterior.datatree["posterior"]["label_logits"].isel(chain=0, draw=slice(DRAWS), **at).transpose("draw", "subject", "vertex", "network").values
    x = cohort["x"].isel(at).transpose("subject", "session", "vertex", "feature").values
    known = truth[["mu_session", "rho", "label_logits", "kappa"]].isel(at).load()
    means, rho = known["mu_session"].transpose("subject", "session", "network", "feature").values, known["rho"].transpose("vertex", "network").values
    true = known["label_logits"].transpose("subject", "vertex", "network").values
    white = rng.standard_normal((PROPOSALS, rho.shape[-1]))
    kl, normal, right, ours = [], [], [], []
    for s in range(x.shape[0]):
        square = ((x[s][:, :, None] - means[s][:, None]) ** 2).sum(-1)  # session, vertex, network
        evidence = -0.5 * square / float(known["kappa"]) ** 2
        for v in range(x.shape[2]):
            z = rho[v] + white
            log_weight = (np.logaddexp.reduce(z[:, None] + evidence[:, v], -1) - np.logaddexp.reduce(z, -1)[:, None]).sum(1)
            w = np.exp(log_weight - log_weight.max())
            w /= w.sum()
            p, q = w @ _softmax(z), _softmax(drawn[:, s, v]).mean(0)
            kl.append(float((p * np.log(p / q)).sum()))
            a, b = (_moments(c - c.mean(-1, keepdims=True), u) for c, u in ((z, w), (drawn[:, s, v], np.full(DRAWS, 1 / DRAWS))))
            normal.append(float(np.mean(np.log(b[1] / a[1]) + (a[1] ** 2 + (a[0] - b[0]) ** 2) / (2 * b[1] ** 2) - 0.5)))
            right.append((w @ z).argmax() == true[s, v].argmax())
            ours.append(drawn[:, s, v].mean(0).argmax() == true[s, v].argmax())
    return {
        "units compared": len(kl), "right labels, oracle": float(np.mean(right)), "right labels, ours": float(np.mean(ours)),
        "mean KL of label probabilities, nats": float(np.mean(kl)), "mean KL of a centred logit as normals, nats": float(np.mean(normal)),
    }  # fmt: skip


def queries(posterior: Any, subject: int = 0) -> dict[str, float]:
    """Seconds, and MiB of memory beyond what was held, of what is asked of a posterior."""
    tree = posterior.datatree
    vertices, draws = min(1000, tree["posterior_mean"].sizes["vertex"]), slice(1000)
    asked: dict[str, Callable[[], np.ndarray]] = {
        "one subject's mean map": lambda: tree["posterior_mean"]["label_logits"].isel(subject=subject).values,
        f"1,000 lazy draws of {vertices:,} vertices of one subject": lambda: tree["posterior"]["label_logits"]
        .isel(subject=subject, vertex=slice(vertices), draw=draws)
        .values,
    }
    np.asarray(tree["posterior"]["label_logits"].isel(subject=subject, vertex=slice(2), draw=slice(2)))  # what is loaded once
    out: dict[str, float] = {}
    for question, ask in asked.items():
        with Peak() as peak:
            began = time.perf_counter()
            ask()
            out[f"{question}, s"] = time.perf_counter() - began
        out[f"{question}, MiB"] = peak.bytes / 2**20
    return out


class Peak:
    """Resident memory beyond that at entry, looked at every 5 ms."""

    bytes = 0

    def __enter__(self) -> Peak:
        me = psutil.Process()
        self._before, self._done = me.memory_info().rss, threading.Event()
        self._watch = threading.Thread(target=self._look, args=(me,), daemon=True)
        self._watch.start()
        return self

    def _look(self, me: psutil.Process) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, me.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()


def _softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _moments(z: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = w @ z
    return mean, np.sqrt(np.maximum(w @ z**2 - mean**2, 1e-12))
