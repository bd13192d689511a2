"""What launchers ask for by environment variables: how many processes, and what accelerate shall do. No torch here."""

import os
from collections.abc import Mapping

from .errors import InputError

_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
PROCESS_VARIABLES = (*_WORLD, *_RANK, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OFF = ("false", "no", "n", "f", "off", "0")
_FLAG = ("true", "false", "yes", "y", "t", "on", "1", *_OFF)
# what is not listed reaches no numbers
_ALLOWED = {
    **{f"ACCELERATE_{name}": _FLAG for name in ("USE_CPU", "USE_SAGEMAKER", "DEBUG_MODE", "CPU_AFFINITY")},
    **{f"ACCELERATE_{name}": _FLAG for name in ("DYNAMO_USE_FULLGRAPH", "DYNAMO_USE_DYNAMIC", "ENABLE_RICH")},
    **{f"ACCELERATE_USE_{name}": _OFF for name in ("FSDP", "MEGATRON_LM", "DEEPSPEED", "PARALLELISM_CONFIG")},
    **{f"ACCELERATE_{name}": _OFF for name in ("DOWNCAST_BF16", "IN_TPU_POD", "DYNAMO_USE_REGIONAL_COMPILATION")},
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": ("no",),
    "ACCELERATE_MIXED_PRECISION": ("no", "bf16", "fp16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_GRADIENT_CLIPPING": ("none",),
    "ACCELERATE_DYNAMO_MODE": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "ACCELERATE_LOG_LEVEL": ("debug", "info", "warning", "error", "critical"),
}
_ADVICE = {
    **{name: "launch on one device, or with plain DDP" for name, allowed in _ALLOWED.items() if allowed is _OFF},
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "unset it; --batch-size counts all images of a step",
    "ACCELERATE_GRADIENT_CLIPPING": "unset it, gradients are not clipped",
}


def _number(names: tuple[str, ...], default: int) -> int:
    values = [os.environ[name] for name in names if os.environ.get(name)]
    return int(values[0]) if values and values[0].isdecimal() else default


def launched_processes() -> int:
    """Processes that a launcher started together; 1 for a process alone."""
    return max(1, _number(_WORLD, 1))


def rank() -> int:
    """Number of this process among them; 0 for one alone, whatever RANK was left in its environment."""
    return _number(_RANK, 0) if launched_processes() > 1 else 0


def several_hosts() -> bool:
    """Whether they run on more than one host, each of which has a launcher of its own."""
    return launched_processes() > _number(("LOCAL_WORLD_SIZE",), launched_processes())


def check_launch(environment: Mapping[str, str], searching: bool) -> None:
    """Refuse what a launcher asks for that would be ignored, change the numbers unseen, or makes no sense.

    Args:
        environment: variables, as `accelerate launch` sets them from its flags and the file of `accelerate config`.
        searching: whether supernets are trained, whose layout changes at every step.

    Raises:
        InputError: for the first such variable.
    """
    for name, allowed in _ALLOWED.items():
        if environment.get(name, allowed[0]).strip().lower() not in allowed:
            advice = _ADVICE.get(name) or f"use {' or '.join(allowed[: 2 if allowed is _FLAG else None])}"
            raise InputError(f"{name}={environment[name]} is not supported: {advice}")
    for name in PROCESS_VARIABLES:
        if not environment.get(name, "0").strip().removeprefix("-").isdecimal():
            raise InputError(f"{name}={environment[name]} is not a whole number: unset it")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").strip().lower()
    if backend != "no" and searching:
        raise InputError(
            f"dynamo_backend {backend}: every layout of a search would be compiled anew: launch it with no"
        )
