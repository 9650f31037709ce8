"""New units under a trained guide: what their encoder reads, whoever else is new, against the fit that trained it."""

import numpy as np
import pytest
import xarray as xr
from torch.distributions import Normal, Poisson

import pavi_scale as ps
from pavi_scale import study
from pavi_scale.errors import CohortError, RunError
from pavi_scale.recording import settings_from, settings_record
from pavi_scale.settings import Settings

VISITS = np.array([1, *[9] * 11])  # of each group, counted at visits ...
SCANS = np.array([7, *[2] * 11])  # ... and in scans: all groups together have more of the first, the group 0 alone of the second


def cohort_of(groups):
    """Counts of some of the groups, numbered anew: those of one are always the same."""
    visit, scan, data = [], [], {"v": [], "s": []}
    for position, g in enumerate(groups):
        rng = np.random.default_rng(g)
        rate = np.exp(rng.normal(0.5, 1.0))
        for name, counts, index in (("v", VISITS, visit), ("s", SCANS, scan)):
            data[name] += list(rng.poisson(rate, counts[g]))
            index += [position] * counts[g]
    return xr.Dataset({
        "v": ("visit", data["v"]), "s": ("scan", data["s"]),
        "of_visit": ("visit", visit, {"instance_dimension": "group"}), "of_scan": ("scan", scan, {"instance_dimension": "group"}),
    })  # fmt: skip


model = ps.Model(
    ps.Plate("group"), ps.Plate("visit", within="group"), ps.Plate("scan", within="group"),
    theta=ps.latent(lambda: Normal(0.0, 1.0), plates="group"),
    v=ps.observed(lambda theta: Poisson(theta.exp()), plates="visit"), s=ps.observed(lambda theta: Poisson(theta.exp()), plates="scan"),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    return ps.fit(model, cohort_of(range(12)), run=tmp_path_factory.mktemp("run") / "run", encoding=request.param, progress=False)


def draws(posterior, group):
    return posterior.sample(64, group=group)["theta"].values


@pytest.mark.parametrize("trained", ["encoder", "hybrid"], indirect=True)
def test_a_new_group_has_the_same_posterior_whoever_is_new_beside_it(trained):
    alone, among = trained.extend(cohort_of([0])), trained.extend(cohort_of([0, 3, 5, 6]))
    np.testing.assert_allclose(draws(alone, 0), draws(among, 0), rtol=1e-9)
    mean, sd = (np.asarray(alone.datatree[f"posterior_{of}"]["theta"])[0] for of in ("mean", "sd"))
    assert abs(mean - np.asarray(among.datatree["posterior_mean"]["theta"])[0]) < 0.05 * sd
    np.testing.assert_allclose(draws(ps.open_posterior(alone.run, model=model), 0), draws(alone, 0), rtol=1e-9)  # as its record says


@pytest.mark.parametrize("trained", ["encoder"], indirect=True)  # a hybrid's row is that of the training cohort
def test_a_group_of_the_training_cohort_gets_its_posterior_again(trained):
    np.testing.assert_allclose(draws(trained.extend(cohort_of([0])), 0), draws(trained, 0), rtol=1e-9)


@pytest.mark.parametrize("trained", ["encoder"], indirect=True)
def test_new_units_that_would_need_rows_are_refused(trained, monkeypatch):
    monkeypatch.setattr(study, "choose_free", lambda *_, **__: frozenset({frozenset({"group"})}))
    with pytest.raises(CohortError, match=r"too many to be computed together.*free rows of group.*fewer of them"):
        trained.extend(cohort_of([0]))


@pytest.mark.parametrize("scheme", ["encoder", "hybrid", "likelihood"])
def test_settings_of_a_run_that_does_not_say_what_its_encoders_read(scheme):
    stored = settings_record(Settings(schemes={"group": scheme}))
    assert settings_from(stored) == Settings(schemes={"group": scheme})
    del stored["seen"]
    if scheme == "likelihood":
        assert settings_from(stored).seen == {}
        return
    with pytest.raises(RunError, match="earlier version"):
        settings_from(stored)
