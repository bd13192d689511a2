"""What the tests share: an offline environment with caches of its own, and a small data set."""

import os
import shutil
import tempfile

import numpy as np
import pytest

CLASSES = ("north", "east", "south", "west")


def pytest_configure(config):
    """Libraries read these variables when they are imported, so they are set before any test module is."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are 30 times slower on a busy machine
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # this process starts those that test: it needs no torch
    home = tempfile.mkdtemp(prefix="bmsn-zoo-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ.update(HF_HOME=home, HF_DATASETS_CACHE=os.path.join(home, "datasets"), HF_HUB_OFFLINE="1")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    """Defaults of tests; the package is imported here, when its lines are counted."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return
    from bmsn_zoo import runtime
    from bmsn_zoo.config import SearchConfig

    SearchConfig.model_fields["confirm"].default = 0  # searches of tests are confirmed where a test asks for it
    SearchConfig.model_fields["latency"].default = False  # and so is their latency measured
    SearchConfig.model_rebuild(force=True)
    runtime.usable_cores = lambda: 1  # as many threads as cores take longer where several processes test
    import pictures  # noqa: F401  # are not drawn, either


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same global random state, whichever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def image_dataset():
    """64 training and 32 test images of 16x16 noise in 4 classes, told apart by the side that is bright."""
    import datasets

    rng = np.random.default_rng(0)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))

    def split(count):
        images = []
        for index in range(count):
            pixels = rng.integers(0, 150, (16, 16, 3))
            pixels[:6] += 100
            images.append(np.rot90(pixels, -(index % 4)).astype(np.uint8))
        labels = [index % 4 for index in range(count)]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    return datasets.DatasetDict(train=split(64), test=split(32))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of all processes that test."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def image_folder(image_dataset, shared):
    """`image_dataset` as a folder on disk."""
    from filelock import FileLock

    folder = shared / "data" / "compass"
    with FileLock(shared / "data.lock"):
        if not folder.exists():
            image_dataset.save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def runs(image_folder, shared):
    """A tiny search, two trainings and a zoo of both; see `small_runs.make`. No test changes them."""
    import small_runs
    from filelock import FileLock

    with FileLock(shared / "runs.lock"):
        if not (done := shared / "runs.done").exists():
            small_runs.make(image_folder)
            done.touch()
    return small_runs.registered(image_folder)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub for the client in this process, alice being logged in."""
    from hub_server import HubServer
    from huggingface_hub import constants

    with HubServer(orgs={"zoo": ["alice"]}) as server:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_ETAG_TIMEOUT": 0.3,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield server
