"""What may be given as a client, which models travel, and fits beside each other in threads of one process."""

import asyncio
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps
from pavi_scale.errors import InputError

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")]
GROUPS = 12


def make_model(law=lambda mu, sigma: Normal(mu, sigma)):
    return ps.Model(
        ps.Plate("group"), ps.Plate("obs", within="group"),
        mu=ps.latent(lambda: Normal(0.0, 10.0)), sigma=ps.latent(lambda: HalfNormal(1.0)), noise=ps.latent(lambda: HalfNormal(1.0)),
        theta=ps.latent(law, plates="group"),
        x=ps.observed(lambda theta, noise: Normal(theta, noise), plates="obs"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cohort():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(GROUPS), 5)
    x = rng.normal(rng.normal(1.0, 0.5, GROUPS)[group], 0.7)
    return xr.Dataset({"x": ("obs", x), "obs_group": ("obs", group, {"instance_dimension": "group"})})


@pytest.fixture(scope="module")
def threads():
    """A cluster whose workers are threads of this process, and its client."""
    with LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        yield cluster, client


def test_workers_in_one_process_and_fits_at_the_same_time_change_no_bit(threads, cohort, tmp_path, tools):
    model = make_model()

    def fit(name, seed, client):
        ps.fit(model, cohort, run=tmp_path / name, seed=seed, client=client, progress=False)
        return tools.digest(tmp_path / name)

    expected = [fit(f"alone {seed}", seed, None) for seed in range(2)]
    assert expected[0] != expected[1], "the digest sees nothing"
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(fit, f"together {seed} {client is None}", seed, client) for client in (threads[1], None) for seed in range(2)]
        assert [f.result(120) for f in found] == expected * 2


def test_what_is_no_client_is_refused(threads, cohort, tmp_path):
    cluster, client = threads
    with Client(cluster, set_as_default=False) as closed:
        pass

    async def fit_asynchronously():
        async with Client(cluster.scheduler_address, asynchronous=True, set_as_default=False) as other:
            ps.fit(make_model(), cohort, run=tmp_path / "run", client=other, progress=False)

    for other, words in [(cluster, "LocalCluster"), (cluster.scheduler_address, "inproc"), (client.get_executor(), "Executor"), (closed, "closed")]:
        with pytest.raises(InputError, match="the client cannot be used") as caught:
            ps.fit(make_model(), cohort, run=tmp_path / "run", client=other, progress=False)
        assert words in caught.value.got
    with pytest.raises(InputError, match="an asynchronous one"):
        asyncio.run(fit_asynchronously())
    assert not (tmp_path / "run").exists(), "a run was begun"


def test_a_law_that_cannot_be_pickled(threads, cohort, tmp_path):
    lock = threading.Lock()

    def law(mu, sigma):
        with lock:
            return Normal(mu, sigma)

    with pytest.raises(InputError, match=r"cannot be sent to workers.*lock"):
        ps.fit(make_model(law), cohort, run=tmp_path / "run", client=threads[1], progress=False)


def test_a_model_whose_module_the_workers_lack(cohort, tmp_path):
    # Functions that have a name travel by it: in a worker process there is no such module.
    module = types.ModuleType("known_to_the_driver_alone")
    exec("from torch.distributions import Normal\ndef law(mu, sigma): return Normal(mu, sigma)", vars(module))
    sys.modules[module.__name__] = module
    try:
        with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster, Client(cluster, set_as_default=False) as client:
            with pytest.raises(InputError, match="a worker cannot load the model") as caught:
                ps.fit(make_model(module.law), cohort, run=tmp_path / "run", client=client, progress=False)
            assert module.__name__ in caught.value.got
            assert str(client.run(lambda: None)) == str({caught.value.where: None})
    finally:
        del sys.modules[module.__name__]
