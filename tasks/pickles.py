"""Pickles of plain data, read without running anything that they name.

A pickle is a program that may call any function by its name. Here it finds a few harmless names
only: those that dictionaries, lists, strings, numbers and NumPy arrays are pickled with. Even of
these, NumPy's own functions are replaced, because they trust what the pickle says of memory.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# The types that plain data needs, by the names that Python 3 and Python 2 have for them.
PLAIN_TYPES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": collections.defaultdict,
    "__builtin__.xrange": range,
}
for _type in (bytearray, bytes, dict, list, range, set):
    PLAIN_TYPES[f"builtins.{_type.__name__}"] = _type
    PLAIN_TYPES[f"__builtin__.{_type.__name__}"] = _type
# Bool, integers, floats and complex numbers with their bytes, byte strings and strings.
PLAIN_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)|[SU]\d+")


def load_plain(data: bytes) -> Any:
    """The dictionaries, lists, strings, numbers and arrays in a pickle of Python 2 or 3.

    Arrays come as objects that `np.asarray` takes. Their types are bool, numbers and strings.

    Raises:
        pickle.UnpicklingError: If the pickle names anything else. It is not called.
        Exception: What `pickle` raises for damaged data, which can be any exception.

    Example:
        >>> load_plain(pickle.dumps({"cat": [0, 1]}))
        {'cat': [0, 1]}
        >>> load_plain(pickle.dumps(print))
        Traceback (most recent call last):
            ...
        _pickle.UnpicklingError: it names builtins.print, which is no plain data and was not called
    """
    # In a pickle of Python 2, every byte of an array or a string is one character of latin1.
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


def foreign_name(name: str) -> pickle.UnpicklingError:
    """The error for a pickle that names anything else.

    Example:
        >>> foreign_name("os.system")
        UnpicklingError('it names os.system, which is no plain data and was not called')
    """
    return pickle.UnpicklingError(f"it names {name}, which is no plain data and was not called")


def numpy_stand_ins() -> list[Any]:
    """What `torch.serialization.safe_globals` takes, to read arrays as `load_plain` does.

    Example:
        >>> import torch
        >>> file = io.BytesIO()
        >>> torch.save({"cat": np.arange(3)}, file)
        >>> with torch.serialization.safe_globals(numpy_stand_ins()):
        ...     loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        >>> np.asarray(loaded["cat"])
        array([0, 1, 2])
    """
    named = _PlainUnpickler(io.BytesIO()).numpy_names()
    renamed = {name.replace("numpy.core.", "numpy._core."): value for name, value in named.items()}
    return [*((value, name) for name, value in {**named, **renamed}.items()), _Array, _Dtype]


class _PlainUnpickler(pickle.Unpickler):
    """Gives plain types, and its own methods in place of NumPy's functions.

    A pickle may write attributes to what it finds. This changes neither what a built-in type does
    nor what a bound method does.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = PLAIN_TYPES | self.numpy_names() | {"_codecs.encode": self._encode}
        # NumPy 2 renamed the module `core` to `_core`.
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full_name not in known:
            raise foreign_name(f"{module}.{name}")
        return known[full_name]

    def numpy_names(self) -> dict[str, Callable[..., Any]]:
        """What stands for each of NumPy's names."""
        return {
            "numpy.ndarray": self._nothing,
            "numpy.dtype": self._dtype,
            "numpy.core.multiarray._reconstruct": self._empty_array,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._from_buffer,
        }

    def _nothing(self) -> None:
        """The class of the arrays, which `_empty_array` is given and does not need."""

    def _dtype(self, code: str, *options: object) -> _Dtype:
        return _Dtype(code)

    def _empty_array(self, *arguments: object) -> _Array:
        return _Array()

    def _scalar(self, dtype: _Dtype, data: bytes | str) -> Any:
        return _decode(data, dtype, shape=(), order="C")[()]

    def _from_buffer(
        self,
        data: bytes | bytearray,
        dtype: _Dtype,
        shape: tuple[int, ...],
        order: str,
    ) -> np.ndarray:
        return _decode(data, dtype, shape, order)

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it has bytes encoded as {encoding!r}, expected 'latin1'")
        return text.encode("latin1")


class _Dtype:
    """The type of an array's elements: a code of `PLAIN_DTYPE`, and the order of their bytes."""

    __slots__ = ("_byte_order", "_code")

    def __init__(self, code: str) -> None:
        if not PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, expected numbers or text")
        self._code = code
        self._byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._byte_order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self._byte_order + self._code)


class _Array:
    """An array that is filled by its state."""

    __slots__ = ("_values",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self._values = _decode(data, dtype, shape, "F" if is_fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._values, dtype) if copy else np.asarray(self._values, dtype)


def _decode(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    """An array whose size `data` must have exactly, or NumPy raises."""
    if isinstance(data, str):
        data = data.encode("latin1")
    return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)
