"""How a command ends: one line for a mistake, a full disk, too little memory, a signal or a lost launcher."""

import contextlib
import errno
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .errors import InputError, first_line
from .launch import launched_processes, rank, several_hosts

_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")  # torchrun and accelerate launch set one of them
_FIRST_SPEAKS = 5.0  # seconds; by then a launcher has ended the others
_POLL = 0.5  # seconds between looks for the launcher
_PLACES = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO]
_PLACES += [errno.ENAMETOOLONG, errno.ENOTDIR]
_run: Any = None
_parent = os.getppid()  # early: it may be gone when all is imported


def follow(run: Any) -> None:
    """Name the `RunFolder` that is being written, for the line that says how to go on with it."""
    global _run
    _run = run


def followed() -> Any:
    """What `follow` named last."""
    return _run


def run_command(run: Callable[[], object]) -> int:
    """Run a command to its exit code: 2, and one line on standard error, for what a user can mend.

    Every process may speak, those after the first a moment later: where all meet one mistake, their launcher has
    ended them by then. Our own faults keep their traceback.
    """
    follow(None)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale
    who = f"[rank {rank()}] " if rank() else ""
    logging.basicConfig(level=logging.WARNING, format=f"{who}%(message)s")
    logging.getLogger("bmsn_zoo").setLevel(logging.INFO)
    with _ends_at_signals():
        try:
            run()
            _leave_the_others()
            return 0
        except InputError as error:
            message = str(error)
        except Exception as error:
            message = "; ".join(filter(None, (outside_fault(error), _how_to_resume())))
            if not outside_fault(error):
                raise
        if who:
            time.sleep(_FIRST_SPEAKS)
        sys.stderr.write(f"error: {who}{message}\n")
        if several_hosts():
            with contextlib.suppress(Exception):  # that we end is what others need to know
                from .runtime import meet

                meet(None)
        return 2


def _leave_the_others() -> None:
    """End the connections to other processes: NCCL warns of those that are open when a process ends."""
    if launched_processes() > 1:
        from accelerate import PartialState

        if PartialState._shared_state:
            PartialState().destroy_process_group()


def speak(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that say how much is told, which is done."""
    level = logging.ERROR if given.pop("quiet", False) else logging.INFO
    logging.getLogger("bmsn_zoo").setLevel(logging.DEBUG if given.pop("verbose", False) else level)
    return given


def take_dry_run(given: dict[str, Any]) -> bool:
    """Whether a run shall only be tried, which is taken from its arguments."""
    dry = given.pop("dry_run", False)
    for name in ("resume", "push_to_hub"):
        if dry and given.get(name):
            raise InputError(f"dry-run tries a new run and leaves nothing behind: leave out --{name.replace('_', '-')}")
    return dry


def outside_fault(error: Exception) -> str | None:
    """What to do about an error that comes from the disk, the memory or another process; None for any other."""
    text, name = str(error), getattr(error, "filename", None)
    inside = re.search(r"\(os error (\d+)\)", text)  # in safetensors' own error
    number = int(inside[1]) if inside else error.errno if isinstance(error, OSError) else None
    if number in _PLACES:
        return f"{f'{name}: ' if name else ''}{os.strerror(number)}: make room, or choose a place that can be written"
    if out_of_memory(error):
        what = "use a smaller --batch-size, --eval-batch-size or --mixture-size, or --grad-checkpointing"
        return f"out of memory ({first_line(error)}): {what}"
    if isinstance(error, RuntimeError) and re.search("gloo/transport|NCCL", text):
        reason = text.strip().splitlines()[-1][:200]
        return f"the connection to another process was lost, which may say why ({reason})"
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, of a GPU or the machine."""
    return isinstance(error, MemoryError) or bool(
        re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error))
    )


def _how_to_resume() -> str:
    """What is kept of the run that is being written, and how to go on with it; empty if there is none."""
    if _run is None:
        return ""
    whole = [folder.name.split("-")[1] for folder in _run.checkpoints()]
    last = f"epoch {whole[-1]} was the last whole one" if whole else "no epoch was whole yet"
    return f"{last}: start again with --output {_run.path} --resume"


@contextlib.contextmanager
def _ends_at_signals() -> Iterator[None]:
    """End at once on SIGINT and SIGTERM, and when the launcher that started this process is gone.

    By a thread that Python wakes: the main one may be waiting for other processes, where it runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]  # as nohup asks
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _noted) for number in numbers}
    woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        writer.shutdown(socket.SHUT_WR)  # closing is not enough: forked workers that still live hold it open, too
        writer.close()
        thread.join()
        reader.close()


def _noted(number: int, frame: object) -> None:
    """`_watch` learns of a signal's arrival by other means."""


def _forget_signals() -> None:
    """In a child process: the socket is its parent's, who ends its children; Ctrl-C reaches both."""
    global _parent
    _parent = os.getppid()
    if signal.getsignal(signal.SIGTERM) is _noted:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_signals)


def _watch(reader: socket.socket) -> None:
    # what was started by hand may outlive its terminal, what was launched ends with its launcher
    reader.settimeout(_POLL if any(name in os.environ for name in _LAUNCHERS) else None)
    while True:
        try:
            received = reader.recv(1)
        except TimeoutError:
            if os.getppid() != _parent:
                _end(signal.SIGTERM, "the end of its launcher")
            continue
        if not received:
            return
        if received[0] in (signal.SIGINT, signal.SIGTERM):
            _end(received[0], signal.Signals(received[0]).name)


def _end(number: int, cause: str) -> None:
    children = multiprocessing.active_children()
    if rank() == 0:
        line = "; ".join(filter(None, (f"ended by {cause}", _how_to_resume())))
        line = "\n" * sys.stderr.isatty() + f"{line}\n"  # below a progress bar
        with contextlib.suppress(OSError):  # the terminal may be gone; sys.stderr may be locked
            os.write(2, line.encode(errors="backslashreplace"))
    else:
        time.sleep(2 * _POLL)  # or the first would meet our end before its cause, and blame the connection
    for child in children:  # last, since torch raises in the main thread when a reader dies
        child.kill()
    os._exit(128 + number)
