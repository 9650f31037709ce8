"""Replicates against the laws they come from; log-likelihoods against torch; the same numbers whatever is asked for."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import distributions as td
from torch.distributions import Normal

import pavi_scale as ps
from pavi_scale.calibration.predictive import predictive_check
from pavi_scale.errors import InputError
from pavi_scale.model.simulate.quantiles import NoQuantileError, draw_by_quantiles
from pavi_scale.posterior.backend import PaviBackendEntrypoint

model = ps.Model(
    ps.Plate("group"), ps.Plate("obs", within="group"), sizes={"k": 2},
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    theta=ps.latent(lambda mu: Normal(mu, 0.5), plates="group"),
    w=ps.covariate(plates="obs"),
    x=ps.observed(lambda theta, w: Normal(theta + w, 0.7), plates="obs", missing="mask"),
    n=ps.observed(lambda theta: td.Poisson(theta.exp()), plates="group"),
    y=ps.observed(lambda mu: td.VonMises(mu, 4.0), plates="group", dims="k"),
)  # fmt: skip


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    cohort = model.sample({"group": 5, "obs": 20}, seed=1).assign_coords(group=list("abcde"))
    cohort["x"][3] = np.nan
    return ps.fit(model, cohort, run=tmp_path_factory.mktemp("runs") / "run", progress=False)


def test_the_lazy_group_is_what_predict_gives_and_slices_agree(posterior):
    whole, lazy = posterior.predict(20), posterior.datatree["posterior_predictive"].dataset
    assert dict(lazy["y"].sizes) == {"chain": 1, "draw": 1000, "group": 5, "k": 2}
    for name in ("x", "n", "y"):
        np.testing.assert_array_equal(lazy[name].isel(chain=0, draw=slice(20)).values, whole[name].values)
    np.testing.assert_array_equal(lazy["x"].isel(chain=0, draw=[17, 3], obs=[9, 2, 9]).values, whole["x"].isel(draw=[17, 3], obs=[9, 2, 9]).values)
    np.testing.assert_array_equal(lazy["y"].isel(chain=0, draw=4, group=2, k=1).values, whole["y"].isel(draw=4, group=2, k=1).values)
    np.testing.assert_array_equal(posterior.predict(20, group="c")["n"].values, whole["n"].sel(group="c").values)
    opened = xr.open_dataset(posterior.run, engine=PaviBackendEntrypoint, group="posterior_predictive", model=model)
    np.testing.assert_array_equal(opened["x"].isel(chain=0, draw=5).values, whole["x"].isel(draw=5).values)


def test_seeds_differ_and_latents_go_with_their_replicates(posterior):
    first, other = (posterior.predict(60, seed=seed) for seed in (0, 1))
    assert (first["x"] != other["x"]).all()
    index = posterior.datatree["constant_data"]["obs_group"].values
    for seed, replicates in ((0, first), (1, other)):
        theta = posterior.sample(60, seed=seed)["theta"].values[:, index]
        noise = (replicates["x"].values - theta - posterior.datatree["constant_data"]["w"].values) / 0.7
        # Standard normal only if each replicate stands on its own draw of theta.
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
        assert abs(np.corrcoef(noise.ravel(), theta.ravel())[0, 1]) < 0.1


def test_log_likelihood_is_that_of_torch(posterior):
    tree = posterior.datatree
    theta = torch.as_tensor(posterior.sample(40)["theta"].values)
    index = tree["constant_data"]["obs_group"].values
    x, w = (torch.as_tensor(tree[group][name].values) for group, name in (("observed_data", "x"), ("constant_data", "w")))
    expected = Normal(theta[:, index] + w, 0.7, validate_args=False).log_prob(x).numpy()
    got = tree["log_likelihood"]["x"].isel(chain=0, draw=slice(40)).values
    np.testing.assert_allclose(got, expected)
    assert np.isnan(got[:, 3]).all()
    counts = torch.as_tensor(tree["observed_data"]["n"].values)
    np.testing.assert_allclose(tree["log_likelihood"]["n"].isel(chain=0, draw=slice(40)).values, td.Poisson(theta.exp()).log_prob(counts).numpy())
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "group")


def test_no_units_give_empty_arrays_as_in_xarray(posterior):
    drawn, replicates = posterior.sample(4), posterior.predict(4)
    for sel in ({"group": []}, {"group": slice("x", "z")}):
        xr.testing.assert_identical(posterior.sample(4, **sel), drawn.sel(sel))
    assert posterior.sample(4, group=[])["theta"].shape == (4, 0)
    none = posterior.predict(4, obs=[])
    xr.testing.assert_identical(none, replicates.isel(obs=[]))
    assert none["x"].shape == (4, 0)
    nothing = posterior.predict(4, k=[], group="c")["y"]
    assert (nothing.dims, nothing.shape) == (("draw", "k"), (4, 0))
    assert posterior.quantile("theta", 0.5, group=[]).shape == (0,)
    lazy = posterior.datatree["posterior_predictive"].dataset
    assert lazy["x"].isel(obs=[]).values.shape == (1, 1000, 0)


def test_a_group_s_label_leaves_the_observations_within_it(posterior):
    whole = posterior.predict(4)
    index = posterior.datatree["constant_data"]["obs_group"].values
    for group, at in (("c", [2]), (["d", "a"], [0, 3]), (slice("b", "c"), [1, 2])):
        found = posterior.predict(4, group=group)
        np.testing.assert_array_equal(found["x"].values, whole["x"].isel(obs=np.flatnonzero(np.isin(index, at))).values)
        xr.testing.assert_identical(found["n"], whole["n"].sel(group=group))


CROSSED = ps.Model(
    ps.Plate("school"), ps.Plate("student", within="school"), ps.Plate("lecturer"), ps.Plate("rating", within=("student", "lecturer")), ps.Plate("year"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    a=ps.latent(lambda mu: Normal(mu, 1.0), plates="student"),
    b=ps.latent(lambda: Normal(0.0, 1.0), plates="lecturer"),
    y=ps.observed(lambda a, b: Normal(a + b, 1.0), plates="rating"),
    z=ps.observed(lambda a: Normal(a, 1.0), plates=("student", "year")),
)  # fmt: skip


@pytest.fixture(scope="module")
def crossed():
    school, student, lecturer = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2, 2, 1]), np.array([0, 1, 1, 0, 1, 0])
    rng = np.random.default_rng(0)
    cohort = xr.Dataset(
        {
            "y": ("rating", rng.normal(size=6)), "z": (("student", "year"), rng.normal(size=(4, 2))),
            "of_school": ("student", school, {"instance_dimension": "school"}),
            "of_student": ("rating", student, {"instance_dimension": "student"}),
            "by": ("rating", lecturer, {"instance_dimension": "lecturer"}),
        },
        coords={"lecturer": ["li", "mo"], "rating": list("uvwxyz"), "year": [2001, 2002]},
    )  # fmt: skip
    return ps.fit(CROSSED, cohort, seed=0, progress=False), school[student], lecturer


@pytest.mark.parametrize("sel", [{"school": 1}, {"school": [2, 0]}, {"school": slice(0, 0)}, {"school": 2}])
@pytest.mark.parametrize("by", [{}, {"lecturer": "mo"}, {"lecturer": ["mo", "li"]}])
def test_plates_above_crossed_and_dense_ones_restrict_what_lies_within(crossed, sel, by):
    posterior, schools, lecturers = crossed
    whole, found = posterior.predict(5), posterior.predict(5, **sel, **by)
    wanted = np.atleast_1d(np.arange(3)[sel["school"]])
    people = np.atleast_1d([["li", "mo"].index(name) for name in np.atleast_1d(by.get("lecturer", ["li", "mo"]))])
    ratings = np.flatnonzero(np.isin(schools, wanted) & np.isin(lecturers, people))
    students = np.flatnonzero(np.isin([0, 1, 1, 2], wanted))
    xr.testing.assert_equal(found["y"].drop_vars("lecturer", errors="ignore"), whole["y"].isel(rating=ratings))
    xr.testing.assert_equal(found["z"].drop_vars("lecturer", errors="ignore"), whole["z"].isel(student=students))
    assert set(found.sizes) == {"draw", "rating", "student", "year"}


def test_units_named_beside_their_group(crossed):
    posterior = crossed[0]
    whole = posterior.predict(5)["y"]
    np.testing.assert_array_equal(posterior.predict(5, school=1, rating=["y", "u", "x"])["y"].values, whole.sel(rating=["y", "x"]).values)
    np.testing.assert_array_equal(posterior.predict(5, school=1, rating="y")["y"].values, whole.sel(rating="y").values)
    with pytest.raises(InputError, match="does not lie within"):
        posterior.predict(5, school=1, rating="u")
    with pytest.raises(InputError, match="unknown dimension"):
        posterior.sample(5, school=1)  # no latent has it, and draws of latents are chosen by their own plates


def test_wrong_requests(posterior):
    for wrong in ({"draws": 0}, {"seed": -1}, {"planet": 3}, {"group": "z"}, {"draws": True}):
        with pytest.raises(InputError):
            posterior.predict(**wrong)


def test_a_predictive_check_sees_a_wrong_model(posterior):
    good = predictive_check(posterior, draws=300)
    assert set(good) == {"x", "n", "y"}
    assert good["x"].observed.size == 19
    assert good["x"].table()["p"].between(0.003, 0.997).all()  # one of seven is 0.014 of many draws: this cohort's median is low
    narrow = ps.Model(ps.Plate("obs"), mu=ps.latent(lambda: Normal(0.0, 1.0)), x=ps.observed(lambda mu: Normal(mu, 1.0), plates="obs"))
    wide = np.random.default_rng(0).normal(0, 3, 50)
    table = predictive_check(ps.fit(narrow, xr.Dataset({"x": ("obs", wide)}), progress=False))["x"].table()
    assert table.loc["sd", "p"] < 0.01
    assert 0.05 < table.loc["mean", "p"] < 0.95


def _t(*values):
    return torch.tensor(values, dtype=torch.float64)


LAWS = {
    "normal": td.Normal(_t(1.0), _t(2.0)), "lognormal": td.LogNormal(_t(0.3), _t(0.5)), "half normal": td.HalfNormal(_t(2.0)),
    "laplace": td.Laplace(_t(1.0), _t(0.5)), "student": td.StudentT(_t(5.0), _t(1.0), _t(2.0)), "gamma": td.Gamma(_t(2.5), _t(0.5)),
    "beta": td.Beta(_t(2.0), _t(3.0)), "bernoulli": td.Bernoulli(logits=_t(0.4)), "poisson": td.Poisson(_t(3.5)),
    "binomial": td.Binomial(10, probs=_t(0.3)), "negative binomial": td.NegativeBinomial(_t(4.0), probs=_t(0.4)), "geometric": td.Geometric(_t(0.3)),
    "categorical": td.Categorical(logits=_t(0.1, 1.0, -0.5)), "inverse gamma": td.InverseGamma(_t(6.0), _t(2.0)),
    "mixture": td.MixtureSameFamily(td.Categorical(_t(0.3, 0.7)), td.Normal(_t(-2.0, 1.0), _t(0.5, 1.0))),
    "mixture of vectors": td.MixtureSameFamily(td.Categorical(_t(0.3, 0.7)), td.Independent(td.Normal(torch.zeros(2, 3, dtype=torch.float64), 1.0), 1)),
    "multivariate": td.MultivariateNormal(_t(0.0, 1.0), torch.eye(2, dtype=torch.float64) * 2 + 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_quantile_draws_have_the_law(name):
    law = LAWS[name]
    law = law.expand((20_000,)) if law.batch_shape in ((), (1,)) else law
    generator = torch.Generator().manual_seed(0)
    drawn = draw_by_quantiles(law, lambda path, shape: torch.rand(shape, dtype=torch.float64, generator=generator))
    torch.manual_seed(1)
    reference = law.sample()
    assert drawn.shape == reference.shape
    for mine, theirs in zip(drawn.reshape(20_000, -1).T, reference.reshape(20_000, -1).T, strict=True):
        # Jitter makes the test exact for discrete laws too.
        jitter = np.random.default_rng(2).uniform(size=(2, 20_000)) * (theirs == theirs.round()).all().item()
        assert stats.ks_2samp(mine.numpy() + jitter[0], theirs.numpy() + jitter[1]).pvalue > 1e-3
    if drawn.ndim > 1 and name == "multivariate":
        np.testing.assert_allclose(np.cov(drawn.numpy().T), law.covariance_matrix[0].numpy(), atol=0.1)


def test_a_law_without_quantiles_says_so():
    with pytest.raises(NoQuantileError):
        draw_by_quantiles(td.VonMises(_t(0.0), _t(1.0)), lambda path, shape: torch.rand(shape, dtype=torch.float64))
