"""Two small fits, how one goes on after a crash, and the digest of their results."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import xarray as xr
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps
from pavi_scale import rows as training_rows
from pavi_scale import study as preparing
from pavi_scale.errors import RunError
from pavi_scale.run import Run

plain = ps.Model(
    ps.Plate("g"),
    ps.Plate("i"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="g"),
    x=ps.observed(lambda theta: Normal(theta, 1.0), plates=("g", "i")),
)
rows = ps.Model(
    ps.Plate("g"),
    ps.Plate("i", within="g"),
    mu=ps.latent(lambda: Normal(0.0, 5.0)),
    tau=ps.latent(lambda: HalfNormal(2.0)),
    theta=ps.latent(lambda mu, tau: Normal(mu, tau), plates="g"),
    x=ps.observed(lambda theta: Normal(theta, 1.0), plates="i"),
)
MODELS = {"plain": plain, "rows": rows}
SETTLING = "settling"  # as "rows", but training ends when it is settled
SIMULATED = "simulated"  # groups of unequal sizes at default settings, drawn from the prior by a seed: "simulated 7"
GROUP_INDEX = np.repeat(np.arange(8), [1, 1, 2, 3, 4, 5, 7, 9])


def simulated(seed: int) -> xr.Dataset:
    """A cohort of the model with free scales, truth included."""
    given = xr.Dataset({"of": ("i", GROUP_INDEX, {"instance_dimension": "g"})})
    return rows.sample({"g": 8, "i": len(GROUP_INDEX)}, given, seed)


def cohort(kind: str) -> xr.Dataset:
    if kind.startswith(SIMULATED):
        drawn = simulated(int(kind.split()[1]))
        return drawn.drop_vars(["mu", "tau", "theta"])
    rng = np.random.default_rng(0)
    if kind == "plain":
        return xr.Dataset({"x": (("g", "i"), rng.normal(size=(6, 3)))}, coords={"g": [f"g{i}" for i in range(6)]})
    group = np.repeat(np.arange(8), 4)
    y = 2.0 + rng.normal(size=8)[group] + rng.normal(size=len(group))
    return xr.Dataset({"x": ("i", y), "of": ("i", group, {"instance_dimension": "g"})})


def begin(path: Path, kind: str, source: object = None) -> ps.Posterior:
    with as_kind(kind):
        return ps.fit((plain if kind == "plain" else rows), cohort(kind) if source is None else source, run=path, seed=3, progress=False)


def go_on(path: Path, kind: str, source: object = None) -> ps.Posterior:
    """What a user does after any interruption: resume, or fit again where the run says that it had not begun."""
    try:
        with as_kind(kind):
            return ps.resume(path, model=(plain if kind == "plain" else rows), progress=False)
    except RunError as error:
        if error.what not in ("there is no run", "the run does not say what was fitted"):
            raise
    return begin(path, kind, source)


@contextlib.contextmanager
def as_kind(kind: str) -> Iterator[None]:
    """Free rows, whatever the size of the study, and as many passes in any case: fits that checkpoint several times on the way."""
    if kind.startswith(SIMULATED):
        yield
        return
    chosen = frozenset({frozenset({"g"})}) if kind != "plain" else frozenset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(preparing, "choose_free", return_value=chosen))
        if kind != "plain":  # a short search for a start
            stack.enter_context(mock.patch.multiple(training_rows, LOOK=1, SEARCH=1, PRIOR_STARTS=1))
        if kind == "rows":
            stack.enter_context(mock.patch.multiple(training_rows, CALM=0.0, PASSES=3))
        yield


def digest(path: Path) -> str:
    """SHA-256 of the stored posterior, all groups and metadata, of the weights and pool, and of what the run says of itself (but for times)."""
    run = Run.open(path)
    tensors, state = run.latest()
    total = hashlib.sha256()
    for file in sorted(p for p in run.posterior_path.rglob("*") if p.is_file()):
        total.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    for name, value in sorted(tensors.items()):
        total.update(name.encode() + b"\0" + value.tobytes())
    total.update(repr(sorted((k, v) for k, v in state.items() if "seconds" not in k)).encode())
    return total.hexdigest()
