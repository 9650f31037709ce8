"""Which cores the shards of a posterior pass may share."""

import pytest

from pavi_scale.cohort import open_cohort
from pavi_scale.guide.guide import Guide
from pavi_scale.moments import rests_on_root
from pavi_scale.settings import make_graph
from pipelines.hcp import model

SUBJECT, SESSION = frozenset({"subject"}), frozenset({"subject", "session"})


@pytest.mark.parametrize(("free", "session"), [({SESSION}, True), ({SUBJECT, SESSION}, False)])
def test_only_what_rests_on_the_root_is_the_same_in_all_shards(free, session):
    """Not the labels, whose evidence hangs on a draw of the sessions' fingerprints; nor these, where subjects are drawn before them."""
    cohort = open_cohort(model.sample({"subject": 2, "session": 2, "vertex": 3, "feature": 2}, seed=0), model)
    guide = Guide(make_graph(cohort), frozenset(free))
    found = {latent: rests_on_root(guide, c) for c in guide.components for b in c.blocks for latent in b.latents}
    assert found == {"mu_subject": True, "mu_session": session, "rho": False, "label_logits": False}
