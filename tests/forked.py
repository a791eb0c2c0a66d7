"""Programs in processes of their own that import nothing anew: forked from a process that has everything imported.

A real process still, which can be killed and shares no flags, state or signals with others. That the programs start by
themselves and under launchers is for the tests that use conftest.run and subprocess.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


class Forked:
    """A program of the project with its arguments, started; has what tests use of subprocess.Popen."""

    def __init__(self, *command, env: dict | None = None):
        words, env = [str(word) for word in command], {**os.environ, **(env or {})}
        self.said = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115 (go with this object)
        self.process = CONTEXT.Process(target=be, args=(words, env, *(file.name for file in self.said)))
        self.process.start()
        self.kill = self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; returns what it wrote to stdout and stderr. What runs on after `timeout` s is killed."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"{self.process} ran for more than {timeout} s")
        return tuple(Path(file.name).read_text() for file in self.said)


def run_forked(*command, env: dict | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """A program from its start to its end."""
    started = Forked(*command, env=env)
    out, errors = started.communicate(timeout)
    return subprocess.CompletedProcess(command, started.returncode, out, errors)


def be(command: list[str], env: dict[str, str], *files: str) -> None:
    """This process becomes `python *command`, of one thread, in the project's folder; `files` take stdout, stderr."""
    import torch

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run in the background
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    program = ROOT / command[0]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
