"""pavi-scale: plate-amortised variational inference for cohorts larger than memory."""

from pavi_scale import laws
from pavi_scale.calibration import SBC, sbc
from pavi_scale.cohort import from_table, open_cohort
from pavi_scale.fit import fit, open_posterior, plan, resume
from pavi_scale.model import Model, covariate, latent, observed
from pavi_scale.model.simulate import simulate
from pavi_scale.plates import Plate
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.report import report

__version__ = "0.1.0"
__all__ = [
    "SBC", "Model", "Plate", "Posterior", "covariate", "fit", "from_table", "latent", "laws", "observed",
    "open_cohort", "open_posterior", "plan", "report", "resume", "sbc", "simulate",
]
