"""Plain data comes back from any pickle of it, and nothing else is called."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch

from tasks.pickles import load_plain

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAYS = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
    "floats": np.linspace(0, 1, 6).reshape(2, 3),
    "Fortran order": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "not contiguous": np.arange(12).reshape(3, 4)[:, ::2],
    "empty": np.zeros((0, 3), np.float16),
    "no axes": np.array(3),
    "scalar": np.float32(2.5),
    "other byte order": np.arange(5, dtype=">i4"),
    "bool": np.array([True, False]),
    "text": np.array(["cat", "öre"]),
    "bytes": np.array([b"cat", b"\xff"]),
    "complex": np.array([1 + 2j]),
}
PLAIN = {
    "class_dict": {"cat": [0, 1], "dog": (2, 3)},
    "numbers": [1, 2**80, -1.5, True, None],
    "text": ["", "cat", "öre"],
    "bytes": [b"", b"\xff\x00", bytearray(b"x")],
    "sets": {1, 2},
    "range": range(3),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, a=[1]),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_with_its_type_shape_and_values(name, protocol):
    expected = ARRAYS[name]
    loaded = load_plain(pickle.dumps({"x": expected}, protocol))["x"]
    got = np.asarray(loaded)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_comes_back_as_it_was(name, protocol):
    loaded = load_plain(pickle.dumps(PLAIN[name], protocol))
    assert loaded == PLAIN[name]
    assert type(loaded) is type(PLAIN[name])


def test_a_pickle_of_python_2_and_an_old_numpy_is_read():
    """What protocol 2 of Python 2 writes for {'image_data': np.uint8([[1], [255]])}."""
    data = (
        b"\x80\x02}U\nimage_datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x02K\x01\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\xfftbs."
    )
    assert np.asarray(load_plain(data)["image_data"]).tolist() == [[1], [255]]


class Call:
    """Its pickle calls a function."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


class Local:
    pass


REFUSED = {
    "a command": (Call(os.system, "touch called"), r"(posix|nt)\.system"),
    "code": (Call(eval, "open('called', 'w')"), r"builtins\.eval"),
    "a file": (Call(open, "called", "w"), r"\w+\.open"),
    "an attribute": (Call(getattr, "x", "join"), r"builtins\.getattr"),
    "an import": (Call(__import__, "os"), r"builtins\.__import__"),
    "NumPy's reader": (Call(np.load, "called"), r"numpy\.load"),
    "a class": (Local(), r"test_pickles\.Local"),
    "a tensor": (torch.zeros(2), r"torch\._utils\._rebuild_tensor_v2"),
    "a function": (print, r"builtins\.print"),
    "deep inside": ({"a": [{"b": Call(os.system, "touch called")}]}, r"(posix|nt)\.system"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name_and_not_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, named = REFUSED[name]
    with pytest.raises(pickle.UnpicklingError, match=rf"it names \S*{named}, .*was not called"):
        load_plain(pickle.dumps(value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.array([1, "a"], object),
        np.zeros(2, [("a", int), ("b", object)]),
        np.array(["2020-01-01"], "M8[D]"),
    ],
)
def test_arrays_of_objects_records_and_dates_are_refused(array, protocol):
    with pytest.raises(pickle.UnpicklingError, match=r"an array of '[OVM]\d+', expected numbers"):
        load_plain(pickle.dumps(array, protocol))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x02K\x02\x86", b"K\x02K\x03\x86"),
        (b"K\x02K\x02\x86", b"J\xff\xff\xff\x7fK\x02\x86"),
        (b"K\x02K\x02\x86", b"K\x05J\xff\xff\xff\xff\x86"),
        (b"u1", b"i8"),
        (b"u1", b"c8"),
    ],
)
def test_an_array_that_claims_other_memory_than_it_has_is_refused(old, new):
    data = pickle.dumps(np.zeros((2, 2), np.uint8), 4)
    assert data.count(old) == 1
    with pytest.raises(ValueError, match=r"buffer size|cannot reshape"):
        load_plain(data.replace(old, new))
