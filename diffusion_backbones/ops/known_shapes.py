"""Operations on ``meta``, each computed once: they give shapes alone, take up to milliseconds in Python, and a network
repeats the same few hundred of them thousands of times.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class KnownShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, an operation on ``meta`` tensors of known shapes is not computed again.

    Views, operations in place, and those on tensors of other kinds or with values pass. Other modes, such as PyTorch's
    counter of operations, see what runs if they are entered later.
    """

    known: ClassVar[dict[Any, tuple[bool, list[tuple[Any, ...]]]]] = {}
    """Operation and what it was given -> whether it gives a tuple, and the shape, strides and dtype of its tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            key = (func, _described(args), _described(list(kwargs.items())))
            found = self.known.get(key)
        except TypeError:  # a tensor of another kind, or something without a hash
            return func(*args, **kwargs)
        if found is None:
            output = func(*args, **kwargs)
            several = isinstance(output, tuple)
            outputs = output if several else [output]
            if all(map(_is_plain, outputs)) and not _shares_memory(func):
                self.known[key] = several, [(x.shape, x.stride(), x.dtype) for x in outputs]
            return output
        several, layouts = found
        new = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in layouts]
        return tuple(new) if several else new[0]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not _is_plain(value):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value  # 1, 1.0 and True are equal


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.is_meta


def _shares_memory(func: Any) -> bool:
    schema = func._schema
    return schema.is_mutable or any(returned.alias_info is not None for returned in schema.returns)
