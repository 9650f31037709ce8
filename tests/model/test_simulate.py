"""Simulated cohorts: shapes, alignment, moments, seeds, and out-of-core simulation against in-memory simulation."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as td
import xarray as xr
import zarr
from torch.distributions import Categorical, Distribution, Gamma, HalfNormal, Independent, MixtureSameFamily, Normal, Poisson

from pavi_scale.errors import InputError, ModelError, NumericalError
from pavi_scale.laws import IsotropicNormalMixture
from pavi_scale.model import Model, covariate, latent, observed
from pavi_scale.model.simulate import batched, generate, sinks
from pavi_scale.model.simulate.cohort import simulate
from pavi_scale.plates import Plate

radon = Model(
    Plate("county"),
    Plate("house", within="county"),
    mu_alpha=latent(lambda: Normal(0.0, 10.0)),
    sigma_alpha=latent(lambda: HalfNormal(1.0)),
    beta=latent(lambda: Normal(0.0, 10.0)),
    floor=covariate(plates="house"),
    alpha=latent(lambda mu_alpha, sigma_alpha: Normal(mu_alpha, sigma_alpha), plates="county"),
    log_radon=observed(lambda alpha, beta, floor: Normal(alpha + beta * floor, 1e-9), plates="house"),
)
deep = Model(
    Plate("school"),
    Plate("student", within="school"),
    Plate("lecturer"),
    Plate("rating", within=("student", "lecturer")),
    Plate("item"),
    sc=latent(lambda: Normal(0.0, 1.0), plates="school", dims="k"),
    st=latent(lambda sc: Normal(sc.sum(), 1.0), plates="student"),
    le=latent(lambda: Normal(0.0, 1.0), plates="lecturer"),
    pair=latent(lambda: Normal(0.0, 1.0), plates=("lecturer", "student")),
    grid=latent(lambda: Normal(0.0, 1.0), plates=("item", "school")),
    y=observed(lambda st, le, sc, pair, grid: Normal(st + 10.0 * le + 100.0 * sc[1] + 1000.0 * pair + 1e4 * grid, 1e-9), plates=("rating", "item")),
    z=observed(lambda grid, pair: Normal(torch.stack([grid, pair]), 1e-9), plates=("item", "lecturer", "student"), dims="two"),
    sizes={"k": 3, "two": 2},
)
DEEP = {"school": 4, "student": 11, "lecturer": 5, "rating": 37, "item": 3}


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(generate, "BLOCK", size)
    monkeypatch.setattr(sinks, "BLOCK", size)


def test_radon_has_every_variable_under_its_name_and_dims() -> None:
    ds = radon.sample(sizes={"county": 85, "house": 919}, seed=0)
    assert ds["house_county"].attrs == {"instance_dimension": "county"}
    assert ds["floor"].attrs["simulated"] == "standard normal"
    for v in radon.variables.values():
        assert ds[v.name].dims == v.plates + v.dims
        assert ds[v.name].dtype == np.float64
    index = ds["house_county"].values
    assert (np.diff(index) >= 0).all()
    counts = np.bincount(index, minlength=85)
    assert set(counts) == {10, 11}
    truth = ds["alpha"].values[index] + float(ds["beta"]) * ds["floor"].values
    np.testing.assert_allclose(ds["log_radon"].values, truth, atol=1e-6)


def test_given_covariates_and_index_are_used_and_others_ignored() -> None:
    g = np.random.default_rng(0)
    index = g.integers(0, 7, 50)
    index[0] = 6
    given = xr.Dataset(
        {
            "where": ("house", index, {"instance_dimension": "county"}),
            "floor": ("house", g.integers(0, 2, 50)),
            "log_radon": ("house", np.zeros(50)),
            "alpha": ("county", np.zeros(7)),
        },
        coords={"county": list("abcdefg")},
    )
    ds = radon.sample(given=given, seed=3)
    assert "house_county" not in ds
    np.testing.assert_array_equal(ds["where"], index)
    assert ds["where"].attrs == {"instance_dimension": "county"}
    assert list(ds["county"].values) == list("abcdefg")
    assert ds["alpha"].values.std() > 0
    np.testing.assert_allclose(ds["log_radon"], ds["alpha"].values[index] + float(ds["beta"]) * given["floor"].values, atol=1e-6)


@pytest.mark.parametrize("block", [1 << 19, 8, 1])
def test_three_levels_and_crossed_align_as_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, block)
    ds = deep.sample(DEEP, seed=1)
    school, student, lecturer = (ds[n].values for n in ("student_school", "rating_student", "rating_lecturer"))
    assert (np.bincount(student, minlength=11) >= 1).all()
    assert (np.bincount(lecturer, minlength=5) >= 7).all()
    assert (np.diff(student) >= 0).all()
    assert not (np.diff(lecturer) >= 0).all()
    st, le, sc, pair, grid = (ds[n].values for n in ("st", "le", "sc", "pair", "grid"))
    for r in range(37):
        for i in range(3):
            s, t = student[r], lecturer[r]
            want = st[s] + 10 * le[t] + 100 * sc[school[s], 1] + 1000 * pair[t, s] + 1e4 * grid[i, school[s]]
            assert abs(ds["y"].values[r, i] - want) < 1e-5
    np.testing.assert_allclose(ds["z"].values[..., 0], np.broadcast_to(grid[:, None, school], (3, 5, 11)), atol=1e-6)
    np.testing.assert_allclose(ds["z"].values[..., 1], np.broadcast_to(pair, (3, 5, 11)), atol=1e-6)


def test_scalar_laws_are_independent_over_dims_and_plates() -> None:
    m = Model(
        Plate("g"),
        mu=latent(lambda: Normal(0.0, 1.0), dims=("a", "b")),
        x=observed(lambda: Normal(0.0, 1.0), plates="g", dims="a"),
        w=observed(lambda mu: Normal(mu, mu.exp()[:1]), plates="g", dims=("a", "b")),
    )
    ds = m.sample({"g": 50, "a": 30, "b": 20})
    for name in ("mu", "x", "w"):
        assert len(np.unique(ds[name])) == ds[name].size


def test_moments_of_a_gaussian_hierarchy() -> None:
    m = Model(Plate("g"), Plate("n"), t=latent(lambda: Normal(2.0, 3.0), plates="g"), x=observed(lambda t: Normal(t, 0.5), plates=("g", "n")))
    ds = m.sample({"g": 20_000, "n": 5})
    t, x = ds["t"].values, ds["x"].values
    assert abs(t.mean() - 2.0) < 5 * 3.0 / np.sqrt(20_000)
    assert abs(t.std() / 3.0 - 1) < 0.03
    noise = x - t[:, None]
    assert abs(noise.std() / 0.5 - 1) < 0.02
    assert abs(np.corrcoef(noise, rowvar=False)[0, 1]) < 0.05
    assert abs(np.cov(x[:, 0], x[:, 1])[0, 1] - 9.0) < 0.5


LAWS = {
    "gamma": lambda a: Gamma(a, 2.0),
    "beta": lambda a: td.Beta(a, 2.0),
    "student": lambda a: td.StudentT(9.0, a, 0.5),
    "poisson": lambda a: Poisson(a),
    "binomial": lambda a: td.Binomial(10, a / 2),
    "bernoulli": lambda a: td.Bernoulli(logits=a),
    "categorical": lambda a: Categorical(logits=a * torch.arange(3.0)),
    "laplace": lambda a: td.Laplace(a, 1.0),
    "lognormal": lambda a: td.LogNormal(a, 0.2),
    "uniform": lambda a: td.Uniform(-a, a),
    "negative_binomial": lambda a: td.NegativeBinomial(5.0, a / 3),
    "exponential": lambda a: td.Exponential(a),
    "half_normal": lambda a: HalfNormal(a),
    "inverse_gamma": lambda a: td.InverseGamma(a + 8.0, 1.0),
    "geometric": lambda a: td.Geometric(a / 2),
    "weibull": lambda a: td.Weibull(a, 2.0),
    "dirichlet": lambda a: td.Dirichlet(a * torch.ones(3)),
    "mvn": lambda a: td.MultivariateNormal(a * torch.arange(2.0), torch.eye(2) + 0.5),
    "mvn_tril": lambda a: td.MultivariateNormal(torch.ones(4, 2), scale_tril=a * torch.eye(2)),
    "low_rank": lambda a: td.LowRankMultivariateNormal(a * torch.ones(3), torch.ones(3, 1), torch.ones(3)),
    "lkj": lambda a: td.LKJCholesky(3, a),
    "multinomial": lambda a: td.Multinomial(5, logits=a * torch.arange(3.0)),
    "mixture": lambda a: MixtureSameFamily(Categorical(logits=a * torch.arange(3.0)), Independent(Normal(a * torch.arange(6.0).reshape(3, 2), 1.0), 1)),
    "isotropic": lambda a: IsotropicNormalMixture(a * torch.arange(3.0), torch.arange(6.0).reshape(3, 2), a),
    "von_mises": lambda a: td.VonMises(0.0, a),
    "affine": lambda a: td.TransformedDistribution(Normal(torch.zeros(3), 1.0), [td.AffineTransform(a, torch.arange(1.0, 4.0))]),
    "logistic_normal": lambda a: td.LogisticNormal(a * torch.ones(2), 1.0),
    "relaxed": lambda a: td.RelaxedOneHotCategorical(a, logits=torch.zeros(3)),
    "event_broadcast": lambda a: Independent(Normal(a * torch.arange(3.0), 1.0), 1),
}
OPAQUE = {"logistic_normal", "relaxed"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAWS)
def test_batched_draws_have_each_units_own_moments(name: str) -> None:
    law_of, units, copies = LAWS[name], torch.linspace(0.6, 1.4, 3), 1500
    one = law_of(units[0])
    shape = tuple(one.batch_shape + one.event_shape)
    # the second plate is unknown to the law: copies must be independent, not repeated
    m = Model(Plate("u"), Plate("c"), a=covariate(plates="u"), x=observed(law_of, plates=("u", "c"), dims=tuple(f"d{i}" for i in range(len(shape)))))
    (v,) = m.of_kind("observed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        got = batched.draw(v, {"a": (units, (0,))}, (3, copies), shape).double()
        for u, a in enumerate(units):
            want = law_of(a).sample((6000,)).double()
            spread = want.std(0) + 1e-6
            assert ((got[u].mean(0) - want.mean(0)).abs() <= 5.5 * spread * (1 / copies + 1 / 6000) ** 0.5).all()
            assert ((got[u].std(0) + 1e-6) / spread - 1).abs().max() < 0.25


@pytest.mark.parametrize("name", sorted(set(LAWS) - OPAQUE))
def test_common_laws_take_the_fast_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> torch.Tensor:
        pytest.fail("sampled unit by unit")

    monkeypatch.setattr(batched, "_one_by_one", slow)
    one = LAWS[name](torch.tensor(1.0))
    m = Model(
        Plate("u"), a=covariate(plates="u"), x=observed(LAWS[name], plates="u", dims=tuple(f"d{i}" for i in range(len(one.batch_shape + one.event_shape))))
    )
    assert batched.draw(m.variables["x"], {"a": (torch.ones(4), (0,))}, (4,), tuple(one.batch_shape + one.event_shape)).shape[0] == 4


def test_law_that_branches_on_a_value_is_drawn_unit_by_unit() -> None:
    m = Model(Plate("g"), a=covariate(plates="g"), x=observed(lambda a: Normal(5.0, 1e-6) if a > 0 else Gamma(1e6, 1e6), plates="g"))
    given = xr.Dataset({"a": ("g", np.array([-1.0, 1.0, 1.0]))})
    np.testing.assert_allclose(m.sample(given=given)["x"], [1.0, 5.0, 5.0], atol=0.01)


def test_seed_decides_and_global_state_is_untouched() -> None:
    torch.manual_seed(7)
    before, validate = torch.get_rng_state(), Distribution._validate_args
    first = deep.sample(DEEP, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert Distribution._validate_args == validate
    torch.manual_seed(8)
    xr.testing.assert_identical(first, deep.sample(DEEP, seed=1))
    assert (first["st"].values != deep.sample(DEEP, seed=2)["st"].values).all()


def test_fixed_latents_are_taken() -> None:
    first = radon.sample({"county": 5, "house": 20}, seed=1)
    again = radon.sample(given=first, fixed=first, seed=2)
    xr.testing.assert_equal(first["alpha"], again["alpha"])
    np.testing.assert_allclose(first["log_radon"], again["log_radon"], atol=1e-6)


@pytest.mark.parametrize("chunks", [None, {"rating": 5}, {"student": 3, "rating": 4, "item": 2, "lecturer": 2}])
@pytest.mark.parametrize("block", [1 << 19, 16])
def test_out_of_core_numbers_are_those_in_memory_whatever_the_chunks(chunks: dict | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, block)
    monkeypatch.setattr(sinks, "_RESIDENT", 0)  # parents come back from the store
    monkeypatch.setattr(generate, "_WINDOW", 1)  # gathered rows are read one by one
    want = deep.sample(DEEP, seed=5)
    root = simulate(deep, DEEP, tmp_path / "c.zarr", seed=5, chunks=chunks, dtype="float64")
    truth = xr.open_zarr(tmp_path / "c.zarr", group="truth", chunks=None)
    assert set(root) == {"y", "z", "student_school", "rating_student", "rating_lecturer"}
    assert set(truth) == {v.name for v in deep.latents}
    for name, array in {**root, **truth}.items():
        xr.testing.assert_equal(array, want[name])
    assert root["rating_lecturer"].attrs["instance_dimension"] == "lecturer"


def test_store_is_zarr_v3_with_checksums_and_says_when_complete(tmp_path: Path) -> None:
    given = xr.Dataset({"floor": ("house", np.arange(30.0) % 2)}, coords={"county": list("abcdef"), "house": np.arange(100, 130)})
    root = simulate(radon, {"county": 6, "house": 30}, tmp_path / "c.zarr", given=given, chunks={"house": 7})
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    assert group.attrs["pavi_simulation"]["complete"] is True
    for array in (group["log_radon"], group["house_county"], group["truth/alpha"]):
        assert "crc32c" in [c.to_dict()["name"] for c in array.metadata.codecs]
    assert group["log_radon"].chunks == (7,)
    assert root["log_radon"].dtype == np.float32
    assert list(root["county"].values) == list("abcdef")
    assert not root["log_radon"].variable._in_memory
    chunk = tmp_path / "c.zarr" / "log_radon" / "c" / "1"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="checksum"):
        root["log_radon"].values  # noqa: B018


def test_existing_store_is_kept_unless_asked_or_unfinished(tmp_path: Path) -> None:
    sizes = {"county": 6, "house": 30}
    simulate(radon, sizes, tmp_path / "c.zarr", seed=1)
    with pytest.raises(InputError, match="already holds data"):
        simulate(radon, sizes, tmp_path / "c.zarr", seed=2)
    group = zarr.open_group(tmp_path / "c.zarr", mode="r+")
    group.attrs["pavi_simulation"] = {**group.attrs["pavi_simulation"], "complete": False}
    second = simulate(radon, sizes, tmp_path / "c.zarr", seed=2)
    xr.testing.assert_equal(second["log_radon"].load(), simulate(radon, sizes, str(tmp_path / "c.zarr"), seed=2, overwrite=True)["log_radon"])


def test_simulate_to_a_url() -> None:
    ds = simulate(radon, {"county": 3, "house": 9}, "memory://simulated/c.zarr")
    assert np.isfinite(ds["log_radon"].values).all()


def test_indices_drawn_in_blocks_are_balanced_and_a_permutation() -> None:
    for n in (1, 2, 7, 100, 1000):
        images = generate.shuffled(np.arange(n), n, key=99)
        assert sorted(images) == list(range(n))
        np.testing.assert_array_equal(generate.shuffled(np.arange(n)[n // 2 :], n, key=99), images[n // 2 :])
    assert abs(np.corrcoef(np.arange(1000), images)[0, 1]) < 0.15


PEAK = """
    import resource, sys
    from torch.distributions import Normal
    from pavi_scale.model import Model, latent, observed
    from pavi_scale.model.simulate.cohort import simulate
    from pavi_scale.plates import Plate
    m = Model(Plate("s"), Plate("v"), a=latent(lambda: Normal(0., 1.), plates=("s", "v"), dims="d"),
        x=observed(lambda a: Normal(a, 1.), plates=("s", "v"), dims="d"), sizes={"d": 16})
    simulate(m, {"s": 2, "v": 1000}, sys.argv[1] + "/warm.zarr")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    simulate(m, {"s": int(sys.argv[2]), "v": 100_000}, sys.argv[1] + "/c.zarr")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_cardinality(tmp_path: Path) -> None:
    """40 x 100,000 x 16 floats are 256 MB a variable, two variables; a few chunks of 16 MiB must do."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path), "40"], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 160


@pytest.mark.parametrize(
    ("sizes", "given", "message"),
    [
        ({"county": 3}, None, "plate has no size.*'house'"),
        ({"county": 3, "house": 9, "town": 1}, None, "unknown plate.*'town'"),
        ({"county": 3, "house": 0}, None, "positive integer"),
        ({"county": 3, "house": 2.5}, None, "positive integer"),
        ({"county": 3, "house": 8}, xr.Dataset({"floor": ("house", np.zeros(9))}), "contradict"),
        ({"county": 3, "house": 2}, xr.Dataset({"floor": ("flat", np.zeros(2))}), "wrong dimensions"),
        ({"county": 3}, xr.Dataset({"i": ("house", [0, 5], {"instance_dimension": "county"})}), "out of range"),
        ({"county": 3}, xr.Dataset({"i": ("house", [0.0, 1.0], {"instance_dimension": "county"})}), "not integer"),
        ({"county": 3, "house": 2}, {"floor": 1}, "must be an xarray.Dataset"),
    ],
)
def test_bad_input_is_refused_before_any_draw(sizes: dict, given: xr.Dataset | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        radon.sample(sizes, given)


def test_bad_laws_are_refused() -> None:
    def make(law: object, dims: tuple[str, ...] = ()) -> Model:
        return Model(Plate("g"), a=latent(lambda: Normal(0.0, 1.0), plates="g"), x=observed(law, plates="g", dims=dims))

    with pytest.raises(ModelError, match="has no size.*'d'"):
        make(lambda a: Normal(a, 1.0), ("d",)).sample({"g": 3})
    with pytest.raises(ModelError, match="wrong shape"):
        make(lambda a: Normal(a * torch.ones(2), 1.0)).sample({"g": 3})
    with pytest.raises(ModelError, match="does not return a distribution"):
        make(lambda a: a).sample({"g": 3})
    with pytest.raises(ModelError, match="fails on one ground unit.*KeyError"):
        make(lambda a: Normal({}["b"], 1.0)).sample({"g": 3})
    with pytest.raises(NumericalError, match=r"not finite.*'x' at \{'g': 0\}"):
        make(lambda a: Normal(a / 0.0, 1.0)).sample({"g": 3})
    with pytest.raises(InputError, match="unknown dimension"):
        simulate(radon, {"county": 3, "house": 9}, "memory://never.zarr", chunks={"hous": 3})
