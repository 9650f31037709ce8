"""Text, table, DOT source and plate diagram of a model."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from torch.distributions import HalfNormal, LogNormal, Normal

from pavi_scale.errors import InputError
from pavi_scale.model import Model, covariate, diagram, latent, observed
from pavi_scale.plates import Plate

mpl.use("Agg")


def study() -> Model:
    return Model(
        Plate("subject"),
        Plate("session"),
        Plate("vertex"),
        sizes={"network": 7},
        mu=latent(lambda: Normal(0.0, 1.0), dims=("network", "feature")),
        eps=latent(lambda: HalfNormal(0.5), dims="network"),
        kappa=latent(lambda: LogNormal(0.0, 1.0)),
        mu_subject=latent(lambda mu, eps: Normal(mu, eps[:, None]), plates="subject", dims=("network", "feature")),
        mu_session=latent(lambda mu_subject: Normal(mu_subject, 1.0), plates=("subject", "session"), dims=("network", "feature")),
        rho=latent(lambda: Normal(0.0, 1.0), plates="vertex", dims="network"),
        label_logits=latent(lambda rho: Normal(rho, 1.0), plates=("subject", "vertex"), dims="network"),
        x=observed(
            lambda mu_session, label_logits, kappa: Normal(mu_session.sum(0) + label_logits.sum(), kappa),
            plates=("subject", "session", "vertex"),
            dims="feature",
        ),
    )


def school() -> Model:
    return Model(
        Plate("school"),
        Plate("student", within="school"),
        Plate("lecturer"),
        Plate("rating", within=("student", "lecturer")),
        m=latent(lambda: Normal(0.0, 1.0)),
        sc=latent(lambda m: Normal(m, 1.0), plates="school"),
        st=latent(lambda sc: Normal(sc, 1.0), plates="student"),
        le=latent(lambda: Normal(0.0, 1.0), plates="lecturer"),
        service=covariate(plates="rating"),
        y=observed(lambda st, le, service: Normal(st + le + service, 1.0), plates="rating"),
    )


def test_repr_shows_plates_dims_and_laws() -> None:
    lines = repr(study()).splitlines()
    assert lines[0] == "Model of 7 latent and 1 observed template variables"
    assert lines[1] == "  plates: subject; session; vertex   sizes: network=7"
    assert len(lines) == 2 + 8
    (law,) = [line for line in lines if " mu_subject[" in line]
    assert law.split() == ["latent", "mu_subject[subject,", "network,", "feature]", "~", "Normal(mu,", "eps[:,", "None])"]
    assert "student within school" in repr(school())
    assert max(map(len, lines)) <= 160


def test_repr_of_laws_without_source_names_the_parents() -> None:
    scope = {"Normal": Normal}
    law = eval("lambda mu: Normal(mu, 1.0)", scope)  # noqa: S307 (a law whose source no file holds)
    m = Model(Plate("g"), mu=latent(lambda: Normal(0.0, 1.0)), x=observed(law, plates="g"))
    assert "law of (mu)" in repr(m)


def test_describe_counts_ground_variables() -> None:
    table = study().describe({"subject": 1000, "session": 2, "vertex": 59_412, "feature": 32})
    assert table.loc["label_logits", "units"] == 59_412_000
    assert table.loc["label_logits", "numbers"] == 415_884_000
    assert table.attrs["latents"] == 415_884_000 + 59_412 * 7 + 1000 * 224 + 2000 * 224 + 224 + 7 + 1
    with pytest.raises(InputError, match="'subject'"):
        study().describe({"feature": 2})


@pytest.mark.parametrize("make", [study, school])
def test_dot_has_every_node_edge_and_cluster(make: object) -> None:
    model = make()
    source = model.to_graphviz().source
    assert source == diagram.dot_source(model)
    assert source.count("{") == source.count("}")
    for v in model.variables.values():
        assert source.count(f'"{v.name}" [') == 1
        assert all(f'"{p}" -> "{v.name}";' in source for p in v.parents)
    for plate in model.plates:
        assert plate in source


@pytest.mark.parametrize("make", [study, school])
def test_each_rectangle_holds_its_own_variables_alone(make: object) -> None:
    model = make()
    place = diagram.positions(model)
    assert len(set(place.values())) == len(place)
    boxes = diagram.plate_boxes(model, place)
    inside = {name: own for own, names in diagram.regions(model) for name in names}
    for (plate, (left, bottom, right, top)), name in itertools.product(boxes.items(), place):
        x, y = place[name]
        assert (left < x < right and bottom < y < top) == (plate in inside[name]), (plate, name)
    assert all(min(abs(a - b) for a, b in zip(p, q, strict=True)) > 1e-3 for p, q in itertools.combinations(boxes.values(), 2)), "edges of two plates coincide"


def test_plot_draws_a_shape_for_each_variable_and_plate() -> None:
    ax = study().plot()
    try:
        names = [type(p).__name__ for p in ax.patches]
        assert names.count("Ellipse") == 8
        assert names.count("FancyBboxPatch") == 3
        assert names.count("FancyArrowPatch") == sum(len(v.parents) for v in study().variables.values())
        assert {"subject", "session", "vertex"} <= {t.get_text() for t in ax.texts}
    finally:
        plt.close(ax.figure)
