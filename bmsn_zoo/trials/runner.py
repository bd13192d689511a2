"""Where trials run: in this process, in workers of this machine, or on a cluster; each in a folder of its own.

All through the standard `concurrent.futures.Executor`. A trial that is finished is read instead of run again, and one
that was begun goes on, so that nothing is lost with a worker but what it did since its last epoch.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..config import DataConfig, SearchConfig, TrainConfig, build_config
from ..errors import InputError, first_line
from ..launch import launched_processes, rank
from ..results import TrialResult
from ..run_folder import RunFolder
from ..runtime import usable_cores
from ..training import train
from .protocol import Trial

_log = logging.getLogger(__name__)
_LOST = 3  # workers in a row that may be lost before any trial ends
_SHARED = ("batch_size", "opt", "lr", "min_lr", "warmup_epochs", "momentum", "weight_decay")
_one_at_a_time = threading.Lock()  # a worker of a cluster may have several threads


def trial_config(config: SearchConfig, trial: Trial, precision: str, threads: int | None) -> TrainConfig:
    """The training of a trial: the search's own settings, on its weight split, measured on its score split."""
    shared = {name: getattr(config, name) for name in (*DataConfig.model_fields, *_SHARED)}
    shared |= {"recipe": None, "report_to": None, "init_from": config.pretrained_from}
    own = {"layout": str(trial.layout), "seed": trial.seed, "epochs": trial.epochs, "mixed_precision": precision}
    held = {"holdout": 0.5, "holdout_seed": config.seed, "measure": "holdout"}
    return TrainConfig(**{**shared, **own, **held, "threads": threads})


def trial_folder(home: Path, trial: Trial) -> Path:
    """Where a trial of the search in `home` runs."""
    return home / "trials" / f"{trial.layout}_seed{trial.seed}_epochs{trial.epochs}"


def run_trial(folder: Path, config: TrainConfig, supernet: Mapping[str, Tensor] | None = None) -> TrialResult | None:
    """The result of a trial: read if it is finished, else run, from its last whole epoch on if it was begun.

    To be called by every process of a run alike: they train together, and those after the first return None. With the
    state of a `supernet` it starts from that.
    """
    state = RunFolder(folder).state
    done, begun = bool(state and state.finished), state is not None
    if launched_processes() > 1:  # the others may be on hosts that do not see the folder
        done, begun = broadcast_object_list([done, begun])
    if not done:
        train(config, folder, begun, supernet)
    return TrialResult.read(folder / "trial.json") if rank() == 0 else None


def _work(folder: str, settings: dict[str, Any]) -> str:
    """A trial in a worker, which may be another machine's; returns the text of its trial.json."""
    if not (Path(folder).parents[1] / "run.json").exists():
        raise InputError(
            f"a worker does not see {folder}: all hosts of a cluster need the run's folder on a shared disk"
        )
    if multiprocessing.current_process().daemon:  # which may have no children
        settings = {**settings, "workers": 0}
    with _one_at_a_time:
        result = run_trial(Path(folder), build_config(TrainConfig, settings))
    assert result
    return result.model_dump_json()


def _begin_worker(devices: Any) -> None:
    """Take a device, and end with the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches that one too, which ends its workers
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Runner:
    """Runs the trials of a search; a context manager, at whose end its workers end.

    Args:
        config: of the search; `jobs`, `threads`, `cluster`, and what a trial trains by.
        home: the search's run folder.
        accelerator: whose precision and kind of device trials have.

    Raises:
        InputError: if the cluster cannot be reached.
    """

    def __init__(self, config: SearchConfig, home: Path, accelerator: Accelerator) -> None:
        self._config, self._home, self._precision = config, home.absolute(), accelerator.mixed_precision
        self._visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        self._gpus = torch.cuda.device_count() if accelerator.device.type == "cuda" else 0
        if self._gpus and len(self._visible) < self._gpus:
            self._visible = [str(index) for index in range(self._gpus)]
        # one thread on CPUs: several trainings side by side are faster, and their number moves no result
        self.threads = config.threads or max(1, usable_cores() // self._gpus if self._gpus else 1)
        self.jobs = config.jobs or self._gpus or max(1, usable_cores() // self.threads)
        self._client: Any = None
        self._executor = self._start()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        if self._client is not None:
            self._client.close()

    def _start(self) -> Executor:
        if self._config.cluster:
            self._client = _connect(self._config.cluster)
            return self._client.get_executor()
        if self.jobs == 1:
            return _Here()
        context = multiprocessing.get_context("spawn")
        devices = context.Queue() if self._gpus else None
        for job in range(self.jobs if devices else 0):
            devices.put(self._visible[job % self._gpus])  # type: ignore[union-attr]
        return ProcessPoolExecutor(self.jobs, context, _begin_worker, (devices,))

    def run(self, trials: Iterable[Trial], told: Callable[[Trial, TrialResult], None]) -> None:
        """Run trials, and tell the result of each as it ends.

        Raises:
            InputError: if one cannot be run, or workers are lost again and again.
        """
        waiting, lost = list(trials), 0
        while waiting:
            futures = {}
            for trial in waiting:
                config = trial_config(self._config, trial, self._precision, self.threads)
                folder = str(trial_folder(self._home, trial))
                futures[self._executor.submit(_work, folder, config.as_dict())] = trial
            try:
                for future in as_completed(futures):
                    told(futures[future], TrialResult.model_validate_json(future.result()))
                    waiting.remove(futures[future])
                    lost = 0
            except BrokenExecutor:
                lost += 1
                if lost == _LOST:
                    raise InputError(f"{lost} workers were lost before a training ended: give fewer --jobs") from None
                _log.warning("a worker was lost: its training goes on in another")
                self._executor.shutdown()  # the others end too, and let go of their folders
                self._executor = self._start()
            except Exception as error:
                if type(error).__name__ != "KilledWorker":  # dask's, which we may not have
                    raise
                raise InputError(f"the cluster lost worker after worker: {first_line(error)}") from None
            finally:
                for future in futures:
                    future.cancel()


def _connect(address: str) -> Any:
    """A client of the cluster at dask://HOST:PORT."""
    if not address.startswith("dask://"):
        raise InputError(f"cluster {address!r} is unknown: give dask://HOST:PORT, where its scheduler listens")
    try:
        from distributed import Client
    except ImportError:
        raise InputError('cluster dask:// needs dask.distributed: pip install "bmsn_zoo[cluster]"') from None
    try:
        return Client(f"tcp://{address.removeprefix('dask://')}", timeout=10)
    except (OSError, ValueError) as error:
        raise InputError(f"cluster {address} does not answer: {first_line(error)}") from None
