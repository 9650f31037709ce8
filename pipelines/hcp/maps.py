r"""Parcellation maps with uncertainty, written as CIFTI files from a fitted posterior.

A vertex has label l with probability p_l = E[softmax(logits)_l], the expectation over the posterior of its label logits: of `rho` for the group, of
`label_logits` for a subject. Written are the most probable label, its probability, the entropy -sum_l p_l log p_l (nats; log 7 where nothing is known), and all
p_l. The expectation is taken over lazy draws, or over independent normals with the stored means and standard deviations: much faster, but blind to how the
logits of one vertex depend on each other. Each file says which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import ndtri, softmax
from scipy.stats import qmc

import pavi_scale as ps
from pavi_scale.errors import InputError
from pipelines.hcp.figures import COLOURS
from pipelines.hcp.storing import check_free, storing
from pipelines.hcp.surfaces import Surface, write_labels, write_scalars

POINTS = 64
_PIECE = 512  # vertices worked on at once: what is made of them stays in the cache
_DRAWN = 4096  # vertices drawn at once
_SUBJECTS = 16  # whose stored moments are read at once

Tell = Callable[[str, int, int], object]


def normal_points(dims: int, count: int = POINTS) -> np.ndarray:
    """Evenly spread standard normal points (scrambled Sobol sequence and its mirror image), (count, dims), float32."""
    half = ndtri(qmc.Sobol(dims, seed=0).random(count // 2))
    return np.concatenate([half, -half]).astype(np.float32)


def label_probability(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """E[softmax(y)] of independent normals y, (vertex, network), from their means and standard deviations of the same shape."""
    points, out = normal_points(mean.shape[1])[:, :, None], np.empty_like(mean)
    for start in range(0, len(mean), _PIECE):
        part = slice(start, start + _PIECE)
        y = mean[part].T + sd[part].T * points
        y -= y.max(1, keepdims=True)
        np.exp(y, out=y)
        y /= y.sum(1, keepdims=True)
        out[part] = y.mean(0).T
    return out


def entropy(probability: np.ndarray) -> np.ndarray:
    """-sum_l p_l log p_l in nats, (vertex,), of (vertex, network)."""
    return -(probability * np.log(np.maximum(probability, 1e-30))).sum(-1)


def surface_of(posterior: ps.Posterior) -> Surface:
    """The vertices' places as the cohort tells them; one structure without mesh where it does not."""
    cohort = posterior.datatree["observed_data"]
    if "structure" not in cohort.coords or "surface_vertex" not in cohort.coords:
        return Surface.plain(cohort.sizes["vertex"])
    structure = cohort["structure"]
    return Surface(structure.values.astype(object), cohort["surface_vertex"].values.astype(np.int32), dict(structure.attrs["mesh_vertices"]))


def write_maps(posterior: ps.Posterior, out: Path, subjects: Sequence[str] | None = None, draws: int = 0, tell: Tell | None = None) -> list[Path]:
    """Write maps of the group and of subjects, in the layout of a BIDS derivative.

    `group_dseg.dlabel.nii` and `sub-*/sub-*_dseg.dlabel.nii` hold the most probable labels (1 to 7), `..._probseg.dscalar.nii` beside them the maps
    "probability", "entropy (nats)" and one for each network.

    Args:
        posterior: A finished run of the study.
        out: Folder; made unless it is there.
        subjects: Labels of subjects (numbers from 0 where the cohort has none); None for all, empty for the group alone.
        draws: Lazy draws to average over; 0 to use the stored moments.
        tell: Called with what is being written, and how many subjects of how many are.

    Returns:
        The files.

    Raises:
        InputError: No such subject, or `posterior` is of another model.
        PlanRefused: The disk has no room; both figures are named.
    """
    tree = posterior.datatree
    if "posterior_mean" not in tree.children or not {"rho", "label_logits"} <= set(tree["posterior_mean"].data_vars):
        raise InputError("the run holds no parcellation", where=posterior.run, expected="stored moments of 'rho' and 'label_logits'")
    if not 0 <= draws <= (most := tree["posterior"].sizes["draw"]):
        raise InputError("the run has not as many draws", where="--draws", expected=f"0 to {most}", got=draws)
    surface = surface_of(posterior)
    names = _subject_names(tree["posterior_mean"].to_dataset())
    chosen = _chosen(names, subjects, tree["posterior_mean"].to_dataset())
    networks = tree["posterior_mean"]["rho"].sizes["network"]
    check_free(out, (len(chosen) + 1) * 4 * len(surface) * (networks + 3))
    files = []
    with storing("the maps cannot be written", out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "dataset_description.json").write_text(json.dumps(_description(posterior, draws), indent=1) + "\n")
        files += _write(out / "group", surface, _probabilities(tree, "rho", {}, draws), draws)
        for n, (position, probability) in enumerate(_of_subjects(tree, chosen, draws)):
            folder = out / f"sub-{names[position]}"
            folder.mkdir(exist_ok=True)
            files += _write(folder / folder.name, surface, probability, draws)
            if tell:
                tell("maps", n + 1, len(chosen))
    return files


def _subject_names(moments: xr.Dataset) -> list[str]:
    """Labels of the subjects as they may stand in file names; numbers from 1 where there are none, or where they would be the same."""
    size = moments["label_logits"].sizes["subject"]
    names = [re.sub("[^A-Za-z0-9]", "", str(s)) for s in moments["subject"].values] if "subject" in moments.coords else []
    usable = len(set(map(str.lower, names))) == size and all(names)
    return names if usable else [f"{i + 1:0{len(str(size))}d}" for i in range(size)]


def _chosen(names: Sequence[str], subjects: Sequence[str] | None, moments: xr.Dataset) -> list[int]:
    """Positions of subjects."""
    if subjects is None:
        return list(range(len(names)))
    labels = [str(s) for s in moments["subject"].values] if "subject" in moments.coords else [str(i) for i in range(len(names))]
    if unknown := [s for s in subjects if s not in labels]:
        raise InputError("no such subject", where="--subjects", expected=f"labels such as {labels[:3]}", got=unknown[:3])
    return [labels.index(s) for s in subjects]


def _of_subjects(tree: xr.DataTree, chosen: Sequence[int], draws: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position, label probabilities) of each subject; stored moments are read for several at once, whose chunks they share."""
    if draws:
        yield from ((i, _probabilities(tree, "label_logits", {"subject": i}, draws)) for i in chosen)
        return
    for start in range(0, len(chosen), _SUBJECTS):
        some = list(chosen[start : start + _SUBJECTS])
        mean, sd = (tree[g]["label_logits"].isel(subject=some).values for g in ("posterior_mean", "posterior_sd"))
        yield from ((i, label_probability(m, s)) for i, m, s in zip(some, mean, sd, strict=True))


def _probabilities(tree: xr.DataTree, latent: str, at: dict[str, int], draws: int) -> np.ndarray:
    """Label probabilities of one map, (vertex, network)."""
    if not draws:
        mean, sd = (tree[g][latent].isel(at).values for g in ("posterior_mean", "posterior_sd"))
        return label_probability(mean, sd)
    lazy = tree["posterior"][latent].isel(at)
    cuts = range(0, lazy.sizes["vertex"], _DRAWN)
    return np.concatenate([softmax(lazy.isel(chain=0, draw=slice(draws), vertex=slice(i, i + _DRAWN)).values, -1).mean(0) for i in cuts])


def _how(draws: int) -> str:
    return f"over {draws} draws of the posterior" if draws else "over independent normals with the posterior's stored means and standard deviations"


def _write(stem: Path, surface: Surface, probability: np.ndarray, draws: int) -> list[Path]:
    networks = probability.shape[1]
    key = probability.argmax(1)
    table: dict[int, Any] = {0: ("unknown", (1.0, 1.0, 1.0, 0.0))}
    table |= {k + 1: (f"network {k + 1}", tuple(map(float, COLOURS(k)))) for k in range(networks)}
    labels, scalars = stem.with_name(f"{stem.name}_dseg.dlabel.nii"), stem.with_name(f"{stem.name}_probseg.dscalar.nii")
    write_labels(labels, surface, "most probable network", key + 1, table, f"Largest expected label probability, {_how(draws)}")
    maps = {"probability": probability.max(1), "entropy (nats)": entropy(probability)}
    maps |= {f"network {k + 1}": probability[:, k] for k in range(networks)}
    write_scalars(scalars, surface, maps, f"Expected label probability, {_how(draws)}")
    return [labels, scalars]


def _description(posterior: ps.Posterior, draws: int) -> dict[str, Any]:
    return {
        "Name": "Parcellation with uncertainty",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "pavi-scale", "Version": ps.__version__, "Description": f"Label probabilities: expectation of the softmax {_how(draws)}"}],
        "SourceDatasets": [{"URL": str(posterior.run)}],
        "Status": posterior.status,
    }
