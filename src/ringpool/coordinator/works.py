"""From what a job is told of its inputs to the works of a run: each file with its outputs and its own parameters.

    inputs --list_inputs, lists, the program's iterator--> files --patterns--> outputs --> Work

Nothing is drawn before it is asked for; what is wrong with an input is raised when that one's turn comes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ringpool.coordinator.functiondigest import encode_sorted
from ringpool.coordinator.inputs import (
    OWN_DIRECTORY,
    InputFile,
    largest_first,
    list_inputs,
    relpaths_are_unique,
)
from ringpool.coordinator.joboptions import JobOptions
from ringpool.coordinator.jobwork import Work
from ringpool.coordinator.lists import relpath_of
from ringpool.coordinator.outputs import NamedOutputs, Scope, hash_of, with_outputs
from ringpool.coordinator.reach import Reach, roots_of
from ringpool.errors import OutputPatternError, ParameterError
from ringpool.workers import jobtasks, tasks
from ringpool.workers.files import naming

if TYPE_CHECKING:
    from ringpool.coordinator.knowninputs import KnownInputs
    from ringpool.workers.templates import Template

FilePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Inputs = FilePath | Sequence[FilePath] | Iterable[FilePath | InputFile]
FIELDS_OF_FILE = frozenset({"relpath", "parent", "index", "hash"})
_ENCODING, _ENCODING_ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_APART = "write them to a directory of their own, or say what the inputs are (--include '*.txt', --exclude '*.gz')"
_OWN_DIRECTORY = os.fsencode(f"/{OWN_DIRECTORY}/")


class Works:
    """A work for each of ``inputs``, as they are drawn.

    ``name``, ``signature`` and ``digest`` of the function (with its parameters, whose names are ``given``);
    ``template``: of the command, or None; ``outputs``: None for values; ``known``: inputs that its tasks have moved
    away; ``include``, ``exclude``: globs for what a walk finds.
    """

    def __init__(
        self,
        inputs: Inputs,
        name: str,
        signature: tasks.Signature,
        digest: bytes,
        given: Collection[str],
        template: Template | None,
        outputs: NamedOutputs | None,
        options: JobOptions,
        known: KnownInputs,
        *,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
    ) -> None:
        self._inputs = inputs
        self._name = name
        self._signature = signature
        self._digest = digest
        self._wanted = signature.required - set(given)  # of each file
        self._template = template
        self._outputs = outputs
        self._options = options
        self._known = known
        self._include, self._exclude = include, exclude

    def __iter__(self) -> Iterator[Work]:
        """Anew, from the first one."""
        _real.cache_clear()  # links may lead elsewhere than in an earlier run
        files, one_source, reach = self._files()
        if self._options.largest_first:
            files = largest_first(files)
        here = os.getcwdb()
        pairs: Iterator[tuple[InputFile, tuple[str, ...]]]
        if self._outputs is None:
            pairs = ((file, ()) for file in files)
        else:
            pairs = with_outputs(
                files, self._outputs, one_source=one_source, in_walk_order=not self._options.largest_first
            )
        fields = self._fields()
        for index, (file, outputs) in enumerate(pairs):
            own: dict[str, Any] = dict(file.parameters or ())
            if own:
                if self._template is not None:
                    self._template.refuse_own(own)
                own = self._validated(file.path, own)
            if self._wanted and not self._wanted <= own.keys():
                missing = min(self._wanted - own.keys())
                raise ParameterError(self._name, f"input {file.path}: parameter {missing!r} is missing")
            if fields is not None:
                own["fields"] = fields(file, index)
            targets = tuple([_absolute(output, here) for output in outputs])
            if own:
                own_digest = blake2b(encode_sorted(own), digest_size=16).digest()
                packed, parameters = (
                    tasks.pack_parameters(self._name, own),
                    jobtasks.parameters_digest(self._digest, own_digest),
                )
            else:
                own_digest, packed, parameters = b"", b"", self._digest
            source = _absolute(file.path, here) if self._options.fingerprints else naming.encoded(file.path)
            apart: tuple[int, ...] = ()
            for number, target in enumerate(targets):
                if target == source:
                    self._refuse_output(number, target, " of itself; write the outputs somewhere else")
                if reach is not None and reach.takes(os.fsdecode(target)):
                    self._refuse_output(
                        number, target, ", which is an input too, or would be one of the next run: " + _APART
                    )
                if reach is not None and reach.leads_to_inputs(os.fsdecode(target)):
                    apart = (*apart, number)
                if _OWN_DIRECTORY in target:
                    self._refuse_output(number, target, f", and {OWN_DIRECTORY} is where ledgers and locks are")
            yield Work(file.path, source, targets, packed, own_digest, parameters, apart)

    def _validated(self, path: str, own: dict[str, Any]) -> dict[str, Any]:
        try:
            return tasks.validate(self._name, self._signature, own)
        except ParameterError as error:
            raise ParameterError(self._name, f"input {path}: {error.reason}") from None

    def _refuse_output(self, number: int, target: bytes, why: str) -> NoReturn:
        assert self._outputs is not None
        pattern = str(self._outputs.patterns[number].pattern)
        raise OutputPatternError(pattern, f"it makes the output {os.fsdecode(target)}{why}")

    @property
    def is_streamed(self) -> bool:
        """Whether the next input may be long in coming."""
        inputs = self._inputs
        sources = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
        if not isinstance(sources, (list, tuple)):
            return True
        return any(isinstance(one, str) and (one == "-" or one.startswith("@")) for one in sources)

    @property
    def origin(self) -> bytes:
        """The one source of the inputs, where no two inputs that it may ever have can have one output, the first of
        theirs; else empty.
        """
        inputs = self._inputs
        sources = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
        if self._outputs is None or not isinstance(sources, (list, tuple)) or len(sources) != 1:
            return b""
        [source] = sources
        if not isinstance(source, (str, Path)) or not relpaths_are_unique([source]):
            return b""
        is_numbered = "index" in self._outputs.patterns[0].fields
        if is_numbered or self._outputs.scopes(one_source=True, in_walk_order=False)[0] is not Scope.NOWHERE:
            return b""
        return _absolute(os.fspath(source), os.getcwdb())

    @property
    def roots(self) -> tuple[bytes, ...]:
        """Directories in which inputs are: links in the places of outputs that lead there are not followed."""
        inputs = self._inputs
        sources = [inputs] if isinstance(inputs, (str, bytes, os.PathLike)) else inputs
        if not isinstance(sources, (list, tuple)):
            return ()
        paths = [one.path if isinstance(one, InputFile) else one for one in sources]
        named = [one if isinstance(one, str) else Path(os.fsdecode(one)) for one in paths]
        return tuple(map(os.fsencode, roots_of(named)))

    def _files(self) -> tuple[Iterator[InputFile], bool, Reach | None]:
        """The files; whether no two have one relpath; what says which outputs are among the inputs."""
        inputs = self._inputs
        bases = self._outputs.bases if self._outputs is not None else ()
        if isinstance(inputs, (str, bytes, os.PathLike)):
            inputs = [inputs]
        if isinstance(inputs, (list, tuple)) and not isinstance(inputs, InputFile):
            # Only text may be a list (``@name``, ``-``): a path object is what it says.
            sources = [
                one if isinstance(one, str) else Path(os.fsdecode(one))
                for one in inputs
                if not isinstance(one, InputFile)
            ]
            if len(sources) < len(inputs):
                files = [_as_input_file(item) for item in inputs]
                return iter(files), False, Reach([Path(file.path) for file in files], bases, names_only=True)
            if not self._include and not self._exclude:
                self._require_apart(sources)
            reach = Reach(sources, bases, include=self._include, exclude=self._exclude)
            here = os.getcwdb()
            with contextlib.closing(self._known) as known:
                files = list_inputs(
                    sources,
                    exclude_under=bases,
                    include=self._include,
                    exclude=self._exclude,
                    is_known=lambda source: _absolute(source, here) in known,
                    have_matched=known.have,
                    on_link=reach.follow,
                )
            return files, relpaths_are_unique(sources), reach
        return map(_as_input_file, inputs), False, None

    def _require_apart(self, sources: Sequence[str | Path]) -> None:
        """Raise ``OutputPatternError`` where the next run would take outputs for inputs."""
        roots = {os.path.realpath(source) for source in sources if os.path.isdir(source)}
        for pattern in self._outputs.patterns if self._outputs is not None else ():
            if os.path.realpath(pattern.base) in roots:
                raise OutputPatternError(
                    pattern.pattern,
                    f"its outputs lie among the inputs, and the next run would take them for inputs: {_APART}",
                )

    def _fields(self) -> Callable[[InputFile, int], dict[str, str]] | None:
        """What a command needs to know of a file besides its paths."""
        if self._template is None:
            return None
        wanted = self._template.fields & FIELDS_OF_FILE
        if not wanted:
            return None

        def fields(file: InputFile, index: int) -> dict[str, str]:
            known = {
                "relpath": file.relpath,
                "parent": file.relpath.rpartition("/")[0],
                "index": str(index),
                "hash": hash_of(file.relpath),
            }
            return {name: known[name] for name in wanted}

        return fields


def _as_input_file(item: FilePath | InputFile) -> InputFile:
    if isinstance(item, InputFile):
        return item
    path = os.fsdecode(item)
    return InputFile(path, relpath_of(path))


def _absolute(path: str, directory: bytes) -> bytes:
    try:
        raw = path.encode(_ENCODING, _ENCODING_ERRORS)  # os.fsencode, at half the price
    except UnicodeEncodeError:
        raise naming.not_encodable(path) from None
    if raw[:1] != b"/":
        if not raw:
            raise naming.unusable(raw, "it is empty")
        raw = os.path.join(directory, raw)
    if b"/.." in raw:
        parent, _, name = raw.rpartition(b"/")
        return os.path.join(_real(parent), name) if name != b".." else naming.absolute(raw)
    return os.path.normpath(raw) if b"/." in raw or b"//" in raw else raw


_real = functools.lru_cache(maxsize=1024)(naming.absolute)
