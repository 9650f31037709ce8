"""Small models of many shapes and supports, against closed forms, grids and brute-force Monte Carlo."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    HalfNormal,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    Uniform,
)

import pavi_scale as ps


def t(x):
    return torch.as_tensor(np.asarray(x), dtype=torch.float64)


def ragged(index, parent):
    return (index, {"instance_dimension": parent})


def gaussian(design, prior_cov, prior_mean, y, noise):
    """Posterior mean and sd of a linear model y = design @ z + N(0, noise^2), z ~ N(prior_mean, prior_cov)."""
    precision = np.linalg.inv(prior_cov) + (design / noise[:, None] ** 2).T @ design
    cov = np.linalg.inv(precision)
    mean = cov @ (np.linalg.solve(prior_cov, prior_mean) + design.T @ (y / noise**2))
    return mean, np.sqrt(np.diag(cov))


def summary(z):
    return z.mean(0).numpy(), z.std(0).numpy()


# --- one-plate models ----------------------------------------------------------------------------------------------------------------------


def bernoulli_bool(mcmc):
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(7), [3, 8, 12, 1, 5, 9, 6])
    y = rng.random(g.size) < 1 / (1 + np.exp(-(0.5 + rng.normal(0, 1, 7))[g]))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i", within="g"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        sigma=ps.latent(lambda: HalfNormal(1.0)),
        theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="g"),
        y=ps.observed(lambda theta: Bernoulli(logits=theta), plates="i"),
    )

    def logp(z):
        mu, ls, raw = z[:, 0], z[:, 1], z[:, 2:]
        theta = mu[:, None] + ls.exp()[:, None] * raw
        return (
            Normal(0.0, 2.0).log_prob(mu)
            + HalfNormal(1.0).log_prob(ls.exp())
            + ls
            + Normal(0.0, 1.0).log_prob(raw).sum(1)
            + Bernoulli(logits=theta[:, g]).log_prob(t(y)).sum(1)
        )

    z = mcmc(logp, 9)
    truth = {"mu": summary(z[:, 0]), "sigma": summary(z[:, 1].exp()), "theta": summary(z[:, :1] + z[:, 1:2].exp() * z[:, 2:])}
    return model, xr.Dataset({"y": ("i", y), "g_of": ("i", *ragged(g, "g"))}), truth


def poisson_covariates_on_two_plates(mcmc):
    rng = np.random.default_rng(1)
    g = rng.permutation(np.repeat(np.arange(6), 7))
    z_g, x_i = rng.normal(size=6), rng.normal(size=42)
    theta = 0.5 + 0.8 * z_g + rng.normal(0, 0.4, 6)
    y = rng.poisson(np.exp(theta[g] - 0.5 * x_i))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i", within="g"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        gamma=ps.latent(lambda: Normal(0.0, 1.0)),
        beta=ps.latent(lambda: Normal(0.0, 1.0)),
        sigma=ps.latent(lambda: HalfNormal(0.5)),
        zg=ps.covariate(plates="g"),
        xi=ps.covariate(plates="i"),
        theta=ps.latent(lambda mu, gamma, zg, sigma: Normal(mu + gamma * zg, sigma), plates="g"),
        y=ps.observed(lambda theta, beta, xi: Poisson(torch.exp(theta + beta * xi)), plates="i"),
    )

    def split(z):
        return z[:, 0], z[:, 1], z[:, 2], z[:, 3].exp(), z[:, :1] + z[:, 1:2] * t(z_g) + z[:, 3:4].exp() * z[:, 4:]

    def logp(z):
        mu, gamma, beta, sigma, th = split(z)
        return (
            Normal(0.0, 1.0).log_prob(z[:, :3]).sum(1)
            + HalfNormal(0.5).log_prob(sigma)
            + z[:, 3]
            + Normal(0.0, 1.0).log_prob(z[:, 4:]).sum(1)
            + Poisson((th[:, g] + beta[:, None] * t(x_i)).exp()).log_prob(t(y)).sum(1)
        )

    names = ("mu", "gamma", "beta", "sigma", "theta")
    truth = dict(zip(names, map(summary, split(mcmc(logp, 10))), strict=True))
    return model, xr.Dataset({"y": ("i", y), "xi": ("i", x_i), "zg": ("g", z_g), "g_of": ("i", *ragged(g, "g"))}), truth


def regression_without_locals(mcmc):
    rng = np.random.default_rng(2)
    x = rng.normal(2, 1, 20)
    y = 1 + 2 * x + rng.normal(0, 0.7, 20)
    model = ps.Model(
        ps.Plate("i"),
        a=ps.latent(lambda: Normal(0.0, 5.0)),
        b=ps.latent(lambda: Normal(0.0, 5.0)),
        s=ps.latent(lambda: Exponential(1.0)),
        x=ps.covariate(plates="i"),
        y=ps.observed(lambda a, b, s, x: Normal(a + b * x, s), plates="i"),
    )

    def logp(z):
        a, b, s = z[:, 0], z[:, 1], z[:, 2].exp()
        return (
            Normal(0.0, 5.0).log_prob(z[:, :2]).sum(1)
            + Exponential(1.0).log_prob(s)
            + z[:, 2]
            + Normal(a[:, None] + b[:, None] * t(x), s[:, None]).log_prob(t(y)).sum(1)
        )

    z = mcmc(logp, 3, steps=2000)
    return model, xr.Dataset({"x": ("i", x), "y": ("i", y)}), {"a": summary(z[:, 0]), "b": summary(z[:, 1]), "s": summary(z[:, 2].exp())}


def no_root(mcmc):
    rng = np.random.default_rng(3)
    x = rng.normal(rng.normal(0, 1, 9)[:, None], 0.5, (9, 4)).astype(np.float32)
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        theta=ps.latent(lambda: Normal(0.0, 1.0), plates="g"),
        x=ps.observed(lambda theta: Normal(theta, 0.5), plates=("g", "i")),
    )
    precision = 1 + 4 / 0.25
    return model, xr.Dataset({"x": (("g", "i"), x)}), {"theta": (x.sum(1) / 0.25 / precision, np.full(9, precision**-0.5))}


def no_root_bernoulli_grid(mcmc):
    rng = np.random.default_rng(4)
    k, n = rng.binomial(10, 0.3, 8), np.full(8, 10.0)
    model = ps.Model(
        ps.Plate("g"),
        n=ps.covariate(plates="g"),
        theta=ps.latent(lambda: Normal(0.0, 1.5), plates="g"),
        k=ps.observed(lambda theta, n: Binomial(10, logits=theta), plates="g"),
    )
    a = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    w = torch.softmax(Normal(0.0, 1.5).log_prob(a) + Binomial(10, logits=a).log_prob(t(k)[:, None]), 1)
    mean = (w * a).sum(1)
    sd = ((w * (a - mean[:, None]) ** 2).sum(1)).sqrt()
    return model, xr.Dataset({"k": ("g", k), "n": ("g", n)}), {"theta": (mean.numpy(), sd.numpy())}


def scalar_observation_without_plates(mcmc):
    model = ps.Model(mu=ps.latent(lambda: Normal(1.0, 2.0)), y=ps.observed(lambda mu: Normal(mu, 1.0)))
    return model, xr.Dataset({"y": ((), 3.0)}), {"mu": ((1 / 4 + 3) / 1.25, 1.25**-0.5)}


def noncentred(mcmc):
    rng = np.random.default_rng(5)
    y = rng.normal(rng.normal(1, 0.5, 8)[:, None], 1.0, (8, 5))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        tau=ps.latent(lambda: HalfNormal(1.0)),
        raw=ps.latent(lambda: Normal(0.0, 1.0), plates="g"),
        y=ps.observed(lambda mu, tau, raw: Normal(mu + tau * raw, 1.0), plates=("g", "i")),
    )

    def logp(z):
        m = z[:, :1] + z[:, 1:2].exp() * z[:, 2:]
        return (
            Normal(0.0, 2.0).log_prob(z[:, 0])
            + HalfNormal(1.0).log_prob(z[:, 1].exp())
            + z[:, 1]
            + Normal(0.0, 1.0).log_prob(z[:, 2:]).sum(1)
            + Normal(m[:, :, None], 1.0).log_prob(t(y)).sum((1, 2))
        )

    z = mcmc(logp, 10)
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"mu": summary(z[:, 0]), "tau": summary(z[:, 1].exp()), "raw": summary(z[:, 2:])}


def overdispersed_counts(mcmc):
    """A latent on the very plate of the data."""
    rng = np.random.default_rng(6)
    y = rng.poisson(np.exp(1 + 0.7 * rng.normal(size=12)))
    model = ps.Model(
        ps.Plate("i"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        s=ps.latent(lambda: HalfNormal(1.0)),
        eps=ps.latent(lambda s: Normal(0.0, s), plates="i"),
        y=ps.observed(lambda mu, eps: Poisson(torch.exp(mu + eps)), plates="i"),
    )

    def logp(z):
        eps = z[:, 1:2].exp() * z[:, 2:]
        return (
            Normal(0.0, 2.0).log_prob(z[:, 0])
            + HalfNormal(1.0).log_prob(z[:, 1].exp())
            + z[:, 1]
            + Normal(0.0, 1.0).log_prob(z[:, 2:]).sum(1)
            + Poisson((z[:, :1] + eps).exp()).log_prob(t(y)).sum(1)
        )

    z = mcmc(logp, 14)
    return model, xr.Dataset({"y": ("i", y)}), {"mu": summary(z[:, 0]), "s": summary(z[:, 1].exp()), "eps": summary(z[:, 1:2].exp() * z[:, 2:])}


# --- supports ------------------------------------------------------------------------------------------------------------------------------


def dirichlet_root_categorical(mcmc):
    y = np.array([0, 0, 1, 2, 2, 2, 2, 0, 2, 1, 2])
    model = ps.Model(
        ps.Plate("i"),
        sizes={"k": 3},
        p=ps.latent(lambda: Dirichlet(torch.tensor([1.0, 2.0, 1.5])), dims="k"),
        y=ps.observed(lambda p: Categorical(probs=p), plates="i"),
    )
    a = np.array([1, 2, 1.5]) + np.bincount(y)
    d = Dirichlet(t(a))
    return model, xr.Dataset({"y": ("i", y)}), {"p": (d.mean.numpy(), d.variance.sqrt().numpy())}


def dirichlet_per_group_multinomial(mcmc):
    counts = np.random.default_rng(7).multinomial(20, [0.2, 0.5, 0.2, 0.1], 6)
    model = ps.Model(
        ps.Plate("g"),
        p=ps.latent(lambda: Dirichlet(torch.full((4,), 2.0)), plates="g", dims="k"),
        y=ps.observed(lambda p: torch.distributions.Multinomial(20, probs=p), plates="g", dims="k"),
    )
    d = Dirichlet(t(counts + 2.0))
    return model, xr.Dataset({"y": (("g", "k"), counts)}), {"p": (d.mean.numpy(), d.variance.sqrt().numpy())}


def beta_binomial(mcmc):
    k = np.array([0, 3, 10, 5, 9])
    model = ps.Model(
        ps.Plate("g"),
        p=ps.latent(lambda: Beta(2.0, 3.0), plates="g"),
        k=ps.observed(lambda p: Binomial(10, probs=p), plates="g"),
    )
    d = Beta(t(k + 2), t(13 - k))
    return model, xr.Dataset({"k": ("g", k)}), {"p": (d.mean.numpy(), d.variance.sqrt().numpy())}


def uniform_root(mcmc):
    y = np.array([1.2, 2.4, 3.1, 2.2])
    model = ps.Model(ps.Plate("i"), u=ps.latent(lambda: Uniform(-1.0, 3.0)), y=ps.observed(lambda u: Normal(u, 1.5), plates="i"))
    u = torch.linspace(-1, 3, 8001, dtype=torch.float64)
    w = torch.softmax(Normal(u, 1.5).log_prob(t(y)[:, None]).sum(0), 0)
    m = (w * u).sum()
    return model, xr.Dataset({"y": ("i", y)}), {"u": (m, ((w * (u - m) ** 2).sum()).sqrt())}


def test_support_that_moves_is_refused():
    """The support of a local depends on its parent: one clear error, not a wrong posterior."""
    model = ps.Model(
        ps.Plate("g"),
        b=ps.latent(lambda: Gamma(4.0, 1.0)),
        u=ps.latent(lambda b: Uniform(0.0, b), plates="g"),
        y=ps.observed(lambda u: Normal(u, 0.5), plates="g"),
    )
    with pytest.raises(ps.errors.ModelError, match="support of a latent depends on its parent"):
        ps.fit(model, xr.Dataset({"y": ("g", [0.7, 1.8, 2.1])}), progress=False)


def gamma_poisson(mcmc):
    rng = np.random.default_rng(8)
    y = rng.poisson(rng.gamma(2, 1, 7)[:, None], (7, 3))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        rate=ps.latent(lambda: Gamma(2.0, 1.0), plates="g"),
        y=ps.observed(lambda rate: Poisson(rate), plates=("g", "i")),
    )
    a, b = 2 + y.sum(1), 1 + 3
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"rate": (a / b, np.sqrt(a) / b)}


def gamma_poisson_with_hyperparameters(mcmc):
    rng = np.random.default_rng(9)
    y = rng.poisson(rng.gamma(2, 2, 10)[:, None], (10, 4))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        a=ps.latent(lambda: Gamma(2.0, 0.5)),
        b=ps.latent(lambda: Gamma(2.0, 2.0)),
        rate=ps.latent(lambda a, b: Gamma(a, b), plates="g"),
        y=ps.observed(lambda rate: Poisson(rate), plates=("g", "i")),
    )
    total = t(y.sum(1))

    def logp(z):
        a, b = z[:, :1].exp(), z[:, 1:].exp()
        out = Gamma(2.0, 0.5).log_prob(a) + Gamma(2.0, 2.0).log_prob(b) + z.sum(1, keepdim=True)
        return (out + (a * b.log() - torch.lgamma(a) + torch.lgamma(a + total) - (a + total) * (b + 4).log()).sum(1, keepdim=True))[:, 0]

    z = mcmc(logp, 2, steps=2000)
    a, b = z[:, :1].exp(), z[:, 1:].exp()
    g = Gamma(a + total, b + 4)
    truth = {"a": summary(a[:, 0]), "b": summary(b[:, 0]), "rate": (g.mean.mean(0).numpy(), (g.variance.mean(0) + g.mean.var(0)).sqrt().numpy())}
    return model, xr.Dataset({"y": (("g", "i"), y)}), truth


def lognormal_scale(mcmc):
    y = np.random.default_rng(10).normal(0, 2.0, (5, 6))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        s=ps.latent(lambda: LogNormal(0.0, 1.0), plates="g"),
        y=ps.observed(lambda s: Normal(0.0, s), plates=("g", "i")),
    )
    z = torch.linspace(-4, 5, 8001, dtype=torch.float64)
    w = torch.softmax(Normal(0.0, 1.0).log_prob(z) + Normal(0.0, z.exp()).log_prob(t(y)[..., None]).sum(1), 1)
    m = (w * z.exp()).sum(1)
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"s": (m.numpy(), ((w * (z.exp() - m[:, None]) ** 2).sum(1)).sqrt().numpy())}


def laplace_children_of_gamma_root(mcmc):
    rng = np.random.default_rng(11)
    y = rng.normal(rng.laplace(0, 1, 8)[:, None], 0.8, (8, 4))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        a=ps.latent(lambda: Gamma(2.0, 2.0)),
        theta=ps.latent(lambda a: Laplace(0.0, a), plates="g"),
        y=ps.observed(lambda theta: Normal(theta, 0.8), plates=("g", "i")),
    )

    def logp(z):
        a = z[:, :1].exp()
        theta = a * z[:, 1:]
        return (
            (Gamma(2.0, 2.0).log_prob(a) + z[:, :1])[:, 0]
            + Laplace(0.0, 1.0).log_prob(z[:, 1:]).sum(1)
            + Normal(theta[..., None], 0.8).log_prob(t(y)).sum((1, 2))
        )

    z = mcmc(logp, 9)
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"a": summary(z[:, 0].exp()), "theta": summary(z[:, :1].exp() * z[:, 1:])}


def student_t_noise(mcmc):
    rng = np.random.default_rng(12)
    y = 1.0 + rng.standard_t(3, (6, 5))
    y[0, 0] = 15.0
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        theta=ps.latent(lambda mu: Normal(mu, 0.7), plates="g"),
        y=ps.observed(lambda theta: StudentT(3.0, theta, 1.0), plates=("g", "i")),
    )

    def logp(z):
        theta = z[:, :1] + 0.7 * z[:, 1:]
        return Normal(0.0, 2.0).log_prob(z[:, 0]) + Normal(0.0, 1.0).log_prob(z[:, 1:]).sum(1) + StudentT(3.0, theta[..., None], 1.0).log_prob(t(y)).sum((1, 2))

    z = mcmc(logp, 7)
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"mu": summary(z[:, 0]), "theta": summary(z[:, :1] + 0.7 * z[:, 1:])}


def negative_binomial_roots(mcmc):
    y = np.random.default_rng(13).negative_binomial(3, 0.4, 40)
    model = ps.Model(
        ps.Plate("i"),
        r=ps.latent(lambda: Gamma(2.0, 0.5)),
        logit=ps.latent(lambda: Normal(0.0, 1.5)),
        y=ps.observed(lambda r, logit: NegativeBinomial(r, logits=logit), plates="i"),
    )

    def logp(z):
        r, logit = z[:, :1].exp(), z[:, 1:]
        return (Gamma(2.0, 0.5).log_prob(r) + z[:, :1] + Normal(0.0, 1.5).log_prob(logit))[:, 0] + NegativeBinomial(r, logits=logit).log_prob(t(y)).sum(1)

    z = mcmc(logp, 2, steps=2000)
    return model, xr.Dataset({"y": ("i", y)}), {"r": summary(z[:, 0].exp()), "logit": summary(z[:, 1])}


def mixture_with_marginal_labels(mcmc):
    rng = np.random.default_rng(14)
    w = rng.beta(2, 2, 5)
    y = np.where(rng.random((5, 20)) < w[:, None], rng.normal(2, 1, (5, 20)), rng.normal(-1, 1, (5, 20)))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        shift=ps.latent(lambda: Normal(0.0, 1.0)),
        logit=ps.latent(lambda: Normal(0.0, 1.5), plates="g"),
        y=ps.observed(
            lambda shift, logit: MixtureSameFamily(
                Categorical(logits=torch.stack([logit, torch.zeros_like(logit)])), Normal(torch.stack([shift + 2.0, shift - 1.0]), torch.ones(2))
            ),
            plates=("g", "i"),
        ),
    )

    def logp(z):
        w = torch.nn.functional.logsigmoid(torch.stack([z[:, 1:], -z[:, 1:]]))[..., None]
        shift = z[:, :1, None]
        like = torch.logsumexp(w + torch.stack([Normal(shift + 2.0, 1.0).log_prob(t(y)), Normal(shift - 1.0, 1.0).log_prob(t(y))]), 0).sum((1, 2))
        return Normal(0.0, 1.0).log_prob(z[:, 0]) + Normal(0.0, 1.5).log_prob(z[:, 1:]).sum(1) + like

    z = mcmc(logp, 6)
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"shift": summary(z[:, 0]), "logit": summary(z[:, 1:])}


# --- plates and dims -----------------------------------------------------------------------------------------------------------------------


def crossed_gaussian(mcmc):
    rng = np.random.default_rng(15)
    s, ell = rng.integers(0, 6, 40), rng.integers(0, 4, 40)
    y = rng.normal(0.5 + rng.normal(0, 1, 6)[s] + rng.normal(0, 0.7, 4)[ell], 0.6)
    model = ps.Model(
        ps.Plate("student"),
        ps.Plate("lecturer"),
        ps.Plate("rating", within=("student", "lecturer")),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        a=ps.latent(lambda: Normal(0.0, 1.0), plates="student"),
        b=ps.latent(lambda: Normal(0.0, 0.7), plates="lecturer"),
        y=ps.observed(lambda mu, a, b: Normal(mu + a + b, 0.6), plates="rating"),
    )
    design = np.concatenate([np.ones((40, 1)), np.eye(6)[s], np.eye(4)[ell]], 1)
    m, sd = gaussian(design, np.diag([4.0] + [1.0] * 6 + [0.49] * 4), np.zeros(11), y, np.full(40, 0.6))
    cohort = xr.Dataset({"y": ("rating", y), "who": ("rating", *ragged(s, "student")), "by": ("rating", *ragged(ell, "lecturer"))})
    return model, cohort, {"mu": (m[0], sd[0]), "a": (m[1:7], sd[1:7]), "b": (m[7:], sd[7:])}


def crossed_bernoulli_with_scales(mcmc):
    rng = np.random.default_rng(16)
    s, ell = np.repeat(np.arange(8), 10), np.tile(np.arange(5), 16)
    y = (rng.random(80) < 1 / (1 + np.exp(-(0.3 + rng.normal(0, 1, 8)[s] + rng.normal(0, 0.8, 5)[ell])))).astype(np.int8)
    model = ps.Model(
        ps.Plate("student"),
        ps.Plate("lecturer"),
        ps.Plate("rating", within=("student", "lecturer")),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        sa=ps.latent(lambda: HalfNormal(1.0)),
        sb=ps.latent(lambda: HalfNormal(1.0)),
        a=ps.latent(lambda sa: Normal(0.0, sa), plates="student"),
        b=ps.latent(lambda sb: Normal(0.0, sb), plates="lecturer"),
        y=ps.observed(lambda mu, a, b: Bernoulli(logits=mu + a + b), plates="rating"),
    )

    def split(z):
        return z[:, 0], z[:, 1].exp(), z[:, 2].exp(), z[:, 1:2].exp() * z[:, 3:11], z[:, 2:3].exp() * z[:, 11:]

    def logp(z):
        mu, sa, sb, a, b = split(z)
        return (
            Normal(0.0, 2.0).log_prob(mu)
            + HalfNormal(1.0).log_prob(sa)
            + HalfNormal(1.0).log_prob(sb)
            + z[:, 1]
            + z[:, 2]
            + Normal(0.0, 1.0).log_prob(z[:, 3:]).sum(1)
            + Bernoulli(logits=mu[:, None] + a[:, s] + b[:, ell]).log_prob(t(y)).sum(1)
        )

    truth = dict(zip(("mu", "sa", "sb", "a", "b"), map(summary, split(mcmc(logp, 16, steps=6000))), strict=True))
    return model, xr.Dataset({"y": ("rating", y), "who": ("rating", *ragged(s, "student")), "by": ("rating", *ragged(ell, "lecturer"))}), truth


def three_levels_ragged(mcmc):
    rng = np.random.default_rng(17)
    d = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    c = np.repeat(np.arange(9), [2, 3, 1, 4, 2, 3, 5, 1, 2])
    y = rng.normal(rng.normal(rng.normal(1, 1, 3)[d], 0.8)[c], 0.5)
    model = ps.Model(
        ps.Plate("district"),
        ps.Plate("school", within="district"),
        ps.Plate("pupil", within="school"),
        mu=ps.latent(lambda: Normal(0.0, 3.0)),
        delta=ps.latent(lambda mu: Normal(mu, 1.0), plates="district"),
        alpha=ps.latent(lambda delta: Normal(delta, 0.8), plates="school"),
        y=ps.observed(lambda alpha: Normal(alpha, 0.5), plates="pupil"),
    )
    # z = (mu, delta - mu, alpha - delta): independent a priori.
    to = np.zeros((13, 13))
    to[:, 0] = 1
    to[1:4, 1:4] = np.eye(3)
    to[4:, 1:4] = np.eye(3)[d]
    to[4:, 4:] = np.eye(9)
    prior = to @ np.diag([9.0] + [1.0] * 3 + [0.64] * 9) @ to.T
    design = np.concatenate([np.zeros((y.size, 4)), np.eye(9)[c]], 1)
    m, sd = gaussian(design, prior, np.zeros(13), y, np.full(y.size, 0.5))
    cohort = xr.Dataset({"y": ("pupil", y), "in_district": ("school", *ragged(d, "district")), "in_school": ("pupil", *ragged(c, "school"))})
    return model, cohort, {"mu": (m[0], sd[0]), "delta": (m[1:4], sd[1:4]), "alpha": (m[4:], sd[4:])}


def three_levels_dense_with_scales(mcmc):
    rng = np.random.default_rng(18)
    y = rng.normal(rng.normal(rng.normal(0, 1.0, 6)[:, None], 0.6, (6, 4))[..., None], 0.5, (6, 4, 3))
    model = ps.Model(
        ps.Plate("a"),
        ps.Plate("b"),
        ps.Plate("c"),
        s1=ps.latent(lambda: HalfNormal(1.0)),
        s2=ps.latent(lambda: HalfNormal(1.0)),
        u=ps.latent(lambda s1: Normal(0.0, s1), plates="a"),
        v=ps.latent(lambda u, s2: Normal(u, s2), plates=("a", "b")),
        y=ps.observed(lambda v: Normal(v, 0.5), plates=("a", "b", "c")),
    )

    # Given both scales all is Gaussian: integrate the scales on a grid, the rest in closed form.
    design = np.concatenate([np.zeros((72, 6)), np.eye(24)[np.repeat(np.arange(24), 3)]], 1)
    to = np.concatenate([np.concatenate([np.eye(6), np.zeros((6, 24))], 1), np.concatenate([np.eye(6)[np.repeat(np.arange(6), 4)], np.eye(24)], 1)])
    flat, parts = y.reshape(-1), []
    for s1 in np.linspace(0.05, 4, 60):
        for s2 in np.linspace(0.05, 2, 50):
            prior = to @ np.diag([s1**2] * 6 + [s2**2] * 24) @ to.T
            marginal = design @ prior @ design.T + 0.25 * np.eye(72)
            gain = np.linalg.solve(marginal, design @ prior)
            logp = -0.5 * s1**2 - 0.5 * s2**2 - 0.5 * np.linalg.slogdet(marginal)[1] - 0.5 * flat @ np.linalg.solve(marginal, flat)
            mean = gain.T @ flat
            parts.append((logp, [s1, s2, *mean], [0, 0, *np.diag(prior - gain.T @ design @ prior)]))
    w = np.exp(np.array([p[0] for p in parts]) - max(p[0] for p in parts))
    w /= w.sum()
    means, variances = np.array([p[1] for p in parts]), np.array([p[2] for p in parts])
    m = w @ means
    sd = np.sqrt(w @ (variances + (means - m) ** 2))
    truth = {"s1": (m[0], sd[0]), "s2": (m[1], sd[1]), "u": (m[2:8], sd[2:8]), "v": (m[8:].reshape(6, 4), sd[8:].reshape(6, 4))}
    return model, xr.Dataset({"y": (("a", "b", "c"), y)}), truth


def multivariate_normal_dims(mcmc):
    rng = np.random.default_rng(19)
    prior = np.array([[1.0, 0.6], [0.6, 2.0]])
    noise = np.array([[0.5, -0.2], [-0.2, 0.3]])
    x = rng.multivariate_normal([0, 0], noise, (5, 3)) + rng.multivariate_normal([1, -1], prior, 5)[:, None]
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        sizes={"f": 2},
        theta=ps.latent(lambda: MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 2.0]])), plates="g", dims="f"),
        x=ps.observed(lambda theta: MultivariateNormal(theta, torch.tensor([[0.5, -0.2], [-0.2, 0.3]])), plates=("g", "i"), dims="f"),
    )
    cov = np.linalg.inv(np.linalg.inv(prior) + 3 * np.linalg.inv(noise))
    m = (np.linalg.solve(prior, [1, -1]) + 3 * np.linalg.solve(noise, x.mean(1).T).T) @ cov
    return model, xr.Dataset({"x": (("g", "i", "f"), x)}), {"theta": (m, np.tile(np.sqrt(np.diag(cov)), (5, 1)))}


def random_slopes_as_event_dim(mcmc):
    rng = np.random.default_rng(20)
    g = np.repeat(np.arange(5), [3, 6, 4, 8, 2])
    x = rng.normal(size=g.size)
    coef = rng.normal([1, -1], [0.5, 1.0], (5, 2))
    y = rng.normal(coef[g, 0] + coef[g, 1] * x, 0.4)
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i", within="g"),
        sizes={"c": 2},
        mu=ps.latent(lambda: Normal(0.0, 2.0), dims="c"),
        coef=ps.latent(lambda mu: Normal(mu, torch.tensor([0.5, 1.0])), plates="g", dims="c"),
        x=ps.covariate(plates="i"),
        y=ps.observed(lambda coef, x: Normal(coef[0] + coef[1] * x, 0.4), plates="i"),
    )
    to = np.concatenate([np.tile(np.eye(2), (6, 1)), np.concatenate([np.zeros((2, 10)), np.eye(10)])], 1)
    prior = to @ np.diag([4.0, 4.0] + [0.25, 1.0] * 5) @ to.T
    design = np.zeros((g.size, 12))
    design[np.arange(g.size), 2 + 2 * g] = 1
    design[np.arange(g.size), 3 + 2 * g] = x
    m, sd = gaussian(design, prior, np.zeros(12), y, np.full(g.size, 0.4))
    cohort = xr.Dataset({"y": ("i", y), "x": ("i", x), "g_of": ("i", *ragged(g, "g"))})
    return model, cohort, {"mu": (m[:2], sd[:2]), "coef": (m[2:].reshape(5, 2), sd[2:].reshape(5, 2))}


def plate_order(swap):
    def build(mcmc):
        rng = np.random.default_rng(21)
        y = rng.normal(rng.normal(0, 1, (3, 4))[..., None], 0.5, (3, 4, 2))
        order = ("b", "a") if swap else ("a", "b")
        model = ps.Model(
            ps.Plate("a"),
            ps.Plate("b"),
            ps.Plate("r"),
            u=ps.latent(lambda: Normal(0.0, 1.0), plates="a"),
            v=ps.latent(lambda u: Normal(u, 0.8), plates=order),
            y=ps.observed(lambda v: Normal(v, 0.5), plates=("r", *order)),
        )
        to = np.concatenate([np.concatenate([np.eye(3), np.zeros((3, 12))], 1), np.concatenate([np.eye(3)[np.repeat(np.arange(3), 4)], np.eye(12)], 1)])
        prior = to @ np.diag([1.0] * 3 + [0.64] * 12) @ to.T
        design = np.concatenate([np.zeros((24, 3)), np.eye(12)[np.repeat(np.arange(12), 2)]], 1)
        m, sd = gaussian(design, prior, np.zeros(15), y.reshape(-1), np.full(24, 0.5))
        # The store keeps its own order of dimensions; the model's order rules the posterior.
        v = tuple(q[3:].reshape(3, 4).T if swap else q[3:].reshape(3, 4) for q in (m, sd))
        return model, xr.Dataset({"y": (("a", "b", "r"), y)}), {"u": (m[:3], sd[:3]), "v": v}

    build.__name__ = f"plate_order_{'ba' if swap else 'ab'}"
    return build


def event_dims_in_another_order(mcmc):
    rng = np.random.default_rng(22)
    x = rng.normal(rng.normal(0, 1, (4, 3, 2))[:, None], 0.5, (4, 5, 3, 2))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        theta=ps.latent(lambda: Normal(0.0, torch.ones(3, 1)), plates="g", dims=("k", "f")),
        x=ps.observed(lambda theta: Normal(theta.T, 0.5), plates=("g", "i"), dims=("f", "k")),
    )
    precision = 1 + 5 / 0.25
    cohort = xr.Dataset({"x": (("i", "k", "g", "f"), x.transpose(1, 2, 0, 3))})
    return model, cohort, {"theta": (x.sum(1) / 0.25 / precision, np.full((4, 3, 2), precision**-0.5))}


def dense_plate_inside_ragged(mcmc):
    rng = np.random.default_rng(23)
    g = np.array([2, 0, 1, 0, 2, 2, 1])
    y = rng.normal(rng.normal(0, 1, 3)[g][:, None] + rng.normal(0, 0.5, 4), 0.5, (7, 4))
    model = ps.Model(
        ps.Plate("county"),
        ps.Plate("house", within="county"),
        ps.Plate("month"),
        alpha=ps.latent(lambda: Normal(0.0, 1.0), plates="county"),
        season=ps.latent(lambda: Normal(0.0, 0.5), plates="month"),
        y=ps.observed(lambda alpha, season: Normal(alpha + season, 0.5), plates=("house", "month")),
    )
    design = np.concatenate([np.eye(3)[np.repeat(g, 4)], np.eye(4)[np.tile(np.arange(4), 7)]], 1)
    m, sd = gaussian(design, np.diag([1.0] * 3 + [0.25] * 4), np.zeros(7), y.reshape(-1), np.full(28, 0.5))
    cohort = xr.Dataset({"y": (("house", "month"), y), "g_of": ("house", *ragged(g, "county"))})
    return model, cohort, {"alpha": (m[:3], sd[:3]), "season": (m[3:], sd[3:])}


# --- data: missing, several observed variables, none at all ---------------------------------------------------------------------------------


def missing_with_mask(mcmc):
    rng = np.random.default_rng(24)
    x = rng.normal(rng.normal(0, 1, (6, 1, 2)), 0.5, (6, 4, 2))
    x[rng.random(x.shape) < 0.4] = np.nan
    x[5] = np.nan
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        theta=ps.latent(lambda: Normal(0.3, 1.0), plates="g", dims="f"),
        x=ps.observed(lambda theta: Normal(theta, 0.5), plates=("g", "i"), dims="f", missing="mask"),
    )
    precision = 1 + np.isfinite(x).sum(1) / 0.25
    return model, xr.Dataset({"x": (("g", "i", "f"), x)}), {"theta": ((0.3 + np.nansum(x, 1) / 0.25) / precision, precision**-0.5)}


def missing_counts_with_mask(mcmc):
    rng = np.random.default_rng(25)
    y = rng.poisson(rng.gamma(2, 1, 7)[:, None], (7, 5)).astype(float)
    y[rng.random(y.shape) < 0.4] = np.nan
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        rate=ps.latent(lambda: Gamma(2.0, 1.0), plates="g"),
        y=ps.observed(lambda rate: Poisson(rate), plates=("g", "i"), missing="mask"),
    )
    a, b = 2 + np.nansum(y, 1), 1 + np.isfinite(y).sum(1)
    return model, xr.Dataset({"y": (("g", "i"), y)}), {"rate": (a / b, np.sqrt(a) / b)}


def two_observed_variables(mcmc):
    rng = np.random.default_rng(26)
    theta = rng.normal(0, 1, 6)
    g = np.repeat(np.arange(6), [1, 2, 3, 4, 0, 2])
    x, k, w = rng.normal(theta[g], 0.5), rng.normal(2 * theta, 0.7), rng.normal(theta.mean(), 0.1)
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i", within="g"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="g"),
        x=ps.observed(lambda theta: Normal(theta, 0.5), plates="i"),
        k=ps.observed(lambda theta: Normal(2 * theta, 0.7), plates="g"),
        w=ps.observed(lambda mu: Normal(mu, 0.9)),
    )
    to = np.concatenate([np.ones((7, 1)), np.concatenate([np.zeros((1, 6)), np.eye(6)])], 1)
    design = np.concatenate([np.concatenate([np.zeros((g.size, 1)), np.eye(6)[g]], 1), np.concatenate([np.zeros((6, 1)), 2 * np.eye(6)], 1), np.eye(7)[:1]])
    noise = np.concatenate([np.full(g.size, 0.5), np.full(6, 0.7), [0.9]])
    m, sd = gaussian(design, to @ to.T, np.zeros(7), np.concatenate([x, k, [w]]), noise)
    cohort = xr.Dataset({"x": ("i", x), "k": ("g", k), "w": ((), w), "g_of": ("i", *ragged(g, "g"))})
    return model, cohort, {"mu": (m[0], sd[0]), "theta": (m[1:], sd[1:])}


def latents_without_data(mcmc):
    """A lone root, a lone local and a leaf below a local that has data: each keeps its (conditional) prior."""
    rng = np.random.default_rng(27)
    x = rng.normal(rng.normal(0, 1, 5)[:, None], 0.5, (5, 3))
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        alone=ps.latent(lambda: Gamma(3.0, 2.0)),
        theta=ps.latent(lambda: Normal(0.0, 1.0), plates="g"),
        idle=ps.latent(lambda alone: Normal(2.0, 0.3), plates="g"),
        leaf=ps.latent(lambda theta: Normal(2 * theta, 0.5), plates=("g", "i")),
        x=ps.observed(lambda theta: Normal(theta, 0.5), plates=("g", "i")),
    )
    precision = 1 + 3 / 0.25
    m = x.sum(1) / 0.25 / precision
    truth = {
        "alone": (1.5, 0.75**0.5),
        "theta": (m, np.full(5, precision**-0.5)),
        "idle": (np.full(5, 2.0), np.full(5, 0.3)),
        "leaf": (np.repeat(2 * m[:, None], 3, 1), np.full((5, 3), (4 / precision + 0.25) ** 0.5)),
    }
    return model, xr.Dataset({"x": (("g", "i"), x)}), truth


def groups_without_children(mcmc):
    g = np.array([1, 1, 3, 3, 3])
    x = np.array([0.4, 0.9, -1.0, -0.6, -0.2])
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i", within="g"),
        z=ps.covariate(plates="g"),
        theta=ps.latent(lambda z: Normal(z, 0.8), plates="g"),
        x=ps.observed(lambda theta: Normal(theta, 0.5), plates="i"),
    )
    z = np.arange(6) / 2
    precision = 1 / 0.64 + np.bincount(g, minlength=6) / 0.25
    m = (z / 0.64 + np.bincount(g, weights=x, minlength=6) / 0.25) / precision
    return model, xr.Dataset({"x": ("i", x), "z": ("g", z), "g_of": ("i", *ragged(g, "g"))}), {"theta": (m, precision**-0.5)}


CASES = [
    bernoulli_bool,
    poisson_covariates_on_two_plates,
    regression_without_locals,
    no_root,
    no_root_bernoulli_grid,
    scalar_observation_without_plates,
    noncentred,
    overdispersed_counts,
    dirichlet_root_categorical,
    dirichlet_per_group_multinomial,
    beta_binomial,
    uniform_root,
    gamma_poisson,
    gamma_poisson_with_hyperparameters,
    lognormal_scale,
    laplace_children_of_gamma_root,
    student_t_noise,
    negative_binomial_roots,
    mixture_with_marginal_labels,
    crossed_gaussian,
    crossed_bernoulli_with_scales,
    three_levels_ragged,
    three_levels_dense_with_scales,
    multivariate_normal_dims,
    random_slopes_as_event_dim,
    plate_order(False),
    plate_order(True),
    event_dims_in_another_order,
    dense_plate_inside_ragged,
    missing_with_mask,
    missing_counts_with_mask,
    two_observed_variables,
    latents_without_data,
    groups_without_children,
]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_posterior_is_right(case, tmp_path, mcmc, misses):
    model, cohort, truth = case(mcmc)
    posterior = ps.fit(model, cohort, run=tmp_path / "run", seed=0)
    wrong = misses(posterior, truth)
    elbo = posterior.elbo()
    print(case.__name__, posterior.status, elbo, f"{len(wrong)} wrong", wrong)
    assert len(wrong) <= 0.1 * sum(np.asarray(mean).size for mean, _ in truth.values()), wrong
    assert posterior.status == "ok"
