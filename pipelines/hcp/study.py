"""The model: each vertex of each subject shows a mixture of network fingerprints; the labels are summed out."""

from __future__ import annotations

from torch.distributions import HalfNormal, LogNormal, Normal

import pavi_scale as ps

NETWORKS = 7
LOGIT_SCALE = 2.0  # spread of the population's label logits over the vertices

model = ps.Model(
    ps.Plate("subject"),
    ps.Plate("session"),
    ps.Plate("vertex"),
    sizes={"network": NETWORKS},
    # fingerprints: of the population, of a subject, of a session
    mu=ps.latent(lambda: Normal(0.0, 1.0), dims=("network", "feature")),
    eps=ps.latent(lambda: HalfNormal(0.5), dims="network"),
    sigma=ps.latent(lambda: HalfNormal(0.5), dims="network"),
    kappa=ps.latent(lambda: LogNormal(0.0, 1.0)),
    mu_subject=ps.latent(lambda mu, eps: Normal(mu, eps[:, None]), plates="subject", dims=("network", "feature")),
    mu_session=ps.latent(lambda mu_subject, sigma: Normal(mu_subject, sigma[:, None]), plates=("subject", "session"), dims=("network", "feature")),
    # parcellation: of the population, of a subject
    rho=ps.latent(lambda: Normal(0.0, LOGIT_SCALE), plates="vertex", dims="network"),
    label_logits=ps.latent(lambda rho: Normal(rho, 1.0), plates=("subject", "vertex"), dims="network"),
    x=ps.observed(
        lambda label_logits, mu_session, kappa: ps.laws.IsotropicNormalMixture(label_logits, mu_session, kappa),
        plates=("subject", "session", "vertex"),
        dims="feature",
    ),
)
