"""Every error survives pickle: its class, its facts, its sentence."""

from __future__ import annotations

import errno
import inspect
import pickle
from typing import Any

import pytest

from ringpool import errors
from ringpool.errors import RingpoolError

SAMPLES: dict[str, Any] = {"int": 5, "float": 1.5, "str": "caf\udce9/a.txt", "bool": True}

CLASSES = sorted(
    (kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RingpoolError)),
    key=lambda kind: kind.__name__,
)


def sample(kind: type[RingpoolError]) -> RingpoolError:
    """One of that class, with an argument of the annotated type for each parameter."""
    if kind.__init__ is RingpoolError.__init__:
        return kind("why")
    arguments = []
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        name = str(parameter.annotation).split("|")[0].strip()
        arguments.append(errno.ENOSPC if parameter.name == "error" else SAMPLES[name])
    return kind(*arguments)


def facts(error: RingpoolError) -> dict[str, Any]:
    """Its attributes, those of ``OSError`` included."""
    found = {name: value for name, value in vars(error).items() if name != "__notes__"}
    if isinstance(error, OSError):
        found |= {"errno": error.errno, "filename": error.filename, "strerror": error.strerror}
    return found


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_error_is_the_same_after_pickle(kind: type[RingpoolError], protocol: int) -> None:
    error = sample(kind)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert facts(again) == facts(error)
    assert str(again) == str(error)
    assert again.args == error.args


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_notes_of_an_error_survive_pickle(kind: type[RingpoolError]) -> None:
    error = sample(kind)
    error.add_note("attempt 1 failed")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["attempt 1 failed"]


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if issubclass(kind, errors.FileOperationError)], ids=lambda kind: kind.__name__
)
def test_a_file_error_names_path_and_operation(kind: type[errors.FileOperationError]) -> None:
    error = sample(kind)
    assert isinstance(error, errors.FileOperationError)
    assert isinstance(error, OSError)
    assert error.path == error.filename == SAMPLES["str"]
    assert error.errno == errno.ENOSPC
    assert error.path in str(error)
    assert error.operation in str(error)
