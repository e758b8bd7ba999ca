"""A batch job: a function or a command over very many files, outputs that appear whole, and a ledger.

    lock -> ledger -> what dead runs left: drained, staging removed -> pool -> JobRun -> drained again -> report

    <directory>/.ringpool/ledger.db    what is done, and what failed
                         /job.lock     one run at a time, for as long as its process lives
                         /staging      outputs on their way, one directory for each run
                         /locks        of the paths, see ``workers.files.locks``

``directory`` is where the outputs go, or for a job without outputs the current one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ringpool import startup
from ringpool.coordinator import jobrun, signals, staging, verify
from ringpool.coordinator.contexts import require_importable, require_no_main_import
from ringpool.coordinator.functiondigest import function_digest
from ringpool.coordinator.inputs import OWN_DIRECTORY
from ringpool.coordinator.joblock import JobLock
from ringpool.coordinator.joboptions import JobOptions as JobOptions
from ringpool.coordinator.jobrun import JobRun, RunSettings, StopNow
from ringpool.coordinator.jobwork import Failure, Planned, Progress, Stops, Work
from ringpool.coordinator.knowninputs import KnownInputs
from ringpool.coordinator.ledger import Ledger
from ringpool.coordinator.ledgerrows import WITH_OUTPUTS
from ringpool.coordinator.outputs import NamedOutputs
from ringpool.coordinator.pool import Pool, WorkerLimits
from ringpool.coordinator.takeover import base_of, drain_into, take_over_dead_runs
from ringpool.coordinator.works import FIELDS_OF_FILE, Inputs as Inputs, Works
from ringpool.errors import OutputPatternError, ParameterError, RingpoolError, words_of
from ringpool.shm import blobs, layout, segment
from ringpool.shm.layout import Encoding
from ringpool.workers import jobtasks, tasks
from ringpool.workers.files import naming
from ringpool.workers.files.locks import PathLock
from ringpool.workers.jobtasks import COMMAND, JobSpec
from ringpool.workers.retry import RetryPolicy
from ringpool.workers.setup import Setup


class Report(msgspec.Struct, frozen=True):
    """What came of a run. ``progress``: the counts; ``failures``: the first of them; ``kinds``: all of them, counted;
    ``seconds``: it took; ``stopped``: why it took no more inputs, empty where it came to its end.
    """

    progress: Progress
    failures: tuple[Failure, ...]
    kinds: dict[str, int]
    seconds: float
    stopped: str

    @property
    def ok(self) -> bool:
        """Whether every file is done."""
        return not (self.progress.failed or self.progress.dead or self.stopped)


class Job:
    """``function`` (a function of a module's top level, or ``"module:qualname"``) or ``command`` over ``inputs``.

    ``inputs``: a file, directory or glob, or a sequence of them; or any other iterable of paths or ``InputFile``s,
    drawn as they are needed. ``output``: None, a pattern, or several by name, see ``outputs``. ``params`` go to every
    call. ``directory`` holds the ledger; it is where the outputs go, unless it is given. ``include``, ``exclude``:
    globs for what a walk finds. ``options``: those of ``JobOptions``.

    Raises at once what is wrong with function, command, parameters, patterns, options: nothing is begun then.
    """

    def __init__(
        self,
        function: tasks.TaskFunction | str | None = None,
        inputs: Inputs = (),
        output: str | Mapping[str, str] | None = None,
        *,
        command: str | None = None,
        params: Mapping[str, Any] | None = None,
        directory: str | os.PathLike[str] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        spec: bytes = b"",
        digest: bytes = b"",
        **options: Any,
    ) -> None:
        if startup.is_importing_main() and "_later" not in self.__dict__:
            # A global of the main module: its workers rarely use it.
            more = {"command": command, "params": params, "directory": directory, "include": include}
            more |= {"exclude": exclude, "spec": spec, "digest": digest, **options}
            self._later = functools.partial(Job.__init__, self, function, inputs, output, **more)
            return
        if (function is None) == (command is None):
            raise TypeError("a job has a function or a command: give one of them")
        self.options = JobOptions(**options)
        self.outputs = _outputs(output)
        self._template = None
        if command is not None:
            from ringpool.workers.templates import Template

            self._template = Template(command)
            self._template.refuse_own(params or {})
            function, params = COMMAND, {**(params or {}), "template": command}
        assert function is not None
        self.name, self._signature = tasks.describe(function)
        self._check_output()
        own = tasks.validate(self.name, self._signature, params or {})
        if self._template is not None:
            self._template.check_environment(own.get("environment") or {})
        self._parameters = tasks.pack_parameters(self.name, own)
        self._source = jobtasks.source_of(self.name)
        self.digest = digest or function_digest(self.name, self._source, own)  # what files are recorded as made by
        if directory is not None and not os.fspath(directory):
            raise ValueError("directory is empty; leave it out for the default, or write '.' for the current directory")
        self.directory = Path(directory if directory is not None else self.outputs.base if self.outputs else ".")
        self._works = Works(
            inputs,
            self.name,
            self._signature,
            self.digest,
            own.keys(),
            self._template,
            self.outputs,
            self.options,
            KnownInputs(self.directory, self.identity),
            include=tuple(include),
            exclude=tuple(exclude),
        )
        self._spec = spec
        self._run: JobRun | None = None
        self._stops: list[Stops] = []  # of the runs that have been called, and have not returned

    if not TYPE_CHECKING:  # for which each attribute is there

        def __getattr__(self, name: str) -> Any:
            """A worker asks a global of the main module for something, after all."""
            later = self.__dict__.get("_later")
            if later is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            self._later = None
            later()
            return getattr(self, name)

    @property
    def identity(self) -> str:
        """What makes two jobs of one directory the same: where their outputs go; without outputs, what they call."""
        if self.outputs is not None:
            names = self.outputs.names or ("",)
            patterns = (str(pattern.pattern) for pattern in self.outputs.patterns)
            return WITH_OUTPUTS + " ".join(
                f"{name}={os.fsdecode(naming.absolute(os.fsencode(p)))}"
                for name, p in zip(names, patterns, strict=True)
            )
        return f"values of {self.name if self._template is None else self._template.text}"

    def _check_output(self) -> None:
        signature = self._signature
        if self._template is not None:
            names = () if self.outputs is None else tuple(f"dst.{name}" for name in self.outputs.names) or ("dst",)
            self._template.check({"src", "name", "stem", "suffix", *FIELDS_OF_FILE, *names})
            return
        if self.outputs is None and signature.needs_output:
            raise ParameterError(self.name, "it has a parameter dst, and the job has no output: give one")
        if self.outputs is not None and not signature.takes_output:
            raise ParameterError(
                self.name, "it has no parameter dst, and an output is given: leave it out, or give the function a dst"
            )

    @property
    def _bases(self) -> tuple[Path, ...]:
        """The directories that outputs go to."""
        return self.outputs.bases if self.outputs is not None else ()

    # ---- looking only

    def plan(
        self,
        *,
        verify: verify.Level = "size",
        only: Callable[[Work], bool] | None = None,
        redo: Callable[[Work], bool] | None = None,
    ) -> Iterator[Planned]:
        """What a run would do with each file, and why. Nothing is changed, and nothing made."""
        require_no_main_import()
        if not (self.directory / ".ringpool" / "ledger.db").exists():
            ledger, job = None, 0
        else:
            ledger = Ledger.open(self.directory, create=False, read_only=True)
            job = next((found.id for found in ledger.jobs() if found.identity == self.identity), 0)
        try:
            works = filter(only, self._works) if only is not None else iter(self._works)
            run = JobRun(works, ledger, job, self._settings(verify), Progress(), redo=redo)
            yield from run.plan()
        finally:
            if ledger is not None:
                ledger.close()

    # ---- running

    def run(
        self,
        workers: int | None = None,
        *,
        mp_context: Any = None,
        verify: verify.Level = "size",
        only: Callable[[Work], bool] | None = None,
        redo: Callable[[Work], bool] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_row: Callable[[Work, tuple[Any, ...], Any], None] | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Do what is not done yet, with ``workers`` processes (default: one per core); a report.

        What the ledger has is looked at first, see ``verify``; ``redo`` says what is done again in any case, and
        ``only`` what is an input of this run at all. In the main thread, Ctrl-C stops the run as ``stop`` does, and is
        raised when it has ended. Raises ``JobBusyError`` where another run is under way there; what the inputs raise,
        once all before is done; what breaks the pool.
        """
        require_no_main_import()  # before anything is looked at, made, or found busy by whose worker this is
        require_importable(self.name, mp_context)
        works = iter(self._works)
        if verify not in ("size", "digest"):
            raise ValueError(f"verify is 'size' or 'digest', not {verify!r}")
        with contextlib.ExitStack() as held:
            stops = held.enter_context(self._hearing_stops())
            # Two inputs with one output are a likely mistake, to be seen before anything is made; but for a stream.
            head = [] if self._works.is_streamed else list(islice(works, 2))
            self.directory.mkdir(parents=True, exist_ok=True)
            for place in self._places():
                held.enter_context(JobLock(place))
                staging.require_trusted(os.fsencode(place))
            ledger = Ledger.open(self.directory, synchronous=self.options.durability in ("data", "full"))
            try:
                job = ledger.job(self.identity, self._spec)
                progress = progress or Progress()
                progress.began_s = time.monotonic()
                progress.drained = take_over_dead_runs(self.directory, ledger)
                if self.outputs is not None:
                    ledger.expect_inputs(job, self._works.origin)
                settings = self._settings(verify)
                run = self._run = JobRun(
                    chain(head, works),
                    ledger,
                    job,
                    settings,
                    progress,
                    stops=stops,
                    only=only,
                    redo=redo,
                    on_progress=on_progress,
                    on_row=on_row,
                )
                with signals.held_for(run.interrupt) as raise_if_interrupted:
                    self._run_on_pool(run, ledger, job, workers, mp_context)
                raise_if_interrupted()
                return self._report(run)
            finally:
                self._run = None
                ledger.close()

    def _places(self) -> list[Path]:
        """Where no other run may be at work meanwhile: the directory of the ledger, and those of the outputs."""
        bases = self._bases
        return list({os.path.realpath(place): place for place in (self.directory, *bases)}.values())

    def stop(self, reason: str = "asked to stop") -> None:
        """Take no new file and let those that run end, for ``grace_s`` at most; called again: at once. From any
        thread, and from the moment that ``run`` is called: one that still starts begins no file. Where no ``run`` is
        under way nothing happens: a later one is not stopped.
        """
        for stops in tuple(self._stops):
            stops.ask(reason)

    def interrupt(self, reason: str) -> bool:
        """``stop``, from a signal handler of the thread that runs; whether there is a run."""
        run = self._run
        if run is not None:
            run.interrupt(reason)
        return run is not None

    # ---- details

    def _settings(self, level: verify.Level) -> RunSettings:
        options = self.options
        return RunSettings(
            level,
            options.fingerprints,
            options.checksums,
            options.attempts_max,
            options.timeout_s,
            options.max_failures,
            options.max_failure_share,
            options.rate_per_s,
            options.grace_s,
        )

    @contextlib.contextmanager
    def _hearing_stops(self) -> Generator[Stops]:
        """What ``stop`` is told meanwhile."""
        stops = Stops()
        self._stops.append(stops)
        try:
            yield stops
        finally:
            self._stops.remove(stops)

    def _run_on_pool(self, run: JobRun, ledger: Ledger, job: int, workers: int | None, mp_context: Any) -> None:
        options = self.options
        bases = self._bases
        for base in bases:
            _found_locks(base)
        n_workers = workers if workers is not None else min(len(os.sched_getaffinity(0)), layout.WORKERS_MAX)
        pool = Pool(
            n_workers,
            mp_context,
            slots=jobrun.SLOTS,
            limits=WorkerLimits(options.max_tasks_per_child or 0, options.memory_limit_bytes or 0),
            memory_limit_bytes=options.memory_limit_bytes,
            setup=lambda: Setup(os.nice, (options.nice,), None) if options.nice else None,
            retains=True,
        )
        name, own_staging = pool.name, staging.staging_directory(base_of(self.directory), pool.token)
        run_id, outcome = 0, ""
        try:
            stagings = staging.prepare(base_of(self.directory), list(map(base_of, bases)), pool.token)
            function_id = next(pool.function_ids)
            spec = self._job_spec(stagings)
            blobs.write(blobs.function_name(name, function_id), Encoding.MSGPACK, jobtasks.encode_spec(spec))
            run_id = ledger.begin_run(job, name, os.getpid())
            run.run(pool, function_id)
            pool.close()
        except StopNow:
            pool.abort()
        except BaseException as error:
            outcome = _end_in_words(error)
            pool.abort()
            with contextlib.suppress(RingpoolError, OSError):
                run.commit_rows()
            raise
        finally:
            if pool.closed:
                segment.give_up(name)  # unless all of it can be written down
                with contextlib.suppress(RingpoolError) if run_id == 0 else contextlib.nullcontext():
                    run.commit_rows()
                    drain_into(ledger, name, run.count_drained)  # what was done when the workers were killed
                segment.unlink(name)
                staging.remove(own_staging)
            if run_id:
                outcome = outcome or run.progress.stopping or "ended"
                ledger.end_run(run_id, outcome, msgspec.json.encode(run.progress))

    def _job_spec(self, stagings: tuple[bytes, ...]) -> JobSpec:
        options, retry = self.options, self.options.retry
        if isinstance(retry, RetryPolicy) and options.timeout_s is not None:
            retry = retry.within(options.timeout_s)  # which would cut a longer wait off, and hide what had failed
        return JobSpec(
            self.name,
            self._parameters,
            options.durability,
            tasks.pack_policy(self.name, retry),
            stagings,
            self.outputs.names if self.outputs is not None else (),
            base_of(self.directory),
            os.fsencode(self.identity),
            self.digest,
            options.fingerprints,
            options.checksums,
            options.digests,
            os.stat(self.directory).st_dev,
            (*(os.path.join(os.fsencode(os.path.realpath(base)), b"") for base in self._bases), *self._works.roots),
            self._source,
        )

    @staticmethod
    def _report(run: JobRun) -> Report:
        progress = run.progress
        seconds = time.monotonic() - progress.began_s
        return Report(progress, tuple(run.failures), dict(run.kinds), seconds, progress.stopping)


def _outputs(output: str | Mapping[str, str] | None) -> NamedOutputs | None:
    if output is None:
        return None
    if isinstance(output, str):
        return NamedOutputs([output if "=" not in output else os.path.join(".", output)])  # a name is a mapping's key
    for name, pattern in output.items():
        if not name.isidentifier() or not name.isascii():
            raise OutputPatternError(pattern, f"its name {name!r} is none; take letters, digits and underscores")
    return NamedOutputs([f"{name}={pattern}" for name, pattern in output.items()])


def _end_in_words(error: BaseException) -> str:
    """What has ended a run, for ``status``: a signal by its name."""
    number = 0 if isinstance(error, Exception) else getattr(error, "number", 0)  # the command's way to say so
    if isinstance(error, SystemExit) and isinstance(error.code, int) and signals.n_ended():
        number = error.code - 128
    with contextlib.suppress(ValueError, TypeError):
        return signal.Signals(number).name
    return f"{type(error).__name__}: {words_of(error)}"


def _found_locks(base: Path) -> None:
    """Have all lock files of a run below one directory: without it, each directory of outputs would get its own."""
    base.mkdir(parents=True, exist_ok=True)
    with PathLock(base / OWN_DIRECTORY, base=base):  # whatever name: an error says it
        pass
