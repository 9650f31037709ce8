"""The guide: structured, plate-amortised variational posterior of a model."""

from pavi_scale.guide.blocks import Block, Component, choose_free, make_blocks, make_components
from pavi_scale.guide.guide import Guide

__all__ = ["Block", "Component", "Guide", "choose_free", "make_blocks", "make_components"]
