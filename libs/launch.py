"""Start a program, parse its flags, print its errors in one line, stop it on a signal and end it.

The one module of libs/ that reads flags and the config behind them. Processes agree on a stop at the same step, and an
error of one is raised by all.
"""

import argparse
import ctypes
import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import accelerate
import ml_collections
import torch
import torch.distributed as dist
from absl import app, flags, logging
from accelerate.utils import gather_object, parse_flag_from_env
from ml_collections import config_flags
from tqdm import tqdm

from libs import UserError

TIMEOUT = timedelta(hours=2)  # of a collective operation: the main process may write or sample for long
REQUEUE_STATUS = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)
LOST = r"Connection (reset|closed) by peer|Broken pipe|remote process exited"  # of gloo and NCCL, for a dead process
# Variables of accelerate's that are supported, or say nothing while ACCELERATE_DYNAMO_BACKEND is dropped
SUPPORTED = r"ACCELERATE_(MIXED_PRECISION|USE_CPU|CPU_AFFINITY|DEBUG_MODE|DYNAMO_(MODE|USE_\w+))$"
UNSUPPORTED = [f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")]

# --- Start and end ----------------------------------------------------------------------------------------------------


def check_environment() -> bool:
    """Check the variables that launchers set, and return whether to compute on the CPU.

    accelerate's variables that would change what is computed are refused or dropped with a warning.
    """
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" not in os.environ:
        raise UserError("WORLD_SIZE is set without MASTER_ADDR: unset it, or start by accelerate launch or torchrun")
    for name, value in list(os.environ.items()):
        off = value.lower() in ("", "0", "no", "false")
        if name in UNSUPPORTED and not off:
            raise UserError(f"{name}={value} is not supported: launch as for DDP; config.train.sharded is FSDP")
        if name.startswith("ACCELERATE_") and not (off or re.match(SUPPORTED, name)):
            logging.warning("%s=%s is ignored", name, value)
            del os.environ[name]
    if torch.backends.mps.is_available():
        logging.warning("Apple's GPU (MPS) is not used: noise schedules are float64, which it lacks")
    return not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def cpu_count() -> int:
    """Count the CPUs that this process may use; macOS says only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_state(timeout: timedelta) -> accelerate.PartialState:
    """Find the processes of a program that does not train; collective operations may take as long as `timeout`."""
    return accelerate.PartialState(cpu=check_environment(), timeout=timeout)


def make_accelerator(**kwargs) -> accelerate.Accelerator:
    """Make the accelerator of this process; accelerate's own choice takes two CPU processes for two runs."""
    on_cpu, precision = check_environment(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    allowed = ("no", "bf16") if on_cpu else ("no", "bf16", "fp16")
    if precision not in allowed:  # accelerate takes fp16 on a CPU, and computes in float32
        device = "CPU" if on_cpu else "GPU"
        raise UserError(f"--mixed_precision must be one of {', '.join(allowed)} on a {device}; found {precision}")
    if on_cpu:
        keep_freed_memory()
    timeout = accelerate.InitProcessGroupKwargs(timeout=TIMEOUT)
    in_place = accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of the gradients
    accelerator = accelerate.Accelerator(cpu=on_cpu, kwargs_handlers=[timeout, in_place], **kwargs)
    if not on_cpu and precision == "no" and accelerator.is_main_process:
        logging.warning("float32 on a GPU takes about ten times as long as bf16: give --mixed_precision bf16")
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc keep what tensors on a CPU free for the next ones; without glibc, do nothing.

    Else it hands large blocks back to the system, which clears every page of the next ones: up to a tenth of a step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never hand back the end of the heap


def finish(accelerator: accelerate.Accelerator) -> None:
    """End the processes together, once nothing refers to the wrapped model or its optimizer any more.

    In another order gloo's threads now and then abort the process at exit.
    """
    gc.collect()
    accelerator.wait_for_everyone()
    with after_work("a logger could not be closed"):
        accelerator.end_training()


def run(main: Callable[[list[str]], None], check: Callable[[ml_collections.ConfigDict, str], None]) -> None:
    """Run main(argv) after the flags are parsed and check(config, file name) has passed.

    Errors that a user can mend are printed in one line with status 1; all others keep their stack trace.
    """

    def parse(argv: list[str]) -> list[str]:
        rest = parse_flags(argv)
        with errors_in_one_line():
            check(flags.FLAGS.config, config_flags.get_config_filename(flags.FLAGS["config"]))
        return rest

    def main_with_short_errors(argv: list[str]) -> None:
        try:
            main(argv)
        except Exception as error:
            if isinstance(error, RuntimeError) and re.search(LOST, str(error)):
                error = f"another process of this run is gone; re-run the command to resume ({error})"
            elif not is_for_users(error):
                if not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):  # which takes seconds to import
                    raise
                reason = re.search(r"fatal error: .*|.+", str(error))[0]
                needs = "a C++ compiler and Python's headers, or set compile=off in config.train and config.sample"
                error = f"torch.compile failed ({reason}): it needs {needs}"
            if os.environ.get("RANK", "0") != "0":
                time.sleep(3)  # if the first process fails alike, the launcher ends this one before it says it again
            sys.stdout.flush()
            tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, not behind a progress bar
            sys.stderr.flush()
            os._exit(1)  # not sys.exit: other processes may be waiting for this one, which must not wait for them

    print_any_name()
    gc.freeze()  # what was imported stays: looking through it for garbage at the end alone took a second
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    app.run(main_with_short_errors, flags_parser=parse)


# --- Flags ------------------------------------------------------------------------------------------------------------


def define_config_flag(help_text: str) -> None:
    """Define --config: a Python file with get_config(), its fields overridable as --config.a.b=value."""
    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
    flags.mark_flag_as_required("config")


def config_name() -> str:
    """Return the name of the file given by --config, without folder and ending."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def expand_home(word: str) -> str:
    """Expand ~/ in front of a path or, as shells do not, of the value in --name=value."""
    flag, path = re.fullmatch(r"(--[\w.\[\]]+=)?(.*)", word, re.DOTALL).groups("")
    return flag + os.path.expanduser(path)


def expand_homes(config: ml_collections.ConfigDict) -> None:
    """Expand ~/ in front of all strings of a config."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            expand_homes(value)
        elif isinstance(value, str):
            config[name] = os.path.expanduser(value)


def print_any_name() -> None:
    """Let file names that are not UTF-8 be printed, with \\x.. for the bytes that are not."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """The parser of a program's flags, described by its docstring; ~/ is expanded in front of every value."""

    def __init__(self, doc: str, formatter_class: type = argparse.RawDescriptionHelpFormatter):
        super().__init__(description=doc, formatter_class=formatter_class)
        print_any_name()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> tuple:
        """Parse sys.argv unless `args` is given, as argparse does."""
        return super().parse_known_args(
            [expand_home(word) for word in (sys.argv[1:] if args is None else args)], namespace
        )


def parse_flags(argv: list[str]) -> list[str]:
    """Parse flags of the form --name=value, with ~/ allowed in front of a value; a mistake in them ends the program."""
    try:
        rest = flags.FLAGS([expand_home(word) for word in argv])
        expand_homes(flags.FLAGS.config)  # a missing file is reported at this first use only
    except (flags.Error, OSError) as error:
        sys.exit(f"error: {error}")
    except (AttributeError, LookupError, TypeError) as error:  # ml_collections' errors of an override
        sys.exit(f"error: --config or an override of its fields: {error}")
    if len(rest) > 1:
        sys.exit(f"error: expected only flags of the form --name=value; found {' '.join(rest[1:])}")
    return rest


# --- Errors in one line -----------------------------------------------------------------------------------------------


def is_for_users(error: BaseException) -> bool:
    """Tell whether a user can mend an error: a UserError, or a file or its space that the system refuses."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with `error: ...` and status 1 on an error of the block that a user can mend."""
    try:
        yield
    except Exception as error:
        if not is_for_users(error):
            raise
        sys.exit(f"error: {error}")


@contextmanager
def after_work(problem: str) -> Iterator[None]:
    """Log an error of the block as a warning: it comes after all work is done, which it must not spoil."""
    try:
        yield
    except Exception as error:
        logging.warning("%s: %s", problem, error)


@contextmanager
def raise_on_all_ranks(state: accelerate.Accelerator | accelerate.PartialState) -> Iterator[None]:
    """Raise a ValueError or OSError of the block on all ranks if it occurs on one; else the others would wait for it.

    All ranks have left the block when one goes on. The block itself must not hold collective calls.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as own:
        error = own
    errors = gather_object([error]) if state.num_processes > 1 else []
    for found in [error, *errors]:  # its own first, which has a stack trace
        if found is not None:
            raise found


# --- Stopping together ------------------------------------------------------------------------------------------------


class StopRequest:
    """Record requests to save a checkpoint and exit at the next step.

    They are SIGTERM, SIGUSR1 (Slurm's warning), Ctrl+C and a closed terminal, unless ignored from the start (as by
    nohup), and the end of the launcher (accelerate launch, torchrun), which a signal kills without passing it on. A
    second Ctrl+C ends the program at once where there is no launcher. A context manager: the former signal handlers
    come back after it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self):
        self.received, self.error = "", None
        self.launcher = os.getppid() if started_by_launcher() else None
        heeded = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._note) for number in heeded}
        self.group = None

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT and self.launcher is None:  # torchrun sends it again to those that had it already
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Take an error of the block that a user can mend for a request to stop; `raise_noted` raises it."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.received, self.error = "an error", error

    def raise_noted(self, state: accelerate.Accelerator) -> None:
        """Raise what `noting_errors` noted on any process on all of them."""
        with raise_on_all_ranks(state):
            if self.error is not None:
                raise self.error

    def agreed(self) -> bool:
        """Tell whether any process has been asked to stop. A collective call, once a step.

        It runs over the host's network, so the device never waits, and fails at once if another process is gone.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.received = self.received or "the launcher's end"
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return bool(self.received)
        if self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        asked = torch.tensor([int(bool(self.received))])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        return bool(asked.item())

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.group = None


def started_by_launcher() -> bool:
    """Tell whether the parent process is accelerate's or PyTorch's launcher; False where the system does not say."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = rb"(^|/)(accelerate|torchrun)$|^(accelerate\.commands|torch\.distributed)\."
    return any(re.search(names, word) for word in words)
