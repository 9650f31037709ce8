"""Cohorts over S3, against a real HTTP server on loopback."""

import pickle
from urllib.parse import urlsplit

import boto3
import numpy as np
import pytest
import xarray as xr
from moto.server import ThreadedMotoServer
from torch.distributions import Normal

from pavi_scale.cohort import open_cohort
from pavi_scale.errors import CohortError
from pavi_scale.model import Model, latent, observed
from pavi_scale.plates import Plate

URL = "s3://cohorts/study/radon.zarr"
KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}


def model():
    return Model(
        Plate("county"),
        Plate("house", within="county"),
        alpha=latent(lambda: Normal(0.0, 1.0), plates="county"),
        y=observed(lambda alpha: Normal(alpha, 1.0), plates="house"),
    )


def data():
    rng = np.random.default_rng(0)
    index = xr.Variable("house", rng.integers(0, 5, 90), {"instance_dimension": "county"})
    return xr.Dataset({"y": ("house", rng.normal(size=90)), "house_county": index}, coords={"county": list("abcde")})


@pytest.fixture(scope="module")
def options():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint, **KEYS).create_bucket(Bucket="cohorts")
    options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"}}
    data().to_zarr(URL, storage_options=options, zarr_format=3, encoding={"y": {"chunks": (20,)}})
    yield options
    server.stop()


@pytest.fixture
def bucket(options):
    return boto3.resource("s3", endpoint_url=options["client_kwargs"]["endpoint_url"], **KEYS).Bucket("cohorts")


def test_cohort_over_http(options):
    cohort = open_cohort(URL, model(), storage_options=options)
    cohort.check_values()
    assert cohort.source == URL
    assert cohort.chunk("house") == 20
    for wanted in (np.arange(90), np.arange(13, 57), np.array([0, 19, 20, 77, 89])):
        np.testing.assert_array_equal(cohort.read("y", {"house": wanted}), data()["y"].values[wanted])
    np.testing.assert_array_equal(cohort.layout.index["house", "county"], data()["house_county"].values)
    assert cohort.coordinate("county").tolist() == list("abcde")


def test_spec_carries_the_options(options):
    spec = pickle.loads(pickle.dumps(open_cohort(URL, model(), storage_options=options).spec()))
    np.testing.assert_array_equal(spec.open(model()).read("y"), data()["y"].values)


@pytest.mark.parametrize("url", ["s3://cohorts/study/nothing.zarr", "s3://no-such-bucket/radon.zarr"])
def test_missing_store(options, url):
    with pytest.raises(CohortError, match=f"cohort store cannot be read; where: cohort '{url}'"):
        open_cohort(url, model(), storage_options=options)


def test_server_that_is_down():
    options = {"key": "testing", "secret": "testing"}
    options |= {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}, "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2}}
    with pytest.raises(CohortError, match="cohort store cannot be read"):
        open_cohort(URL, model(), storage_options=options)


def test_lost_object(options, bucket):
    data().to_zarr("s3://cohorts/lost.zarr", storage_options=options, zarr_format=3, encoding={"y": {"chunks": (20,)}})
    bucket.Object("lost.zarr/y/c/2").delete()
    with pytest.raises(CohortError, match=r"chunk is missing.*'y', house\[40:60\]"):
        open_cohort("s3://cohorts/lost.zarr", model(), storage_options=options).check_values()


def test_damaged_object(options, bucket):
    data().to_zarr("s3://cohorts/torn.zarr", storage_options=options, zarr_format=3, encoding={"y": {"chunks": (20,)}})
    bucket.Object("torn.zarr/y/c/4").put(Body=b"torn")
    with pytest.raises(CohortError, match="cohort data cannot be read; where: .*'y'"):
        open_cohort("s3://cohorts/torn.zarr", model(), storage_options=options).check_values()


def test_the_server_listens_on_loopback_only(options):
    assert urlsplit(options["client_kwargs"]["endpoint_url"]).hostname == "127.0.0.1"
