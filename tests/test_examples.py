"""The examples run as they stand: on photos of odd sizes, as a notebook, and as a demo that is clicked."""

import re
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of the sky and of meadows, all of other sizes and several formats."""
    home, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, color in (("meadow", (60, 160, 50)), ("sky", (70, 120, 230))):
        (home / label).mkdir()
        for number in range(30):
            size = rng.integers(30, 90, 2)
            pixels = np.clip(rng.normal(color, 25, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(home / label / f"{number}.{('jpg', 'png', 'webp')[number % 3]}")
    return home


@pytest.mark.slow
def test_a_folder_of_photos_becomes_a_network_that_names_them(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    example = runpy.run_path(str(EXAMPLES / "own_images.py"))
    short = ["--epochs", "3", "--image-size", "16", "--max-macs", "default"]
    example["main"]([str(photos), *short, "--output", str(tmp_path)])
    told = capsys.readouterr().out
    assert re.search(r"layout [\d-]+: accuracy [\d.]+% on 12 test photos", told)
    assert re.findall(r"^(meadow|sky)/0.jpg: (meadow|sky) \(\d+%\)$", told, re.M)
    assert (tmp_path / "search" / "search.json").exists() and (tmp_path / "training" / "model").is_dir()


@pytest.mark.slow
def test_a_model_of_the_zoo_is_fine_tuned(photos):
    example = runpy.run_path(str(EXAMPLES / "finetune.py"))
    assert example["main"]([str(photos), "--epochs", "4", "--batch-size", "8"]) > 0.8


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "what it shows is not kept here"
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [{kind for output in cell.outputs for kind in output.get("data", ())} for cell in cells]
    assert sum("image/png" in kinds for kinds in shown) == 4 and sum("text/html" in kinds for kinds in shown) == 2
    (told,) = ["".join(o.text for o in c.outputs if o.output_type == "stream") for c in cells if "search(" in c.source]
    lines = re.split(r"[\r\n]+", told)
    assert any(re.search(r"epoch \d/2 +\d+%.* left", line) for line in lines) and len(lines) < 60, "who waits is told"
    assert (tmp_path / "runs").is_dir()


@pytest.fixture(scope="module")
def space():
    """The app of examples/space, started."""
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        demo = runpy.run_path(str(EXAMPLES / "space" / "app.py"))["demo"]
        _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield address
        demo.close()


@pytest.mark.slow
def test_the_demo_is_clicked(space, photos):
    from gradio_client import Client, handle_file

    client = Client(space, verbose=False)
    for trained_on in ("CIFAR-10", "CIFAR-100"):
        shown = client.predict(handle_file(photos / "sky" / "1.png"), trained_on, api_name="/classify")
        for labels, plot in (shown[:2], shown[2:]):
            best, *others = labels["confidences"]
            assert labels["label"] == best["label"] and best["confidence"] >= max(o["confidence"] for o in others)
            assert plot["plot"].startswith("data:image/")
        assert shown[1] != shown[3]


def test_the_space_needs_what_the_package_needs():
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert (EXAMPLES / "space" / "requirements.txt").read_text().split() == project["dependencies"]
    about = yaml.safe_load((EXAMPLES / "space" / "README.md").read_text().split("---")[1])
    assert about["sdk"] == "gradio" and (EXAMPLES / "space" / about["app_file"]).exists()
