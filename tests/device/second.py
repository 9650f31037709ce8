"""A second device: torch calls it "second"; it computes by the processor's own kernels, and refuses what a graphics card would.

Tensors on it cannot be read as NumPy arrays, and no operation takes some tensors from here and some from there (a single number may come from the
processor, as for CUDA). Whatever is right here in both respects has the processor's bits. Importing this module registers it for the process.
"""

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
FREE = 1 << 34  # bytes that it says it has
# What brings tensors over, and selections, which take positions from the processor on CUDA, too.
CROSSING = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}


class Module(_DummyBackendModule):
    def mem_get_info(self, device=None):
        return FREE, FREE


_setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)
done = {}  # operation -> how often it was done there


class Second(torch.Tensor):
    """A tensor there; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __init__(self, held):
        pass

    def __repr__(self):
        return f"Second({self.held!r})"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return perform(operation, args, kwargs or {})


def perform(operation, args, kwargs):
    there, away = [], []

    def held(x):
        if isinstance(x, Second):
            there.append(x)
            return x.held
        if isinstance(x, torch.Tensor):
            away.append(x)
        return [held(y) for y in x] if isinstance(x, list | tuple) else x

    own_args, own_kwargs = [held(x) for x in args], {k: held(x) for k, x in kwargs.items()}
    name = operation._schema.name
    if there and name not in CROSSING and any(t.dim() for t in away):
        raise RuntimeError(f"{name}: some tensors are on {DEVICE}, others on the processor: {[tuple(t.shape) for t in away]}")
    target, stays = kwargs.get("device"), True
    if target is not None:
        stays, own_kwargs["device"] = torch.device(target).type == NAME, torch.device("cpu")
    out = operation(*own_args, **own_kwargs)
    if any(t.held.shape != t.shape for t in there):
        raise NotImplementedError(f"{name} resized a tensor: this device cannot tell torch so")
    done[name] = done.get(name, 0) + 1
    known = {id(t.held): t for t in there} | {id(t): t for t in away}  # what an operation in place returns is what it was given

    def wrapped(x):
        if isinstance(x, torch.Tensor):
            return known.get(id(x)) if id(x) in known else Second(x) if stays else x
        return type(x)(wrapped(y) for y in x) if type(x) in (list, tuple) else x

    return wrapped(out)


_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda operation, *args, **kwargs: perform(operation, args, kwargs), "PrivateUse1")
_factories = torch.library.Library("aten", "IMPL")
for _name in ("arange", "arange.start", "arange.start_step"):  # torch would make it empty and resize it
    _overload = getattr(torch.ops.aten.arange, _name.partition(".")[2] or "default")
    _factories.impl(_name, lambda *args, _overload=_overload, **kwargs: perform(_overload, args, kwargs), "PrivateUse1")


def _made_there(make, keeps):
    """torch's `tensor` and `as_tensor` do not reach a device that is written in Python: made here, then brought over."""

    def made(data, *args, device=None, requires_grad=False, **kwargs):
        own = keeps and isinstance(data, torch.Tensor)
        device = torch.device(device) if device is not None else data.device if own else torch.empty(0).device
        if device.type != NAME:
            return make(data, *args, device=device, **kwargs, **({"requires_grad": True} if requires_grad else {}))
        out = (data.to(*args, **kwargs) if isinstance(data, Second) else make(data, *args, device="cpu", **kwargs)).to(device)
        return out.detach().clone().requires_grad_() if requires_grad else out

    return made


torch.tensor, torch.as_tensor = _made_there(torch.tensor, False), _made_there(torch.as_tensor, True)
