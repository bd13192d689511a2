import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from bmsn_zoo import InputError, command, runtime
from bmsn_zoo.command import run_command
from bmsn_zoo.launch import check_launch
from bmsn_zoo.runtime import computes_bf16, fastest_precision

# Importing takes long, so one process does it and forks another for each case: settings, precision before, variables.
START = """
import json, os, socket, sys, timm, torch
known, connect = set(sys.modules), socket.socket.connect
socket.socket.connect = lambda *_: sys.exit("the network was used")
import bmsn_zoo
socket.socket.connect = connect
with open(f"{sys.argv[2]}/imported", "w") as file:
    json.dump(sorted({name.split(".")[0] for name in set(sys.modules) - known}), file)
from bmsn_zoo import command, runtime
from bmsn_zoo.config import DataConfig

def run(settings, before):
    accelerator = runtime.start(DataConfig(**settings), before)
    print(json.dumps(runtime.describe(accelerator)))

for name, (settings, before, environment) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        os.environ.update(environment)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        code = command.run_command(lambda: run(settings, before))
        sys.stdout.flush()
        os._exit(code)  # to take torch down costs seconds
    with open(f"{sys.argv[2]}/{name}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items()}
CASES = {
    "launched": ({}, None, {}),
    "asked": ({"threads": 1, "mixed_precision": "no"}, "bf16", {}),
    "by launcher": ({}, None, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "resumed": ({}, "no", {}),
    "fp16": ({"mixed_precision": "fp16"}, None, {}),
    "fp16 by launcher": ({}, None, {"ACCELERATE_MIXED_PRECISION": "fp16"}),
    "strangers": ({}, None, {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_CPU": "false"}),
    "strangers of MPI": ({}, None, {**MPI, "ACCELERATE_USE_CPU": "false"}),
    "left over": ({}, None, {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
    "left over and wrong": ({"mixed_precision": "fp16"}, None, {"RANK": "1"}),
    "accumulating": ({}, None, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}),
    "no compiler": ({}, None, {"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}),
    "no device": ({}, None, {"ACCELERATE_TORCH_DEVICE": "toaster:3"}),
    "no meeting point": ({}, None, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}),
    "one of two": ({}, None, {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_DYNAMO_MODE": "default"}),
}
# what `accelerate launch` exports on a CPU when it was asked for nothing
LAUNCHER = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Output, error and exit code of every case; and the packages that ours imports beside timm and torch, offline."""
    folder = tmp_path_factory.mktemp("processes")
    names = ("ACCELERATE_", "OMP_NUM", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    subprocess.run(
        [sys.executable, "-c", START, json.dumps(CASES), str(folder)],
        env={**inherited, **LAUNCHER, "PYTHONPATH": str(Path(runtime.__file__).parents[1])},
        check=True,
        timeout=200,
    )
    results = {}
    for name in CASES:
        output, error, code = ((folder / f"{name}.{end}").read_text() for end in ("out", "err", "code"))
        results[name] = (output, error, int(code))
    results["imported"] = json.loads((folder / "imported").read_text())
    return results


def described(result):
    output, error, code = result
    assert code == 0, error
    return json.loads(output)


def test_import_is_light(processes):
    """None of the heavy packages that only the commands need."""
    assert "bmsn_zoo" in processes["imported"]
    assert not {"datasets", "accelerate", "matplotlib", "sklearn", "pandas", "scipy"} & set(processes["imported"])


def test_launched_process_uses_all_cores_and_the_fastest_precision(processes):
    found = described(processes["launched"])
    assert found["threads"] == len(os.sched_getaffinity(0))
    assert found["precision"] == {"bf16": "bf16", "no": "fp32"}[fastest_precision(torch.device("cpu"))]
    assert (found["processes"], found["device"]) == (1, "cpu")
    assert f"{os.cpu_count()} cores" in found["hardware"]
    assert {"bmsn_zoo", "python", "torch", "timm", "accelerate"} <= set(found["versions"])


def test_threads_and_precision_that_were_asked_for_win(processes):
    found = described(processes["asked"])
    assert (found["threads"], found["precision"]) == (1, "fp32")


def test_precision_that_the_launcher_was_asked_for_is_taken(processes):
    assert described(processes["by launcher"])["precision"] == "bf16"


def test_resumed_run_keeps_its_precision(processes):
    assert described(processes["resumed"])["precision"] == "fp32"


def test_what_is_left_of_another_launcher_makes_no_process_a_part_of_something(processes):
    found = described(processes["left over"])
    assert (found["processes"], found["threads"]) == (1, len(os.sched_getaffinity(0)))


REFUSED = {
    "fp16": "mixed-precision fp16 needs a GPU, this is cpu: use bf16 or no",
    "fp16 by launcher": "mixed-precision fp16 needs a GPU",
    "left over and wrong": "mixed-precision fp16 needs a GPU",
    "accumulating": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 is not supported: unset it; --batch-size",
    "no compiler": "dynamo_backend 'tensorrt' is unknown to this torch: launch with inductor or no",
    "no device": "accelerate cannot start as it was asked to: ",
    "no meeting point": "accelerate cannot start as it was asked to: ",
    "strangers": "2 processes were started that do not know of each other: on CPUs, start them with "
    "ACCELERATE_USE_CPU=true torchrun",
    "strangers of MPI": "[rank 1] 2 processes were started that do not know of each other",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_started_is_one_line_of_whichever_process(name, processes):
    if "strangers" in name and torch.cuda.is_available():
        pytest.skip("these two processes would find each other on GPUs")
    output, error, code = processes[name]
    assert code == 2, error
    assert error.startswith(f"error: {REFUSED[name]}")
    assert error.count("\n") == 1
    assert not output


def test_emulated_precision_and_a_missing_second_process_are_warned_of(processes):
    emulated = not computes_bf16(torch.device("cpu"))
    assert ("bf16 is emulated here" in processes["by launcher"][1]) == emulated
    assert not described(processes["one of two"])["compiled"]
    assert "accelerate launch was asked for several processes but starts one" in processes["one of two"][1]
    assert not processes["launched"][1]


def exported(content, tmp_path, *flags):
    """Variables that `accelerate launch` sets for a file as `accelerate config` writes it."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_machines": 1, **content}))
    parser = launch.launch_command_parser()
    args = parser.parse_args(["--config_file", str(file), *flags, "search.py"])
    args, _, _ = launch._validate_launch_command(args)
    if args.multi_gpu or args.use_fsdp or args.use_megatron_lm:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


ALONE = {"distributed_type": "NO", "num_processes": 1, "use_cpu": True}
# a file, whether a search may run so, whether a training may
FILES = {
    "as written for one device": (
        {**ALONE, "downcast_bf16": "no", "machine_rank": 0, "same_network": True},
        True,
        True,
    ),
    "fp16 key of old": ({**ALONE, "fp16": True}, True, True),
    "debug": ({**ALONE, "debug": True}, True, True),
    "affinity": ({**ALONE, "enable_cpu_affinity": True}, True, True),
    "two machines": (
        {
            **ALONE,
            "distributed_type": "MULTI_CPU",
            "num_machines": 2,
            "num_processes": 2,
            "main_process_ip": "127.0.0.1",
            "main_process_port": 29511,
        },
        True,
        True,
    ),
    "GPUs": ({"distributed_type": "MULTI_GPU", "num_processes": 2, "gpu_ids": "0,1", "use_cpu": False}, True, True),
    "dynamo": ({**ALONE, "dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}}, False, True),
    "dynamo of old": ({**ALONE, "dynamo_backend": "EAGER"}, False, True),
    "dynamo by region": (
        {**ALONE, "dynamo_config": {"dynamo_backend": "EAGER", "dynamo_use_regional_compilation": True}},
        False,
        False,
    ),
    "FSDP": (
        {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}, "use_cpu": False},
        False,
        False,
    ),
    "context parallel": (
        {
            **{"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}, "use_cpu": False},
            "parallelism_config": {"parallelism_config_cp_size": 2},
        },
        False,
        False,
    ),
    "Megatron": (
        {"distributed_type": "MEGATRON_LM", "num_processes": 2, "megatron_lm_config": {"megatron_lm_pp_degree": 1}},
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_accelerate_config_are_supported_or_refused_in_one_line(name, tmp_path):
    content, *expected = FILES[name]
    environment = exported(content, tmp_path)
    for searching, supported in zip((True, False), expected, strict=True):
        if supported:
            check_launch(environment, searching)
        else:
            with pytest.raises(InputError) as error:
                check_launch(environment, searching)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "maybe"),
        ("ACCELERATE_USE_CPU", "perhaps"),
        ("ACCELERATE_USE_CPU", ""),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_MIXED_PRECISION", "fp32"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0"),
        ("ACCELERATE_DOWNCAST_BF16", "yes"),
        ("ACCELERATE_DYNAMO_MODE", "fast"),
        ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "DATA_PARALLEL"),
        ("ACCELERATE_LOG_LEVEL", "loud"),
        ("ACCELERATE_ENABLE_RICH", "perhaps"),
        ("WORLD_SIZE", "two"),
        ("LOCAL_RANK", "1.5"),
    ],
)
def test_variables_that_are_not_supported_or_make_no_sense_are_refused(name, value):
    with pytest.raises(InputError, match=name) as error:
        check_launch({name: value}, False)
    assert str(error.value).count("\n") == 0
    check_launch({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "on", "RANK": "0"}, True)


def test_precision_follows_the_processor():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this system does not list its processor's flags")
    cpu = torch.device("cpu")
    assert computes_bf16(cpu) == bool({"avx512_bf16", "amx_bf16"} & flags)
    intel = any("GenuineIntel" in line for line in lines)
    assert (fastest_precision(cpu) == "bf16") == ("amx_bf16" in flags or ("avx512_bf16" in flags and not intel))
    assert fastest_precision(torch.device("meta")) == "no"


@pytest.mark.parametrize(
    ("vendor", "avx512_bf16", "amx", "expected"),
    [
        ("GenuineIntel", True, False, "no"),  # measured: a step takes 1.3 times as long in bf16
        ("GenuineIntel", True, True, "bf16"),
        ("AuthenticAMD", True, False, "bf16"),
        ("AuthenticAMD", False, False, "no"),
    ],
)
def test_precision_of_every_kind_of_processor(monkeypatch, vendor, avx512_bf16, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(runtime, "_cpuinfo", lambda key: vendor)
    assert fastest_precision(torch.device("cpu")) == expected


def test_users_mistake_is_one_line_and_exit_code_2(capsys):
    def wrong():
        raise InputError("epochs 0 is too small")

    assert run_command(wrong) == 2
    assert capsys.readouterr().err == "error: epochs 0 is too small\n"
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
def test_a_command_ends_while_workers_that_it_forked_still_live():
    """They hold what it listens to for signals open."""
    workers = []

    def run():
        if not (worker := os.fork()):
            while True:
                time.sleep(1)
        workers.append(worker)

    try:
        assert run_command(run) == 0
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)


def test_our_mistakes_are_not_hidden():
    def wrong():
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_command(wrong)


class Folder:
    """What `follow` is given: a run after its second epoch."""

    path = Path("runs/x")

    def checkpoints(self):
        return [self.path / "checkpoint-2"]


def full_disk():
    with open("/dev/full", "w") as file:
        file.write("x")


def place(number):
    def write():
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    return write


OUTSIDE = {
    "full": (full_disk, "No space left on device: make room"),
    "quota": (place(errno.EDQUOT), "runs/x/metrics.jsonl: Disk quota exceeded"),
    "read only": (place(errno.EROFS), "runs/x/metrics.jsonl: Read-only file system"),
    "memory": (lambda: torch.empty(1 << 60, dtype=torch.uint8), "out of memory"),
    "array": (lambda: bytearray(1 << 60), "out of memory"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_full_disks_and_memories_are_one_line_that_says_how_to_go_on(name, capsys):
    fault, expected = OUTSIDE[name]

    def run():
        command.follow(Folder())
        fault()

    assert run_command(run) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.endswith("; epoch 2 was the last whole one: start again with --output runs/x --resume\n")
    assert error.count("\n") == 1


def test_errors_of_a_gpu_are_known_and_others_are_not():
    assert "--batch-size" in command.outside_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    twice = "NCCL error in: a.cpp:1, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0"
    assert "(Duplicate GPU detected : rank 1 and rank 0)" in command.outside_fault(RuntimeError(twice))
    assert command.outside_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert command.outside_fault(FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")) is None


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc's malloc")
def test_memory_that_a_step_frees_is_there_for_the_next():
    code = """if True:
        import resource, torch
        from bmsn_zoo import runtime
        from bmsn_zoo.config import SearchConfig
        runtime.start(SearchConfig())
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            maps = [torch.ones(1 << 21) for _ in range(20)]  # of 8 MiB
            del maps
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000  # else 40,960 pages
