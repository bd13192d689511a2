"""A tiny search, two trainings and a zoo of both; the fixture `runs` has them made once for all tests."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from pictures import drawn

from bmsn_zoo import Layout, hub, model_folder
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.cost import rows_of
from bmsn_zoo.models.found import register_folder
from bmsn_zoo.results import Choice, Confirmation, Latencies, LatencyResult, SearchResult

FOUND, DEFAULT = "bmsn_resnet20_compass", "bmsn_resnet20_compass_default"
COMMON = ["--batch-size", "16", "--epochs", "1", "--mixed-precision", "no"]


def run(module, *arguments):
    """Call a command in this process; returns its exit code."""
    return module.main([*map(str, arguments)])


def latency_of(result, hardware):
    """Latencies as a search would measure them, if every unit took as long as every other."""
    rows = {row: [0.001, 0.002, 0.003] for layout in result.layouts for row in rows_of(Layout.parse(layout))}
    batches = [Latencies.of_times(batch, rows, {Layout.parse("4-3-3"): [0.021, 0.022, 0.023]}) for batch in (1, 64)]
    about = dict(device="cpu", hardware=hardware, precision="fp32", threads=2, torch="2.9")
    return LatencyResult(**about, batches=batches)


def confirm(folder, p_value):
    """Write into the run folder of a search that 5-3-2 was five points better than 4-3-3, both trained alone."""
    result = SearchResult.read(folder / "search.json")
    choices = [
        Choice(
            layout=layout,
            right=right,
            images=1000,
            macs=result.pick(layout).macs,
            better=better,
            worse=worse,
            p_value=p,
        )
        for layout, right, better, worse, p in (("4-3-3", 500, 0, 0, None), ("5-3-2", 550, 80, 30, p_value))
    ]
    confirmed = Confirmation.of(choices, "4-3-3", epochs=3, seed=0, spent_macs=1)
    changed = {"confirmed": confirmed, "undecided": confirmed.abstains}
    result.model_copy(update=changed).write(folder / "search.json")


def registered(data: Path) -> SimpleNamespace:
    """Folders of the runs on these images, beside them, and of the zoo, whose two models are registered here."""
    base = data.parent / "runs"
    search, found, default, zoo = (base / name for name in ("search", "found", "default", "zoo"))
    for name in (FOUND, DEFAULT):
        register_folder(zoo / name)
    return SimpleNamespace(base=base, search=search, found=found, default=default, zoo=zoo)


def make(data: Path) -> None:
    """Do all that `registered` finds."""
    base = data.parent / "runs"
    base.mkdir()
    search, found, default, zoo = (base / name for name in ("search", "found", "default", "zoo"))
    with drawn(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(base / "bmsn_zoo" / "searching.py"), "--dataset", str(data), "--lr", "0.05"])
        assert run(search_module, "--dataset", data, *COMMON, "--mixture-size", 2, "--output", search) == 0
        patch.setattr("sys.argv", [str(base / "train.py"), "--output", str(found), "--from-search", str(search)])
        # 32 score images show nothing, but what follows is about searches that do
        SearchResult.read(search / "search.json").model_copy(update={"undecided": None}).write(search / "search.json")
        assert run(train_module, "--from-search", search, *COMMON, "--onnx", "--output", found) == 0
        patch.setattr("sys.argv", ["train.py", "--layout", "4-3-3", f"--dataset={data}", "--resume"])
        assert run(train_module, "--dataset", data, *COMMON, "--layout", "4-3-3", "--output", default) == 0
        hub.add(default, DEFAULT, zoo=zoo)
    with drawn(), pytest.MonkeyPatch.context() as patch:  # to export the same weights again takes seconds
        written = found / "model" / "model.onnx"
        patch.setattr(model_folder, "export_onnx", lambda model, path, names: shutil.copy(written, path))
        hub.add(found, FOUND, default=DEFAULT, zoo=zoo)
