"""Models: the template graph, its laws, simulation and drawing."""

from pavi_scale.model.template import Model, Variable, covariate, latent, observed

__all__ = ["Model", "Variable", "covariate", "latent", "observed"]
