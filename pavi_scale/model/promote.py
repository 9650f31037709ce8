"""One floating-point type for laws that mix two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class Promote(TorchFunctionMode):
    """Mixed floating-point dtypes are brought to the widest: laws may capture single-precision constants of their module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.is_floating_point()]
        if len({t.dtype for t in tensors}) > 1:
            args, kwargs = tree_map(lambda a: a.to(torch.float64) if isinstance(a, Tensor) and a.is_floating_point() else a, (args, kwargs))
        return func(*args, **kwargs)
