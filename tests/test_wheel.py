"""The wheel, installed where nothing of the checkout can be seen."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_runs import DEFAULT, FOUND

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]
LOAD = """
import sys, timm, torch, bmsn_zoo
from safetensors.torch import load_file, save_file
from bmsn_zoo.config import shipped_recipes

print(bmsn_zoo.__file__, *shipped_recipes(), *timm.list_models("bmsn_*", pretrained=True), sep="\\n")
model = timm.create_model(sys.argv[1], pretrained=True).eval()
save_file({"y": model(load_file(sys.argv[2])["x"]).detach()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def wheel(runs, tmp_path_factory):
    """Built from a copy of the checkout whose zoo holds two models more."""
    base = tmp_path_factory.mktemp("build")
    source = base / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bmsn_zoo", "recipes", "hub_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    for name in (FOUND, DEFAULT):
        shutil.copytree(runs.zoo / name, source / "hub_configs" / name)
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "build", *isolation, "--outdir", str(base / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not isolation:
        pytest.skip(f"hatchling is not installed and cannot be downloaded: {done.stdout[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (base / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)
    return folder


@pytest.fixture
def command(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_module_recipe_and_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "bmsn_zoo").rglob("*.*")
        if file.suffix in (".py", ".j2") or file.name == "py.typed"
    }
    data = {
        f"bmsn_zoo/{file.relative_to(ROOT).as_posix()}"
        for folder in ("recipes", "hub_configs")
        for file in (ROOT / folder).rglob("*")
        if file.is_file()
    }
    assert ours | data <= names
    assert {f"bmsn_zoo/hub_configs/{FOUND}/model.safetensors", f"bmsn_zoo/hub_configs/{DEFAULT}/README.md"} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".bin", ".pth", ".pkl"))]


def test_a_found_model_loads_with_no_network(runs, site, command, tmp_path):
    x = torch.randn(2, 3, 16, 16)
    save_file({"x": x}, tmp_path / "x.safetensors")
    printed = command("-c", LOAD, FOUND, tmp_path / "x.safetensors", tmp_path / "y.safetensors").splitlines()
    assert printed[0] == str(site / "bmsn_zoo" / "__init__.py")
    assert {FOUND, DEFAULT, *(file.stem for file in (ROOT / "recipes").glob("*.yaml"))} <= set(printed)
    expected = timm.create_model(f"local-dir:{runs.zoo / FOUND}", pretrained=True).eval()
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], expected(x))


def test_the_commands_work(command, tmp_path):
    few = ["--epochs", 1, "--limit", 200, "--mixed-precision", "no"]
    printed = command(
        *("-m", "accelerate.commands.launch", "-m", "bmsn_zoo.searching", "--recipe", "digits-resnet20", *few),
        *("--output", "search"),
    )
    assert "accelerate launch -m bmsn_zoo.training --from-search search\n" in printed
    command("-m", "bmsn_zoo.training", "--from-search", "search", *few, "--output", "train")
    metrics = json.loads((tmp_path / "train" / "metrics.json").read_text())
    assert metrics["test_images"] > 300
    card = (tmp_path / "train" / "model" / "README.md").read_text()
    assert f"accelerate launch -m bmsn_zoo.training {' '.join(map(str, few))} --from-search YOUR_NAME" in card
    assert str(tmp_path) not in card
