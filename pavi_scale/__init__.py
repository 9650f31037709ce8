"""pavi-scale: plate-amortised variational inference for cohorts larger than memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pavi_scale import laws
    from pavi_scale.calibration import SBC, sbc
    from pavi_scale.cohort import from_table, open_cohort
    from pavi_scale.fitting import fit, open_posterior, resume
    from pavi_scale.model import Model, covariate, latent, observed
    from pavi_scale.model.simulate.cohort import simulate
    from pavi_scale.plates import Plate
    from pavi_scale.posterior.posterior import Posterior
    from pavi_scale.reporting import report
    from pavi_scale.study import plan

__version__ = "0.1.0"
__all__ = [
    "SBC", "Model", "Plate", "Posterior", "covariate", "fit", "from_table", "latent", "laws", "observed",
    "open_cohort", "open_posterior", "plan", "report", "resume", "sbc", "simulate",
]

# Public name -> its module, imported when it is first asked for: workers, of which there may be hundreds and which start often, need few of them.
_HOME = {
    "SBC": "calibration", "sbc": "calibration", "from_table": "cohort", "open_cohort": "cohort", "fit": "fitting", "open_posterior": "fitting",
    "plan": "study", "resume": "fitting", "Model": "model", "covariate": "model", "latent": "model", "observed": "model", "simulate": "model.simulate.cohort",
    "Plate": "plates", "Posterior": "posterior.posterior", "report": "reporting",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "laws":
        return import_module("pavi_scale.laws")
    if name not in _HOME:
        raise AttributeError(f"module 'pavi_scale' has no attribute {name!r}")
    found = getattr(import_module(f"pavi_scale.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
