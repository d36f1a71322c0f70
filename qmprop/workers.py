"""Processes that turn SMILES into molecules: several at once, each with a time limit, results in order."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import IO, Final, Self

from qmprop.formats import Failure
from qmprop.molecule import Molecule
from qmprop.smiles import SmilesLine, build_molecule
from qmprop.streams import ParseError

#: Seconds after which the process that works on a molecule is ended. Embedding and minimization have limits of their
#: own; this one is for what goes wrong beyond them.
TIME_LIMIT: Final = 60.0
_AHEAD: Final = 4  # SMILES at hand per process, so that none waits for the next
_SERVE: Final = "import sys; sys.path[:] = sys.argv[1:]; from qmprop.workers import serve; serve()"


def usable_cores() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class Embedder:
    """Turns SMILES into molecules in `jobs` processes, which start when they are needed.

    A process that dies or takes too long costs the molecule it worked on, which becomes a `Failure`; another takes its
    place. Closing ends all processes, whatever they do; they also end when this process does.

    Args:
        jobs: How many processes there may be.
        time_limit: Seconds that one molecule may take.
    """

    def __init__(self, jobs: int = 1, *, time_limit: float = TIME_LIMIT) -> None:
        self._jobs = jobs
        self._time_limit = time_limit
        self._pool: ThreadPoolExecutor | None = None
        self._idle: deque[_Worker] = deque()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def embed(self, lines: Iterable[SmilesLine]) -> Iterator[Molecule | Failure]:
        """Yield the molecule, or the failure, of each line, in order; a few lines are read ahead.

        Raises:
            ParseError: What `lines` raised; what came before has been yielded.
        """
        pending = deque[Future[Molecule | Failure]]()
        broken: ParseError | OSError | None = None
        try:
            try:
                for line in lines:
                    pending.append(self._submit(line))
                    while pending and (pending[0].done() or len(pending) >= _AHEAD * self._jobs):
                        yield pending.popleft().result()
            except (ParseError, OSError) as error:
                broken = error
            while pending:
                yield pending.popleft().result()
            if broken is not None:
                raise broken
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End all processes at once."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.discard()

    def _submit(self, line: SmilesLine) -> Future[Molecule | Failure]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._jobs, thread_name_prefix="qmprop-embedder")
        return self._pool.submit(self._answer, line)

    def _answer(self, line: SmilesLine) -> Molecule | Failure:
        """Ask an idle process, or a new one; runs in a thread of the pool."""
        try:
            worker = self._take_worker()
        except OSError as error:
            return line.fail("embedding-failed", f"No process could be started for it: {error.strerror or error}.")
        answer = worker.ask(line, self._time_limit)
        if isinstance(answer, Molecule | Failure):
            with self._lock:
                self._idle.append(worker)
            return answer
        worker.discard()
        with self._lock:
            self._workers.remove(worker)
        return line.fail(*answer)

    def _take_worker(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise OSError("the program is ending")
            if self._idle:
                return self._idle.pop()
            self._workers.append(worker := _Worker())
            return worker


class _Worker:
    """A process that answers one SMILES at a time, and the pipes to and from it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the others
        )

    def ask(self, line: SmilesLine, time_limit: float) -> Molecule | Failure | tuple[str, str]:
        """Return the process's answer, or code and text of why there is none; it cannot be asked again then."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(time_limit, end)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump(line, stdin)
            stdin.flush()
            answer: Molecule | Failure = pickle.load(stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            if late.is_set():
                return "time-out", f"It took longer than {time_limit:g} s to generate a geometry."
            status = self._process.wait()
            return "embedding-failed", f"The process that generated the geometry died (status {status})."
        finally:
            timer.cancel()
        return answer

    def kill(self) -> None:
        """End the process now; whoever waits for its answer gets none."""
        self._process.kill()

    def discard(self) -> None:
        """End the process and release what belongs to it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was written last has nowhere to go
                pipe.close()


def serve() -> None:
    """Answer SMILES from standard input with molecules on standard output, until the input ends; see `Embedder`."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between
    _serve(sys.stdin.buffer, answers)


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    while True:
        try:
            line: SmilesLine = pickle.load(questions)
        except EOFError:
            return
        pickle.dump(build_molecule(line), answers)
        answers.flush()
