"""Where a run computes: processes, threads and precision, and a record of them."""

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env

from . import __version__
from .command import followed
from .config import DataConfig, SearchConfig, changed_settings
from .errors import InputError, first_line
from .launch import PROCESS_VARIABLES, check_launch, launched_processes, several_hosts
from .trackers import check_tracker

_log = logging.getLogger(__name__)
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# processes wait for the one that decodes the images: NCCL would end them after 10 minutes
_PATIENCE = timedelta(hours=4)
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors")


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 natively.

    accelerate allows bf16 on every CPU, but where it is emulated it is ten times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and supported and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fastest_precision(device: torch.device) -> str:
    """The fastest of a device: "bf16", or "no" for float32.

    Intel's AVX512-BF16 multiplies no more numbers in a cycle than its float32 does: only with AMX is bf16 faster there.
    """
    slow = device.type == "cpu" and _is_intel() and not torch.cpu._is_amx_tile_supported()
    return "bf16" if computes_bf16(device) and not slow else "no"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: the next step needs it, and taking it from the kernel anew costs a tenth of one."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # other C libraries do not have this
            glibc = ctypes.CDLL(None)
            glibc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest that it takes
            glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start(config: DataConfig, default_precision: str | None = None) -> Accelerator:
    """Set threads and precision, and join the other processes.

    Args:
        config: `mixed_precision` and `threads` are read. `auto` precision is what the launcher was asked for, else
            `default_precision` (that of the run to resume), else the fastest of the device.
        default_precision: see above.

    Raises:
        InputError: if the processes do not know of each other, or the backend, precision or tracker cannot be used.
    """
    check_launch(os.environ, isinstance(config, SearchConfig))
    check_tracker(config.report_to)
    processes = launched_processes()
    if processes == 1:  # what was left of another launcher's RANK must not make this a part of something
        for name in PROCESS_VARIABLES:
            os.environ.pop(name, None)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").strip().lower()
    if backend != "no" and backend not in torch.compiler.list_backends(exclude_tags=None):
        raise InputError(f"dynamo_backend {backend!r} is unknown to this torch: launch with inductor or no")
    try:
        torch.zeros(1, device=os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu")).tolist()
        return _join(config, processes, default_precision)
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:  # of torch and accelerate
        if isinstance(error, InputError):
            raise
        raise InputError(f"accelerate cannot start as it was asked to: {first_line(error)}") from error


def _join(config: DataConfig, processes: int, default_precision: str | None) -> Accelerator:
    meet(config.settings())
    state = _state()
    if state.device.type == "cuda" and state.device.index is not None:
        torch.cuda.set_device(state.device)  # accelerate leaves that out where ACCELERATE_TORCH_DEVICE names one
    if processes != state.num_processes:
        raise InputError(
            f"{processes} processes were started that do not know of each other: on CPUs, start them with "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node N"
        )
    if state.distributed_type not in _SUPPORTED:
        raise InputError(f"{state.distributed_type.value} is not supported: launch on one device, or with plain DDP")
    # launchers set OMP_NUM_THREADS to 1 unasked, which leaves all cores but one idle
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    keep_freed_memory()
    torch.set_num_threads(config.threads or max(1, usable_cores() // local_processes))

    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").strip().lower()
    precision = config.mixed_precision
    if precision == "auto":
        precision = (launcher if launcher != "no" else default_precision) or fastest_precision(state.device)
    if precision == "fp16" and state.device.type != "cuda":
        raise InputError(f"mixed-precision fp16 needs a GPU, this is {state.device.type}: use bf16 or no")
    known = state.device.type in ("cpu", "cuda")
    if precision == "bf16" and known and not computes_bf16(state.device) and state.is_main_process:
        _log.warning("bf16 is emulated here, which can take ten times as long: use --mixed-precision no")
    several = {"MASTER_ADDR", "ACCELERATE_DYNAMO_MODE"} <= set(os.environ) and "TORCHELASTIC_RUN_ID" not in os.environ
    if processes == 1 and several:
        fix = "use torchrun" if state.device.type == "cpu" else "add --multi_gpu if there are several GPUs"
        _log.warning("accelerate launch was asked for several processes but starts one: %s", fix)
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        raise InputError(f"mixed-precision {precision}: this process computes in another one: start a new process")
    return Accelerator(
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        log_with=config.report_to,
        project_dir=".",  # trackers want to hear of one before there is a run folder
    )


def _state() -> PartialState:
    """What this process is among all, which it joins if it has not yet."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)


def meet(settings: dict[str, Any] | None) -> None:
    """Once, agree with the processes on other hosts, whose launchers end nobody for a mistake that is made here.

    Args:
        settings: of this process; None if it was refused.

    Raises:
        InputError: in all of them, if one was refused, or was given other settings than the first.
    """
    if PartialState._shared_state or not several_hosts():
        return
    _state()
    told = gather_object([settings])
    if None in told:
        raise InputError(f"process {told.index(None)}, on another host, was refused: it says why")
    for number, others in enumerate(told):  # the same images may lie elsewhere
        if differs := changed_settings({**told[0], "dataset": others["dataset"]}, others, "there"):
            raise InputError(f"process {number} was started with other settings, {differs}: start all hosts alike")


def begin_run(folder: Any, config: DataConfig, identity: dict[str, Any], accelerator: Accelerator) -> None:
    """Begin a run in its `RunFolder`, and say where it is and what it computes on; `identity` is that of its data."""
    about = describe(accelerator)
    folder.begin(config, {**about, "command": sys.argv}, identity, accelerator)
    if accelerator.is_main_process and followed() in (None, folder):
        several = f"{about['processes']} processes of " if about["processes"] > 1 else ""
        device = f"{about['device']} ({about['hardware']}), {several}{about['threads']} threads, {about['precision']}"
        _log.info("device: %s; folder: %s", device, "none, a dry run" if folder.dry else folder.path)
        _log.debug("versions: %s", ", ".join(f"{name} {number}" for name, number in about["versions"].items()))
        _log.debug("settings: %s", ", ".join(f"{name} {value}" for name, value in config))


def describe(accelerator: Accelerator) -> dict[str, Any]:
    """What this run computes on, for its record: processes, threads, precision, hardware and versions."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    backend = accelerator.state.dynamo_plugin.backend.value.lower()
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        "device": device.type,
        "hardware": name,
        "tf32": _uses_tf32(device),
        "compiled": None if backend == "no" else backend,
        "versions": {"bmsn_zoo": __version__, "python": platform.python_version(), **versions},
        "commit": commit(),
    }


def _uses_tf32(device: torch.device) -> bool | None:
    """Whether "fp32" training rounds products to 10 bits; None where there is no such thing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return any(getattr(where, name) in (True, "tf32") for where, name, _ in _tf32_switches())


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """What says whether products are rounded to TF32: where, by which name, and the value with which they are not."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which refuses to mix it with the other
        return [(where, "fp32_precision", "ieee") for where in (matmul, cudnn.conv)]
    return [(where, "allow_tf32", False) for where in (matmul, cudnn)]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Float32 as it is written, for what is recorded: NVIDIA's newer GPUs would round its factors to TF32's 10 bits."""
    switches = _tf32_switches()
    before = [getattr(where, name) for where, name, _ in switches]
    try:
        for where, name, exact in switches:
            setattr(where, name, exact)
        yield
    finally:
        for (where, name, _), value in zip(switches, before, strict=True):
            setattr(where, name, value)


def _cpuinfo(key: str) -> str | None:
    """What Linux says of the first core, such as its "model name"; None elsewhere, or where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _is_intel() -> bool:
    return "GenuineIntel" in (_cpuinfo("vendor_id") or platform.processor())


def _processor_name() -> str:
    """The CPU and its widest instruction set that matters here."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str | None:
    """Commit of the checkout that this package lies in, marked if files differ from it; None if it is no checkout."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_mib(device: torch.device) -> int | None:
    """Of the GPU, or of this process without what its launcher held; None where neither is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) >> 10 if status.exists() else None
