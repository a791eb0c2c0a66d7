"""How a program starts, fails, is stopped and ends: its flags, its processes, its errors in one line.

The one module of libs/ that reads flags and the config behind them: here they are parsed. A user's mistake ends a
program in one line; a bug keeps its stack trace. Signals that ask a run to stop are agreed on by all processes at the
same step, and an error of one is raised by all.
"""

import ctypes
import gc
import operator
import os
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import accelerate
import ml_collections
import torch
import torch.distributed as dist
from absl import app, flags, logging
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from ml_collections import config_flags
from tqdm import tqdm

from configs import common
from libs import UserError

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = timedelta(hours=2)  # of a collective operation: the main process may write or sample for long
REQUEUE_STATUS = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)

# --- Start, flags and end ---------------------------------------------------------------------------------------------


def make_accelerator(**kwargs) -> accelerate.Accelerator:
    """The accelerator of this process. It must be told of a missing GPU, or it takes two processes for two runs.

    Raises:
        ValueError: a precision that the networks are not computed in, or not on this device.
    """
    on_cpu, precision = not torch.cuda.is_available(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    allowed = ("no", "bf16") if on_cpu else ("no", "bf16", "fp16")
    if precision not in allowed:  # accelerate takes fp16 on a CPU, and computes in float32
        raise ValueError(
            f"--mixed_precision (ACCELERATE_MIXED_PRECISION) must be one of {', '.join(allowed)} on "
            f"{'a CPU' if on_cpu else 'a GPU'}; found {precision}"
        )
    if on_cpu:
        keep_freed_memory()
    timeout = accelerate.InitProcessGroupKwargs(timeout=TIMEOUT)
    in_place = accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of the gradients
    accelerator = accelerate.Accelerator(cpu=on_cpu, kwargs_handlers=[timeout, in_place], **kwargs)
    if not on_cpu and precision == "no" and accelerator.is_main_process:
        logging.warning("float32 on a GPU takes about ten times as long as bf16: give --mixed_precision bf16")
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc keep what tensors on a CPU free for the next ones; without glibc, nothing.

    It would hand large blocks back to the system, which clears every page of the next ones: up to a tenth of a step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never hand back the end of the heap


def finish(accelerator: accelerate.Accelerator) -> None:
    """End a program's processes together. Call it when nothing holds the wrapped model or its optimiser any more.

    Without this order gloo's threads now and then abort the process at exit.
    """
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def define_config_flag(help_text: str) -> None:
    """The --config flag: a Python file with get_config(), its fields overridable as --config.a.b=value."""
    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
    flags.mark_flag_as_required("config")


def config_name() -> str:
    """Name of the file given by --config, without folder and ending."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def no_arguments(argv: list[str]) -> None:
    """Raises ValueError for words on the command line that belong to no flag."""
    if len(argv) > 1:
        raise ValueError(f"expected only flags of the form --name=value; found {' '.join(argv[1:])}")


def run(main: Callable[[list[str]], None]) -> None:
    """app.run, with errors of the project's own checks shown as one line instead of a stack trace.

    An error raised anywhere else (a library, a bug) keeps its stack trace.
    """

    def clear_main(argv: list[str]) -> None:
        try:
            main(argv)
        except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
            if lost_process(error):
                error = f"another process of this run is gone; run the command again to go on ({error})"
            elif not is_for_users(error):
                raise
            if os.environ.get("RANK", "0") != "0":
                time.sleep(3)  # if the first process fails alike, the launcher ends this one before it says it again
            sys.stdout.flush()
            tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, not behind a progress bar
            sys.stderr.flush()
            os._exit(1)  # not sys.exit: other processes may be waiting for this one, which must not wait for them

    gc.freeze()  # what was imported stays: looking through it for garbage at the end alone took a second
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    app.run(clear_main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """Flags from the command line; a mistake in them or in the config file, which is code, ends in one line."""
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict  # noqa: B018 (a missing file is reported at the first use only)
        common.check(flags.FLAGS.config, config_flags.get_config_filename(flags.FLAGS["config"]))
        expand_home(flags.FLAGS.config)
        for name, value in flags.FLAGS.flag_values_dict().items():
            if isinstance(value, str) and value.startswith("~/"):
                flags.FLAGS[name].value = os.path.expanduser(value)
        return rest
    except Exception as error:
        sys.exit(f"error: {mistake_in_flags(error, ' '.join(argv))}")


def expand_home(config: ml_collections.ConfigDict) -> None:
    """Values that start with ~/ as paths in the home folder: behind a = the shell leaves it as it is."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            config[name] = os.path.expanduser(value)


def mistake_in_flags(error: Exception, arguments: str) -> str:
    """What an error says of the config file, with its line, or else of the command line `arguments`."""
    path = found[1] if (found := re.search(r"--config[= ](\S+)", arguments)) else None
    kind = "" if isinstance(error, flags.Error) else f"{type(error).__name__}: "
    if isinstance(error, flags.Error):  # where the config file raised it, its text is that stack trace
        trace, problem = str(error), str(error).strip().splitlines()[-1]
    else:
        trace = "".join(traceback.format_tb(error.__traceback__))
        while error.args and isinstance(error.args[0], Exception):  # ml_collections: an AttributeError of a KeyError
            error = error.args[0]
        problem = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    if lines := re.findall(rf'File "{re.escape(str(path))}", line (\d+)', trace):
        return f"{path}, line {lines[-1]}: {kind}{problem}".rstrip(": ")
    if isinstance(error, flags.Error):
        return problem
    if isinstance(error, (OSError, ImportError, SyntaxError)):
        return f"--config could not be read: {str(error).splitlines()[-1].strip()}"
    if is_for_users(error):
        return problem
    if "get_config" in problem:
        return f"--config {path} has no function get_config()"
    if path and isinstance(error, (IndexError, TypeError)) and (found := re.search(r"--config\.([\w.]+)\[", arguments)):
        value = operator.attrgetter(found[1])(runpy.run_path(path)["get_config"]())
        items = f"{len(value)} items, 0 to {len(value) - 1}" if isinstance(value, (tuple, list)) else "no items"
        problem += f" (config.{found[1]} has {items})"
    return f"an override names a field that the config does not have: {problem}"


def lost_process(error: BaseException) -> bool:
    """Did a collective operation fail because the connection to another process broke?"""
    broken = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in broken)


# --- Errors in one line -----------------------------------------------------------------------------------------------


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A block whose errors, where users can mend them, end the program with `error: ...` and status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not is_for_users(error):
            raise
        sys.exit(f"error: {error}")


def is_for_users(error: BaseException) -> bool:
    """Does its message tell a user what to change?

    So it does where a line of this project raised it, and where the system refuses a file or its space.
    """
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(frame.filename).resolve().is_relative_to(ROOT) and "site-packages" not in frame.filename
    return own and "raise" in frame.line


# --- Stopping together ------------------------------------------------------------------------------------------------


class StopRequest:
    """SIGTERM or SIGUSR1 (the warning that Slurm sends) asks for a checkpoint and an end at the next step.

    So does the end of the launcher (accelerate launch, torchrun), which a signal kills without passing it on.

    Whether a signal has come to any process is agreed on over the host's network, so the device never waits. A process
    that is gone makes the others' agreement fail at once instead of leaving them in a collective operation.

    A context manager: signals are noted within, and given back to their former handlers after it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = ""
        self.launcher = os.getppid() if started_by_launcher() else None
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        self.group = None

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Has any process been asked to stop? A collective call, once a step.

        Raises:
            RuntimeError: another process is gone.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.received = self.received or "the launcher's end"
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return bool(self.received)
        if self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        asked = torch.tensor([int(bool(self.received))])
        try:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"another process of this run is gone (rank {os.environ.get('RANK')}: {error})"
            ) from error
        return bool(asked.item())

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.group = None


@contextmanager
def failing_together(state: Accelerator | PartialState) -> Iterator[None]:
    """A block of all processes, without collective calls, whose ValueError or OSError in one is raised by all of them.

    All have left the block when one goes on. Else one that failed would leave the others waiting for it.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as own:
        error = own
    errors = gather_object([error]) if state.num_processes > 1 else [error]
    for found in [error, *errors]:  # its own first, which has a stack trace
        if found is not None:
            raise found


def started_by_launcher() -> bool:
    """Is the parent process accelerate's or PyTorch's launcher? False where the system does not tell."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = rb"(^|/)(accelerate|torchrun)$|^(accelerate\.commands|torch\.distributed)\."
    return any(re.search(names, word) for word in words)
