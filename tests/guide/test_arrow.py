"""Elimination of one of several crossed blocks, against one dense Gaussian of all of them."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, HalfNormal, MultivariateNormal, Normal

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.guide import arrow, fronts
from pavi_scale.guide.arrow import factorise_arrow
from pavi_scale.guide.blocks import DENSE_LIMIT, choose_free, dense_rest, make_blocks, make_components
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.fronts import Coupling, make_pattern
from pavi_scale.guide.local import draw, fit_core
from pavi_scale.moments import conditional_moments
from pavi_scale.study import prepare
from tests.guide import oracle

K, C = 2, 2
# Block -> (n, e); the largest is in the middle, so that couplings are stored both ways round.
SIZES = {"a": (4, 1), "b": (30, 2), "c": (5, 3)}


def _terms(generator, many):
    """Couplings of a and b, of b and c, of a and c: some pairs more than once, one unit of b with next to all of a and c, one with none."""
    out = []
    for x, y in (("b", "a"), ("b", "c"), ("c", "a")):
        at = [torch.randint(0, SIZES[block][0] - 1, (many,), generator=generator) for block in (x, y)]
        if x == "b":
            at[0][:12] = 3
        value = 0.2 * torch.randn(K, many, C, SIZES[x][1], SIZES[y][1], generator=generator)
        out.append(Coupling((x, y), (at[0], at[1]), value.requires_grad_()))
    return out


def _problem(seed=0, many=60):
    generator = torch.Generator().manual_seed(seed)
    couplings = _terms(generator, many)
    precision, gradient = {}, {}
    for b, (n, e) in SIZES.items():
        root = torch.randn(K, n, C, e, e, generator=generator)
        precision[b, b] = (root @ root.mT + 25.0 * torch.eye(e)).requires_grad_()
        gradient[b] = torch.randn(K, n, C, e, generator=generator).requires_grad_()
    return precision, couplings, gradient


def _dense(precision, couplings, gradient):
    """The whole precision `[K, C, T, T]` and gradient `[K, C, T]`, entry by entry."""
    starts = dict(zip(SIZES, np.cumsum([0, *(n * e for n, e in SIZES.values())]), strict=False))
    total = sum(n * e for n, e in SIZES.values())
    h = torch.zeros(K, C, total, total)
    for b, (n, e) in SIZES.items():
        for i in range(n):
            at = slice(starts[b] + i * e, starts[b] + (i + 1) * e)
            h[:, :, at, at] = h[:, :, at, at] + precision[b, b][:, i]
    for found in couplings:
        (a, b), (at_a, at_b) = found.pair, found.at
        for f in range(len(at_a)):
            rows, columns = (slice(starts[x] + int(i[f]) * SIZES[x][1], starts[x] + (int(i[f]) + 1) * SIZES[x][1]) for x, i in ((a, at_a), (b, at_b)))
            h[:, :, rows, columns] = h[:, :, rows, columns] + found.value[:, f]
            h[:, :, columns, rows] = h[:, :, columns, rows] + found.value[:, f].mT
    return h, torch.cat([gradient[b].transpose(1, 2).flatten(2) for b in SIZES], -1)


def _flat(values):
    return torch.cat([values[b].transpose(1, 2).flatten(2) for b in SIZES], -1)


@pytest.fixture(params=["fronts", "full", "slabs"])
def ways(request, monkeypatch):
    """All units in fronts of their own columns; all over all columns; and a few numbers at a time."""
    monkeypatch.setattr(fronts, "FULL", {"fronts": 0, "full": 1000, "slabs": 4}[request.param])
    if request.param == "slabs":
        monkeypatch.setattr(fronts, "SLAB", 64)
        monkeypatch.setattr(arrow, "SLAB", 64)


@pytest.mark.usefixtures("ways")
def test_step_and_determinant_are_those_of_the_dense_gaussian():
    precision, couplings, gradient = _problem()
    pattern = make_pattern(SIZES, couplings)
    assert pattern.head == "b"
    assert pattern.total == 4 + 15
    found = factorise_arrow(pattern, precision, couplings, gradient)
    h, g = _dense(precision, couplings, gradient)
    torch.testing.assert_close(_flat(found.step), torch.linalg.solve(h, g[..., None])[..., 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.log_det(), 0.5 * torch.logdet(h).sum(1), rtol=1e-12, atol=1e-10)
    assert not bool(found.lost.any())
    # Power: a coupling that elimination did not see would show.
    with torch.no_grad():
        couplings[0].value[:, 0] = 0.0
    less = factorise_arrow(make_pattern(SIZES, couplings), precision, couplings, gradient)
    assert float((less.log_det() - found.log_det()).detach().abs().min()) > 1e-6


@pytest.mark.usefixtures("ways")
def test_derivatives_are_those_of_the_dense_gaussian():
    precision, couplings, gradient = _problem(1)
    inputs = [*precision.values(), *(c.value for c in couplings), *gradient.values()]
    found = factorise_arrow(make_pattern(SIZES, couplings), precision, couplings, gradient)
    h, g = _dense(precision, couplings, gradient)
    probe = torch.randn(_flat(found.step).shape, generator=torch.Generator().manual_seed(5))
    own = torch.autograd.grad(found.log_det().sum() + (probe * _flat(found.step)).sum(), inputs)
    other = torch.autograd.grad(0.5 * torch.logdet(h).sum() + (probe * torch.linalg.solve(h, g[..., None])[..., 0]).sum(), inputs)
    for mine, theirs, tensor in zip(own, other, inputs, strict=True):
        if tensor.shape[-1] == tensor.shape[-2] and any(tensor is p for p in precision.values()):
            mine, theirs = mine + mine.mT, theirs + theirs.mT  # of a symmetric matrix only that is defined
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("ways")
def test_draws_have_the_dense_covariance():
    precision, couplings, gradient = _problem(2)
    with torch.no_grad():
        found = factorise_arrow(make_pattern(SIZES, couplings), precision, couplings, gradient)
        h, _ = _dense(precision, couplings, gradient)
        mode = {b: torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for b, t in gradient.items()}
        # The map from normals to coordinates, column by column: its square is the covariance.
        total = sum(n * e for n, e in SIZES.values())
        columns = []
        for i in range(total):
            flat = torch.zeros(K, C, total)
            flat[..., i] = 1.0
            parts = flat.split([n * e for n, e in SIZES.values()], -1)
            white = {b: part.unflatten(-1, SIZES[b]).transpose(1, 2) for b, part in zip(SIZES, parts, strict=True)}
            z = found.colour(white, mode)
            columns.append(_flat(z) - _flat(mode))
            torch.testing.assert_close(_flat(found.whiten(z, mode)), flat, rtol=0, atol=1e-10)
        root = torch.stack(columns, -1)
        covariance = torch.linalg.inv(h)
        torch.testing.assert_close(root @ root.mT, covariance, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(_flat({b: found.variance(b) for b in SIZES}), covariance.diagonal(dim1=-2, dim2=-1), rtol=1e-9, atol=0)
        shares = sum(share.sum(1) for share in found.log_dets().values())
        torch.testing.assert_close(shares, found.log_det())


def test_all_digits_lost_are_noticed():
    precision, couplings, gradient = _problem(4)
    with torch.no_grad():
        # The only law that says what `a` is ties it to b: next to nothing is left of its precision, for one particle.
        left = torch.tensor([1.0, 1e-14])[:, None, None, None, None].expand(K, 4, C, 1, 1)
        tie = Coupling(("b", "a"), (torch.arange(4), torch.arange(4)), torch.full((K, 4, C, 2, 1), 1e8 / math.sqrt(2)))
        own = {**precision, ("b", "b"): 1e8 * torch.eye(2).expand(K, 30, C, 2, 2), ("a", "a"): 1e8 * (1 + left)}
        found = factorise_arrow(make_pattern(SIZES, [tie]), own, [tie], gradient)
    assert found.lost.tolist() == [False, True]


# -- whole models -----------------------------------------------------------------------------------------------------------


def _cohort(students, lecturers, ratings, seed=0):
    rng = np.random.default_rng(seed)
    student = np.concatenate([np.arange(students), rng.integers(0, students, ratings - students)])
    lecturer = np.concatenate([rng.permutation(lecturers), rng.integers(0, lecturers, ratings - lecturers)])
    index = {p: (f"rating_{p}", ("rating", i, {"instance_dimension": p})) for p, i in (("student", student), ("lecturer", lecturer))}
    return student, lecturer, dict(index.values())


def _model(law):
    return ps.Model(
        ps.Plate("student"),
        ps.Plate("lecturer"),
        ps.Plate("rating", within=("student", "lecturer")),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        sd_student=ps.latent(lambda: HalfNormal(1.0)),
        sd_lecturer=ps.latent(lambda: HalfNormal(1.0)),
        a=ps.latent(lambda sd_student: Normal(0.0, sd_student), plates="student"),
        b=ps.latent(lambda sd_lecturer: Normal(0.0, sd_lecturer), plates="lecturer"),
        y=ps.observed(law, plates="rating"),
    )


def _mixed(students=400, lecturers=60, ratings=1500):
    student, lecturer, index = _cohort(students, lecturers, ratings)
    rng = np.random.default_rng(1)
    y = 0.3 + 0.8 * rng.normal(size=students)[student] + 0.5 * rng.normal(size=lecturers)[lecturer] + 0.7 * rng.normal(size=ratings)
    model = _model(lambda mu, a, b: Normal(mu + a + b, 0.7))
    return model, xr.Dataset({"y": ("rating", y), **index}), student, lecturer, y


def _closed(student, lecturer, y, z, units):
    """Log evidence of the linear mixed model and the posterior of its effects: y ~ N(mu, Z D Z' + 0.49)."""
    mu, sds = z[0], np.exp(z[1:])
    design = np.zeros((len(y), sum(units)))
    design[np.arange(len(y)), student] = 1.0
    design[np.arange(len(y)), units[0] + lecturer] = 1.0
    spread = np.repeat(sds**2, units)
    cov = design * spread @ design.T + 0.49 * np.eye(len(y))
    evidence = MultivariateNormal(torch.full((len(y),), mu), torch.as_tensor(cov)).log_prob(torch.as_tensor(y))
    gain = np.linalg.solve(cov, design * spread).T
    return float(evidence), gain @ (y - mu), np.diag(spread) - gain @ (design * spread)


def test_a_linear_mixed_model_has_its_closed_form():
    model, cohort, student, lecturer, y = _mixed()
    study = oracle.compute(model, cohort)
    reduced = oracle.whole(study)
    z = torch.tensor([[0.2, -0.4, -0.6], [0.5, 0.1, -1.5]])
    root = study.space.values(z)
    assert list(root) == ["mu", "sd_student", "sd_lecturer"]
    bound = study.guide.local_bound(reduced, root, 2)
    (component,) = study.guide.components
    core = fit_core(LocalModel(component, reduced, root, {}, 2), differentiable=False)
    assert core.expansion.gaussian.pattern.head == "student"
    for k in range(2):
        evidence, mean, cov = _closed(student, lecturer, y, z[k].numpy(), (400, 60))
        assert float(bound[k]) == pytest.approx(evidence, rel=1e-10)
        for name, at in (("student", slice(400)), ("lecturer", slice(400, None))):
            np.testing.assert_allclose(core.mode[name][k, :, 0, 0], mean[at], atol=1e-9)
            _, variance = conditional_moments(core, core.mode, name)
            np.testing.assert_allclose(variance[k, :, 0, 0], np.diagonal(cov)[at], rtol=1e-9)
        # Power: without the couplings the variances would be those of effects on their own.
        alone = 1 / (np.exp(-2 * float(z[k, 2])) + np.bincount(lecturer, minlength=60) / 0.49)
        assert np.abs(alone / np.diagonal(cov)[400:] - 1).max() > 0.05


def test_draws_of_a_linear_mixed_model_have_its_covariance():
    model, cohort, student, lecturer, y = _mixed(30, 12, 100)
    study = oracle.compute(model, cohort)
    n, z = 4000, torch.tensor([0.2, -0.4, -0.6])
    root = study.space.values(z.expand(n, 3))
    (component,) = study.guide.components
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        core = fit_core(LocalModel(component, oracle.whole(study), root, {}, n), differentiable=False)
        sample = draw(core, lambda _, shape: torch.randn(shape, generator=generator))
    _, mean, cov = _closed(student, lecturer, y, z.numpy(), (30, 12))
    drawn = np.concatenate([sample.z[p][:, :, 0, 0].numpy() for p in ("student", "lecturer")], 1)
    white = np.linalg.solve(np.linalg.cholesky(cov), (drawn - mean).T)
    found = white @ white.T / n
    noise = 1 / math.sqrt(n)
    assert np.abs(white.mean(1)).max() < 4 * noise
    assert np.abs(found - np.eye(42)).max() < 6 * noise
    halves = np.linalg.solve(np.linalg.cholesky(np.diag(np.diagonal(cov))), (drawn - mean).T)  # power: as if nothing were coupled
    assert np.abs(halves @ halves.T / n - np.eye(42)).max() > 6 * noise


def test_a_crossed_bernoulli_model_has_its_laplace_value_and_gradient():
    student, lecturer, index = _cohort(40, 9, 300)
    y = np.random.default_rng(2).integers(0, 2, 300).astype(float)
    study = oracle.compute(_model(lambda mu, a, b: Bernoulli(logits=mu + a + b)), xr.Dataset({"y": ("rating", y), **index}))
    reduced, z = oracle.whole(study), torch.tensor([[0.3, -0.2, -0.5]], requires_grad=True)
    bound = study.guide.local_bound(reduced, study.space.values(z), 1, differentiable=True)
    (gradient,) = torch.autograd.grad(bound.sum(), z)

    def laplace(at):
        """By Newton steps on all effects at once."""
        mu, prior = at[0], torch.repeat_interleave(torch.exp(-2 * at[1:]), torch.tensor([40, 9]))
        x = torch.zeros(49)
        rows = torch.zeros(300, 49)
        rows[torch.arange(300), torch.as_tensor(student)] = 1.0
        rows[torch.arange(300), 40 + torch.as_tensor(lecturer)] = 1.0
        for _ in range(30):
            p = torch.sigmoid(mu + rows @ x)
            h = rows.mT * (p * (1 - p)) @ rows + torch.diag(prior)
            x = x + torch.linalg.solve(h, rows.mT @ (torch.as_tensor(y) - p) - prior * x)
        eta = mu + rows @ x
        joint = (torch.as_tensor(y) * eta - torch.nn.functional.softplus(eta)).sum() - 0.5 * (prior * x * x).sum() + 0.5 * prior.log().sum()
        return joint - 0.5 * torch.logdet(h)

    assert float(bound.detach()) == pytest.approx(float(laplace(z[0].detach())), rel=1e-9)
    for i in range(3):
        step = 1e-4 * torch.eye(3)[i]
        expected = (laplace(z[0].detach() + step) - laplace(z[0].detach() - step)) / 2e-4
        assert float(gradient[0, i]) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)


def test_only_the_dense_rest_counts_against_the_limit():
    model, cohort, *_ = _mixed()
    study = oracle.compute(model, cohort)
    graph, plates = study.graph, {"student": 1_000_000, "lecturer": DENSE_LIMIT, "rating": 2_000_000}
    (component,) = make_components(graph, make_blocks(graph))
    assert dense_rest(component, plates) == (1, DENSE_LIMIT)
    assert choose_free(graph, plates) == frozenset()
    assert choose_free(graph, {**plates, "lecturer": DENSE_LIMIT + 1}) == frozenset({frozenset({"lecturer"})})
    assert choose_free(graph, plates, most=1_000_000) == frozenset({frozenset({"lecturer"})})


def test_thousands_of_students_are_planned_without_free_rows():
    model, cohort, *_ = _mixed(3000, 500, 6000)
    study = prepare(open_cohort(cohort, model))
    assert not study.settings.free
    assert "500 columns dense" in study.plan.method["student+lecturer"]


def test_a_fit_of_thousands_of_students_is_calibrated():
    student, lecturer, index = _cohort(1600, 40, 4000)
    rng = np.random.default_rng(3)
    truth = {"a": 0.9 * rng.normal(size=1600), "b": 0.6 * rng.normal(size=40), "mu": 0.4, "sd_student": 0.9, "sd_lecturer": 0.6}
    y = truth["mu"] + truth["a"][student] + truth["b"][lecturer] + 0.7 * rng.normal(size=4000)
    posterior = ps.fit(_model(lambda mu, a, b: Normal(mu + a + b, 0.7)), xr.Dataset({"y": ("rating", y), **index}), seed=0, progress=False)
    assert posterior.status == "ok"
    mean, sd = posterior.datatree["posterior_mean"], posterior.datatree["posterior_sd"]
    z = {name: (true - mean[name].values) / sd[name].values for name, true in truth.items()}
    assert all(abs(z[name]) < 4 for name in ("mu", "sd_student", "sd_lecturer"))
    for name in ("a", "b"):  # of n standard normals the mean square has sd sqrt(2 / n)
        assert np.mean((z[name] - z[name].mean()) ** 2) == pytest.approx(1.0, abs=4 * np.sqrt(2 / len(z[name]))), name
