"""Which operations of a piece of code would make the CPU wait for a GPU, found without one.

Two ways to run the code: on fake CUDA tensors (`fake_cuda`), where no value exists, so that code whose shapes follow
from values fails at once; or on real CPU tensors, where only such operations are seen: there is no device to copy to.
"""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# The size or the value of what these return is known only once the device has got there.
_VALUES = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::_unique2",
    "torchvision::nms",
}
# With a tensor for a value: its number is read on the CPU.
_FILLS = {"aten::masked_fill", "aten::masked_fill_"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}

# Autograd starts a thread for each GPU at its first backward pass, and refuses to work in a fork from then on. Fake
# CUDA tensors make it believe in GPUs: it makes its first pass before there are any, for other tests fork.
torch.ones((), requires_grad=True).backward()


class Waits(TorchDispatchMode):
    """Records each operation that waits, as `name` or `name from -> to`.

    Attributes:
        found: what was recorded, in order.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        by_tensor = name in _FILLS and isinstance(args[2], torch.Tensor) and args[0].is_cuda and args[2].is_cuda
        if name in _VALUES or (name in _INDEXED and _by_mask(args)) or by_tensor:
            self.found.append(name)
        elif name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            arguments = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
            waits = source.device.type == "cuda" or not arguments.get("non_blocking", False)
            if source.device.type != result.device.type and waits:
                self.found.append(f"{name} {source.device.type} -> {result.device.type}")
        return result


def _by_mask(args):
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


@contextmanager
def fake_cuda():
    """Let tensors be made on `cuda` that have everything but values, whether or not there is a GPU.

    Yields the record of what would wait.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits
