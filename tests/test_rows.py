"""Free rows: scores and curvatures against closed forms, sites against exact posteriors, coverage on a simulated cohort, and what the status says."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, HalfNormal, Normal, Poisson

import pavi_scale as ps
from pavi_scale import miniature, rows, searching, study, upper
from pavi_scale.batching import ROWS, spread_out
from pavi_scale.cohort import open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.diagnosing import status_of
from pavi_scale.errors import InputError, NumericalError, RunError
from pavi_scale.rows import Rows
from pavi_scale.run import Run
from pavi_scale.scores import summed
from pavi_scale.server.local import LocalEngine
from pavi_scale.sites import residual
from pavi_scale.starts import start_points
from pavi_scale.training import Trainer
from pipelines.hcp import make_cohort
from pipelines.hcp import model as cortical


def free(monkeypatch, *plates):
    """Let these blocks have free rows, whatever the size of the study."""
    chosen = frozenset(frozenset({p}) for p in plates)
    monkeypatch.setattr(study, "choose_free", lambda *_, **__: chosen)


def groups(count=60, seed=0):
    """Normal groups of unequal size; given the group effects, their data do not meet: diagonal sites are exact."""
    rng = np.random.default_rng(seed)
    group = np.sort(np.concatenate([np.arange(count), rng.integers(0, count, 9 * count)]))
    y = 2.0 + 0.8 * rng.normal(size=count)[group] + rng.normal(size=len(group))
    model = ps.Model(
        ps.Plate("group"), ps.Plate("obs", within="group"),
        mu=ps.latent(lambda: Normal(0.0, 5.0)), tau=ps.latent(lambda: HalfNormal(2.0)),
        theta=ps.latent(lambda mu, tau: Normal(mu, tau), plates="group"), y=ps.observed(lambda theta: Normal(theta, 1.0), plates="obs"),
    )
    return model, xr.Dataset({"y": ("obs", y), "of": ("obs", group, {"instance_dimension": "group"})})


def ratings(students=40, lecturers=8, count=400, seed=1):
    """A crossed table: the lecturers' marginal precision given the students integrated out is dense."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, students, count), rng.integers(0, lecturers, count)
    y = 1.0 + 0.8 * rng.normal(size=students)[a] + 0.6 * rng.normal(size=lecturers)[b] + rng.normal(size=count)
    model = ps.Model(
        ps.Plate("student"), ps.Plate("lecturer"), ps.Plate("rating", within=("student", "lecturer")),
        level=ps.latent(lambda: Normal(0.0, 5.0)), a=ps.latent(lambda: Normal(0.0, 0.8), plates="student"),
        b=ps.latent(lambda: Normal(0.0, 0.6), plates="lecturer"), y=ps.observed(lambda level, a, b: Normal(level + a + b, 1.0), plates="rating"),
    )
    index = {"s": ("rating", a, {"instance_dimension": "student"}), "l": ("rating", b, {"instance_dimension": "lecturer"})}
    return model, xr.Dataset({"y": ("rating", y), **index})


def test_a_plate_may_be_called_root(monkeypatch):
    model, data = ratings()
    renamed = {"student": "root", "lecturer": "lecturer"}
    again = ps.Model(
        ps.Plate("root"), ps.Plate("lecturer"), ps.Plate("rating", within=("root", "lecturer")),
        level=ps.latent(lambda: Normal(0.0, 5.0)), a=ps.latent(lambda: Normal(0.0, 0.8), plates="root"),
        b=ps.latent(lambda: Normal(0.0, 0.6), plates="lecturer"), y=ps.observed(lambda level, a, b: Normal(level + a + b, 1.0), plates="rating"),
    )
    other = data.assign({k: (v.dims, v.values, {"instance_dimension": renamed[v.attrs["instance_dimension"]]}) for k, v in data[["s", "l"]].items()})
    free(monkeypatch, "student")
    found = ps.fit(model, data, progress=False)
    free(monkeypatch, "root")
    same = ps.fit(again, other, progress=False)
    assert found.status == same.status
    for name in ("a", "b", "level"):
        for group in ("posterior_mean", "posterior_sd"):
            np.testing.assert_allclose(same.datatree[group][name], found.datatree[group][name], rtol=1e-6, err_msg=name)
    assert same.datatree["diagnostics"]["khat_root"].shape == ()


def trainer(model, data, seed=0):
    made = study.prepare(open_cohort(data, model), seed=seed)
    return Trainer(StudyComputation(made.graph, made.cohort, made.settings), LocalEngine(made.spec), seed, math.inf, lambda *_: None)


def test_schemes_that_rows_leave_room_for(monkeypatch):
    model, data = ratings()
    free(monkeypatch, "lecturer")
    cohort = open_cohort(data, model)
    made = study.prepare(cohort, encoding="hybrid").settings
    assert made.free == (("lecturer",),)
    assert made.schemes == {"student": "hybrid"}
    for scheme in ("encoder", {"lecturer": "hybrid"}, {"lecturer": "encoder"}):
        with pytest.raises(InputError, match=r"pool of data is not local; where: encoding of 'lecturer'"):
            study.prepare(cohort, encoding=scheme)
    with pytest.raises(RunError, match=r"cannot be extended.*rows of the fitted units"):
        ps.fit(model, data, encoding="hybrid", progress=False).extend(data)


def test_score_and_curvature_are_those_of_the_marginal_with_the_students_integrated_out(monkeypatch):
    model, data = ratings()
    free(monkeypatch, "lecturer")
    made = Rows(trainer(model, data))
    a, b = np.eye(40)[data["s"].values], np.eye(8)[data["l"].values]
    noise = np.linalg.inv(np.eye(400) + 0.64 * a @ a.T)  # precision of y given level and lecturers
    design = np.concatenate([np.ones((400, 1)), b], 1)
    hessian = design.T @ noise @ design
    sites = made.upper.initial(np.array([0.7]), {"lecturer": np.linspace(-1, 1, 8)[:, None]})
    centre = made.upper.centre(sites, np.array([0.7]))
    centre.loc["lecturer"], centre.sd["lecturer"], centre.root_sd[:] = np.linspace(-1, 1, 8)[:, None], np.full((8, 1), 0.1), 0.1
    found = [made.round(made.count, centre, step) for step in range(100, 160)]
    score = design.T @ noise @ (data["y"].values - design @ np.concatenate([[0.7], np.linspace(-1, 1, 8)]))
    np.testing.assert_allclose(found[0].root, score[:1], rtol=1e-3)
    np.testing.assert_allclose(found[0].score["lecturer"][:, 0], score[1:], rtol=1e-3, atol=0.02)
    curvature = np.mean([f.curvature["lecturer"][:, 0] for f in found], 0)
    error = np.std([f.curvature["lecturer"][:, 0] for f in found], 0) / math.sqrt(60) + 1e-3
    assert np.abs((curvature - np.diagonal(hessian)[1:]) / error).max() < 4
    assert np.abs((curvature - b.sum(0)) / error).max() > 8  # the students known, not integrated out: the test would see it


def test_rows_of_separate_groups_give_the_exact_posterior(monkeypatch):
    model, data = groups()
    exact = ps.fit(model, data, progress=False)
    free(monkeypatch, "group")
    monkeypatch.setattr(miniature, "FIRST", 30)  # so that selections grow
    monkeypatch.setattr(miniature, "EACH", 0)
    found = ps.fit(model, data, progress=False)
    assert (exact.status, found.status) == ("ok", "ok")
    assert set(found.datatree["fit"]["stage"].values) == {"start", "sites", "pass", "refit"}
    for name in ("theta", "mu", "tau"):
        mean, sd = (np.asarray(exact.datatree[g][name]) for g in ("posterior_mean", "posterior_sd"))
        shift = (np.asarray(found.datatree["posterior_mean"][name]) - mean) / sd
        ratio = np.asarray(found.datatree["posterior_sd"][name]) / sd
        # the root is a normal approximation in log tau about its mode
        assert np.abs(shift).max() < {"tau": 0.15, "theta": 0.05, "mu": 0.02}[name], name
        assert np.abs(np.log(ratio)).max() < 0.06, name


def test_couplings_that_rows_lose_are_told(monkeypatch):
    model, data = ratings()
    assert ps.fit(model, data, progress=False).status == "ok"
    free(monkeypatch, "lecturer")
    found = ps.fit(model, data, progress=False)
    assert found.status in ("unreliable", "unconverged")
    facts = {"converged": True, "trace": [["pass", 0.0]]}
    assert [status_of({**facts, "lost": x}, [], None) for x in (0.1, 0.9)] == ["ok", "unreliable"]


def test_an_alarm_on_a_part_is_looked_into_on_the_whole(tmp_path, monkeypatch):
    path = str(tmp_path / "c.zarr")
    make_cohort(path, subjects=16, vertices=480, features=16, seed=2)
    monkeypatch.setattr(miniature, "FIRST", 60 * 32)
    monkeypatch.setattr(miniature, "EACH", 0)
    monkeypatch.setattr(rows, "CELLS", 16)
    made, seen = Rows(trainer(cortical, xr.open_zarr(path, consolidated=False).load())), {}
    assert made.sizes == [60, 480]
    look = made.coupling

    def told(sites, centre, size):
        seen[size] = look(sites, centre, size)
        return seen[size]

    monkeypatch.setattr(made, "coupling", told)
    fitted = made.fit(lambda *_: None)
    assert seen[60] > rows.LOST > seen[480] == pytest.approx(fitted.lost, abs=1e-6)


def test_a_site_out_of_place_leaves_a_residual(monkeypatch):
    model, data = groups()
    free(monkeypatch, "group")
    made = Rows(trainer(model, data))
    taken = {}
    made.fit(lambda state, step: taken.update(state=state, step=step))
    sites = rows.Sites.of(taken["state"])
    root = taken["state"]["root/loc"]
    for moved, least, most in ((0.0, 0.0, 0.02), (0.5, 0.3, 0.6)):
        sites.loc["group"] = sites.loc["group"] + moved / np.sqrt(sites.precision["group"])
        centre = made.upper.solve(sites, root)
        left = residual(sites, centre, made.round(made.count, centre, 99))
        assert least <= left.typical <= most


def test_a_fit_goes_on_from_any_checkpoint_as_if_never_stopped(monkeypatch):
    model, data = groups()
    free(monkeypatch, "group")
    monkeypatch.setattr(miniature, "FIRST", 30)
    kept = []
    whole = Rows(trainer(model, data)).fit(lambda state, step: kept.append(({k: v.copy() for k, v in state.items()}, step)))
    for state in (kept[0], kept[-2]):
        again = Rows(trainer(model, data)).fit(lambda *_: None, state)
        assert {k: v.tobytes() for k, v in again.state.items()} == {k: v.tobytes() for k, v in whole.state.items()}


def test_intervals_of_a_small_cortical_study_hold_the_truth(tmp_path):
    path = str(tmp_path / "c.zarr")
    make_cohort(path, subjects=8, vertices=600, features=16, seed=4)
    truth = xr.open_zarr(path, group="truth", consolidated=False).load()
    found = ps.fit(cortical, path, progress=False)
    assert found.status == "ok"
    mean, sd = found.datatree["posterior_mean"], found.datatree["posterior_sd"]
    order = np.corrcoef(mean["mu"].values, truth["mu"].values)[:7, 7:].argmax(1)
    assert sorted(order) == list(range(7))
    held = {}
    for name, axis in (("mu", 0), ("mu_subject", 1), ("mu_session", 2)):
        z = (mean[name].values - truth[name].values.take(order, axis)) / sd[name].values
        assert np.corrcoef(mean[name].values.ravel(), truth[name].values.take(order, axis).ravel())[0, 1] > 0.98
        held[name] = [(np.abs(z) < x).mean() for x in (0.6745, 1.645)]
        wrong = (np.abs(z) < 0.5 * 1.645).mean()
    for name, tolerance in (("mu", 0.1), ("mu_subject", 0.05), ("mu_session", 0.04)):
        np.testing.assert_allclose(held[name], (0.5, 0.9), atol=tolerance, err_msg=name)
    assert wrong < 0.75  # intervals of half the width would be seen
    correct = (order[mean["label_logits"].values.argmax(-1)] == truth["label_logits"].values.argmax(-1)).mean()
    assert correct > 0.6


def test_roots_that_are_gaussian_given_the_others_join_their_component(monkeypatch):
    model, data = groups()
    free(monkeypatch, "group")
    made = Rows(trainer(model, data)).upper
    assert made.joined == ["mu"]
    assert len(made.rest) == made.space.dim - 1
    monkeypatch.setattr(upper, "with_roots", lambda component, *_: component)
    apart = Rows(trainer(model, data)).upper
    assert apart.joined == []
    start = made.initial(np.zeros(made.space.dim), {"group": np.linspace(-2, 3, 60)[:, None]})
    start.precision["group"] += 3.0
    # The marginal of the others with mu integrated out, against a fine grid over mu of the bound in which it is not.
    at = made.space.names.index("mu")
    point = np.full(made.space.dim, -0.3)
    grid = np.linspace(-6, 6, 4001)
    points = np.repeat(point[None], len(grid), 0)
    points[:, at] = grid
    values = apart.value(start, points)
    integral = np.logaddexp.reduce(values) + np.log(grid[1] - grid[0])
    assert made.bound(start, point[None])[0][0] == pytest.approx(integral, abs=1e-6)
    assert made.value(start, point[None])[0] == pytest.approx(integral, abs=1e-6)
    mean, sd = made.complete(start, point[None], each=True)
    weight = np.exp(values - values.max())
    weight /= weight.sum()
    assert mean[0, at] == pytest.approx(weight @ grid, abs=1e-6)
    assert sd[0, at] == pytest.approx(np.sqrt(weight @ (grid - weight @ grid) ** 2), rel=1e-5)


def test_a_large_cohort_is_searched_in_miniature(tmp_path, monkeypatch):
    store = str(tmp_path / "cohort.zarr")
    make_cohort(store, subjects=40, vertices=300, seed=5)
    made = study.prepare(open_cohort(store, cortical), seed=5)
    whole = StudyComputation(made.graph, made.cohort, made.settings)
    assert miniature.few_units(whole, 0) is None  # not large
    monkeypatch.setattr(miniature, "LARGE", 6000)
    monkeypatch.setattr(miniature, "SMALL", 5000)
    part = miniature.miniature(whole, miniature.few_units(whole, 0))
    assert part.layout.cardinality["session"] * part.layout.cardinality["subject"] * 224 <= 5000
    assert part.layout.cardinality["vertex"] == 300  # as many as the rows of few subjects need
    x = xr.open_zarr(store, consolidated=False)["x"].values
    rows_of = part.cohort.read("x").reshape(-1, 32)
    assert {r.tobytes() for r in rows_of} <= {r.tobytes() for r in x.reshape(-1, 32)}
    posterior = ps.fit(cortical, store, progress=False, seed=5)
    truth, mean = xr.open_zarr(store, group="truth", consolidated=False), posterior.datatree["posterior_mean"]
    order = np.abs(np.corrcoef(truth["mu"].values, mean["mu"].values)[:7, 7:]).argmax(1)
    assert sorted(order) == list(range(7))
    assert np.corrcoef(truth["mu_session"].values.ravel(), mean["mu_session"].values[:, :, order].ravel())[0, 1] > 0.99


class Several(LocalEngine):
    """An engine that has workers to share among, as far as the driver sees."""

    processes = 2

    def submit(self, kind, state, tasks):
        self.asked = [*getattr(self, "asked", []), (kind, len(tasks))]
        # Over the wire and back: nothing is shared by reference.
        return super().submit(kind, pickle.loads(pickle.dumps(state)), pickle.loads(pickle.dumps(tasks)))

    def stream(self, kind, state, tasks):
        return iter(self.submit(kind, state, tasks))


def test_shared_starts_lead_to_the_same_bits(tmp_path, monkeypatch):
    store = str(tmp_path / "cohort.zarr")
    make_cohort(store, subjects=40, vertices=300, seed=5)
    monkeypatch.setattr(miniature, "LARGE", 6000)
    monkeypatch.setattr(miniature, "SMALL", 5000)
    made = study.prepare(open_cohort(store, cortical), seed=5)
    found = []
    for kind in (LocalEngine, Several):
        computation = StudyComputation(made.graph, made.cohort, made.settings)
        with kind(made.spec) as engine:
            told = Trainer(computation, engine, 5, math.inf, lambda *_: None)
            sites, root = searching.begin(Rows(told))
            found.append((sites.arrays(), root, told.trace))
    (alone, root, trace), (shared, same_root, same_trace) = found
    assert ("search", 2) in engine.asked
    assert sum(n for k, n in engine.asked if k == "fetch") > 0
    assert trace == same_trace
    assert len(trace) > 9
    np.testing.assert_array_equal(root, same_root)
    assert {k: v.tobytes() for k, v in alone.items()} == {k: v.tobytes() for k, v in shared.items()}


def test_a_start_that_leads_nowhere_is_left_out(tmp_path, monkeypatch):
    path = str(tmp_path / "cohort.zarr")
    make_cohort(path, subjects=6, vertices=60, seed=5)
    made = study.prepare(open_cohort(path, cortical), seed=5)
    computation, real, bad = StudyComputation(made.graph, made.cohort, made.settings), Rows.follow, {1000}

    def follow(self, sites, centre, rounds, step, spread=1.0):
        if step in bad:
            raise NumericalError("not finite")
        return real(self, sites, centre, rounds, step, spread)

    monkeypatch.setattr(Rows, "follow", follow)
    with Several(made.spec) as engine:
        told = Trainer(computation, engine, 5, math.inf, lambda *_: None)
        rows = Rows(told, least=1)
        starts = start_points(computation, rows.draws, 5)[:2]
        here = rows.follow_each(starts)

        def asked():
            answers, left = searching.send(engine, computation, rows.draws, 5, starts)
            assert left == []  # two workers, two starts
            return searching.received(answers.result(), told)

        there = asked()
        assert len(here) == len(there) == 1
        assert here[0].value == there[0].value
        bad.add(2000)
        assert asked() == []
        with pytest.raises(NumericalError):
            rows.search(lambda starts: [])


@pytest.mark.parametrize(("count", "length", "chunk"), [(59_412, 232, 1024), (10, 3, 4), (1, 1, 1), (1000, 3, 3), (7, 7, 100)])
def test_selections_open_few_rows_of_chunks(count, length, chunk):
    order = spread_out(count, length, chunk, 5)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, spread_out(count, length, chunk, 5))
    for share in (4, 16):
        opened = len(np.unique(order[: count // share] // chunk))
        assert opened <= max(ROWS, ROWS * -(-(count // share) // (ROWS * chunk)))


def test_first_runs_lie_in_different_rows():
    order = spread_out(59_412, 232, 1024, 5)
    assert len(np.unique(order[: 15 * 205] // 1024)) >= 14


def test_the_log_says_what_was_read(tmp_path):
    """At least every value once; the share is that of all lanes' time."""
    model, data = groups()
    data.to_zarr(tmp_path / "cohort.zarr")
    ps.fit(model, tmp_path / "cohort.zarr", run=tmp_path / "run", progress=False)
    (told,) = [e for e in Run.open(tmp_path / "run").events() if e["event"] == "read"]
    assert told["bytes"] >= data["y"].nbytes
    assert told["bytes_of_chunks"] >= data["y"].nbytes
    assert 0.0 <= told["share_waited"] <= told["share_of_time"] < 1.0
    assert told["share_of_time"] > 0.0


def test_tables_come_back_as_the_rows_looked_at():
    rng = np.random.default_rng(5)
    some = [np.sort(rng.choice(20, size, replace=False)) for size in (3, 20, 8)]
    answers = [{"score/a": rng.normal(size=(len(at), 2)), "root": rng.normal(size=4), **({"at/a": at} if len(at) < 20 else {})} for at in some]
    expected = np.zeros((20, 2))
    for at, answer in zip(some, answers, strict=True):
        for row, value in zip(at, answer["score/a"], strict=True):
            expected[row] += value
    found = summed(iter(answers), {"a": 20})
    assert set(found) == {"score/a", "root"}
    np.testing.assert_array_equal(found["score/a"], expected)
    np.testing.assert_array_equal(found["root"], answers[0]["root"] + answers[1]["root"] + answers[2]["root"])


def test_a_worker_answers_with_the_rows_it_has_looked_at(tmp_path):
    path = str(tmp_path / "cohort.zarr")
    make_cohort(path, subjects=6, vertices=60, seed=5)
    made = study.prepare(open_cohort(path, cortical), seed=5)
    computation, asked = StudyComputation(made.graph, made.cohort, made.settings), []

    class Noting(LocalEngine):
        def stream(self, kind, state, tasks):
            for task, answer in zip(tasks, super().stream(kind, state, tasks), strict=True):
                asked.append((task["pieces"], answer))
                yield answer

    with Noting(made.spec) as engine:
        rows = Rows(Trainer(computation, engine, 5, math.inf, lambda *_: None))
        start = rows.draws[0]
        fresh = rows.rows_at(start, 0)
        rows.round(rows.count, replace(rows.upper.centre(rows.upper.initial(start, fresh), start), loc=fresh), 1)
    assert len(asked) > 1
    for pieces, answer in asked:
        mine = np.concatenate([np.arange(piece[1], piece[2]) for piece in pieces])
        np.testing.assert_array_equal(answer["at/vertex"], mine)  # population logits of the task's vertices
        assert answer["start/vertex"].shape == (len(mine), 7)
        assert answer["seen/vertex"].shape == (len(mine), 1)
        assert "at/subject*session" not in answer  # each vertex tells of all of them


@given(st.integers(1, 400))
def test_tasks_are_shorter_towards_the_end_of_a_round(count):
    parts = Rows.parts(None, list(range(count)))
    assert [piece for part in parts for piece in part] == list(range(count))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert len(parts) <= 12 * (1 + math.ceil(math.log2(max(count / 12, 1))))
    # Whoever is free takes the next one: the last worker ends a piece or two after the first, not a long task.
    for speeds in ([1.0, 1.0], [1.0, 0.6, 0.9]):
        free = [0.0] * len(speeds)
        for length in lengths:
            next_one = free.index(min(free))
            free[next_one] += length / speeds[next_one]
        assert max(free) <= count / sum(speeds) + 2 / min(speeds)

def crossed(law, wide=1.0, students=60, lecturers=25, count=1200, seed=2, level=0.5):
    """A crossed table under scales that are learned, their priors so many times as wide as the data."""
    rng = np.random.default_rng(seed)
    s, t = rng.integers(0, students, count), rng.integers(0, lecturers, count)
    eta = level + 0.8 * rng.normal(size=students)[s] + 0.6 * rng.normal(size=lecturers)[t]
    y = {Normal: eta + rng.normal(size=count), Poisson: rng.poisson(np.exp(eta)), Bernoulli: rng.random(count) < 1 / (1 + np.exp(-eta))}[law].astype(float)
    of = {Normal: lambda x: Normal(x, 1.0), Poisson: lambda x: Poisson(x.exp()), Bernoulli: lambda x: Bernoulli(logits=x)}[law]
    model = ps.Model(
        ps.Plate("student"), ps.Plate("lecturer"), ps.Plate("rating", within=("student", "lecturer")),
        level=ps.latent(lambda: Normal(0.0, 10 * wide)), sa=ps.latent(lambda: HalfNormal(wide)), sb=ps.latent(lambda: HalfNormal(wide)),
        a=ps.latent(lambda sa: Normal(0.0, sa), plates="student"), b=ps.latent(lambda sb: Normal(0.0, sb), plates="lecturer"),
        y=ps.observed(lambda level, a, b: of(level + a + b), plates="rating"),
    )  # fmt: skip
    index = {"s": ("rating", s, {"instance_dimension": "student"}), "l": ("rating", t, {"instance_dimension": "lecturer"})}
    return model, xr.Dataset({"y": ("rating", y), **index})


@pytest.mark.parametrize(("law", "wide", "level"), [(Normal, 100.0, 0.5), (Poisson, 1.0, 4.0), (Bernoulli, 1.0, 0.5)])
def test_rows_of_crossed_groups_are_where_the_exact_posterior_is(monkeypatch, law, wide, level):
    """Priors far wider than the data, many data in each unit, and laws that are not Gaussian: sites lose couplings, but none of their means."""
    model, data = crossed(law, wide, level=level)
    exact = ps.fit(model, data, progress=False).datatree
    free(monkeypatch, "lecturer")
    found = ps.fit(model, data, progress=False)
    assert found.status != "unconverged"
    for name in ("a", "b", "sa", "sb"):
        mean, sd = (np.asarray(exact[f"posterior_{of}"][name]) for of in ("mean", "sd"))
        away = np.asarray(found.datatree["posterior_mean"][name]) - mean
        assert np.abs(away - (away.mean() if away.ndim else 0.0)).max() < 0.4 * sd.max(), name  # the level is the student's, the lecturer's or of all


@pytest.mark.parametrize("law", [Poisson, Bernoulli])
def test_scores_are_the_slopes_of_the_bound_where_laws_are_not_gaussian(monkeypatch, law):
    model, data = crossed(law)
    free(monkeypatch, "lecturer")
    made = Rows(trainer(model, data))
    root = np.array([0.4, -0.3, -0.6])
    centre = made.upper.centre(made.upper.initial(root, {"lecturer": np.linspace(-1, 1, 25)[:, None]}), root)
    centre = replace(centre, loc={"lecturer": np.linspace(-1, 1, 25)[:, None]}, sd={"lecturer": np.full((25, 1), 1e-2)}, root_sd=1e-2 * (centre.root_sd > 0))
    score = made.round(made.count, centre, 7).root
    for i in np.flatnonzero(centre.root_sd):
        high, low = (made.round(made.count, replace(centre, root=root + 0.02 * s * np.eye(3)[i]), 8).value for s in (1, -1))
        assert score[i] == pytest.approx((high - low) / 0.04, rel=0.02, abs=0.5)


def test_rows_many_sds_from_their_prior_mean(monkeypatch):
    """The stored mean of a row is where its site is, however narrow."""
    model, data = groups()
    wide = ps.Model(
        *model.plates.values(), theta=ps.latent(lambda: Normal(0.0, 100.0), plates="group"), y=ps.observed(lambda theta: Normal(theta, 1.0), plates="obs")
    )
    data = data.assign(y=data["y"] + 5.0 * data["of"].values)
    free(monkeypatch, "group")
    assert trainer(wide, data).study.settings.structure["group"]["quadratic"]
    count, total = np.bincount(data["of"]), np.bincount(data["of"], data["y"])
    np.testing.assert_allclose(ps.fit(wide, data, progress=False).datatree["posterior_mean"]["theta"], total / (count + 1e-4), rtol=1e-4)
