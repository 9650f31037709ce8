"""Study files: what is read is what was written, whatever the order of keys and the way they are set."""

import contextlib
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pavi_scale.config import FitOptions, Study, load_cluster, load_study, override
from pavi_scale.errors import StudyError

words = st.text(max_size=5)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | words, lambda c: st.lists(c, max_size=3) | st.dictionaries(words, c, max_size=3), max_leaves=8
)
studies = st.dictionaries(st.sampled_from([*Study.model_fields, "x"]), plain).map(lambda d: yaml.safe_dump(d).encode())


@given(seed=st.integers(0, 2**40), memory=st.sampled_from(["4 GiB", 1000]), encoding=st.sampled_from(["auto", "free", {"a, b": "free", "a": "hybrid"}]))
def test_a_file_and_settings_say_the_same(tmp_path_factory, seed, memory, encoding):
    folder = tmp_path_factory.mktemp("study")
    base = {"model": "a:b", "cohort": "c", "run": "r"}
    (folder / "whole.yaml").write_text(yaml.safe_dump(base | {"fit": {"seed": seed, "memory": memory, "encoding": encoding}}))
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    told = [f"fit.{key}={json.dumps(value)}" for key, value in {"seed": seed, "memory": memory, "encoding": encoding}.items()]
    assert load_study(folder / "whole.yaml") == load_study(folder / "base.yaml", told)


def test_only_what_is_set_is_passed_on():
    assert FitOptions().arguments() == {}
    assert FitOptions(encoding={"subject, vertex": "free", "subject": "hybrid"}, seed=3).arguments() == {
        "encoding": {("subject", "vertex"): "free", "subject": "hybrid"},
        "seed": 3,
    }


def test_cluster_option_replaces_the_study_s(tmp_path):
    (tmp_path / "s.yaml").write_text("{model: 'a:b', cohort: c, run: r, cluster: one.yaml}")
    assert load_study(tmp_path / "s.yaml").cluster == "one.yaml"
    assert load_study(tmp_path / "s.yaml", cluster="two.yaml").cluster == "two.yaml"


def test_override_leaves_the_original_alone():
    document = {"fit": {"seed": 0}}
    assert override(document, ["fit.seed=1", "fit.memory=2 GiB", "cluster=null"]) == {"fit": {"seed": 1, "memory": "2 GiB"}, "cluster": None}
    assert document == {"fit": {"seed": 0}}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | studies)
def test_any_file_gives_a_study_or_a_typed_error(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    for load in (load_study, load_cluster):
        with contextlib.suppress(StudyError):
            load(path)


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"#" * (3 << 20))
    with pytest.raises(StudyError, match="too large"):
        load_study(tmp_path / "s.yaml")


@pytest.mark.parametrize("name", ["radon", "sleepstudy", "math_achieve", "eight_schools", "fertility", "gre", "gm", "nc", "hcp"])
def test_studies_of_the_repository_are_valid(root, name):
    study = load_study(root / "pipelines" / f"{name}.yaml")
    assert study.model == f"pipelines.{name}:model"


def test_cluster_of_the_repository_is_valid(root):
    assert load_cluster(root / "cluster" / "local.yaml").workers == 2
