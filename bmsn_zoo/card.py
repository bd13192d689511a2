"""The model card, written from a run's own records."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .layout import Layout
from .records import read_json
from .search_space import BACKBONES

CITATION = """@inproceedings{javan2023balanced,
  title     = {Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture},
  author    = {Javan Roshtkhari, Mehraveh and Toews, Matthew and Pedersoli, Marco},
  booktitle = {AutoML Conference},
  year      = {2023},
  note      = {arXiv:2306.11982}
}"""


def write_card(folder: Path, name: str = "YOUR_NAME/THIS_REPOSITORY", default: dict[str, Any] | None = None) -> None:
    """Write README.md of a model folder from its config.json, metrics.json and search.json.

    Args:
        folder: the model folder.
        name: Hub id that the usage shows.
        default: metrics of the default layout, trained in the same way, to compare with.
    """
    config, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    search = read_json(folder / "search.json") if (folder / "search.json").exists() else None
    dataset = metrics["dataset"]["id"]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["image-classification", "timm", "bmsn_zoo", "neural-architecture-search"],
        datasets=[dataset] if "/" in dataset and not dataset.startswith((".", "/")) else None,
        metrics=["accuracy"],
        model_name=f"{metrics['model']} {metrics['layout']}",
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=metrics["dataset"]["test_split"],
                metric_type="accuracy",
                metric_name="test accuracy",
                metric_value=metrics["test_accuracy"],
            )
        ],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {metrics['model']} with layout {metrics['layout']}, trained on {dataset}\n",
        _usage(config, name),
        _results(metrics, default),
        _layout(config, metrics),
        _origin(metrics, search),
        _training(metrics),
        _limits(metrics),
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n",
    ]
    (folder / "README.md").write_text("\n".join(part for part in parts if part))


def _usage(config: dict[str, Any], name: str) -> str:
    return f"""```python
import timm, bmsn_zoo                                    # pip install bmsn_zoo; the import registers the models
model = timm.create_model("hf-hub:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
label = model(transform(image).unsqueeze(0)).argmax(1)   # index into label_names of config.json
```
"""


def _results(metrics: dict[str, Any], default: dict[str, Any] | None) -> str:
    def row(entry: dict[str, Any], note: str) -> str:
        return (
            f"| {entry['layout']}{note} | {entry['parameters'] / 1e6:.2f} M | {entry['macs'] / 1e6:.1f} M "
            f"| {100 * entry['test_accuracy']:.2f} % |"
        )

    rows = [row(default, " (default)")] if default is not None else []
    rows.append(row(metrics, ""))
    table = "\n".join(rows)
    return (
        "## Results\n\n"
        f"Accuracy on all {metrics['test_images']} test images, of the last epoch, without test-time augmentation; "
        "one run each (n = 1).\n\n"
        "| layout | parameters | multiply-accumulates | test accuracy |\n| --- | --- | --- | --- |\n"
        f"{table}\n"
    )


def _layout(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    size = config["pretrained_cfg"]["input_size"][-1]
    layout = Layout.parse(metrics["layout"])
    table = layout.table(size, BACKBONES[metrics["model"]].channels)
    return (
        "## Layout\n\n"
        f"Where the network downsamples: {layout} units at each resolution, full resolution first.\n\n"
        f"```\n{table}\n```\n"
    )


def _origin(metrics: dict[str, Any], search: dict[str, Any] | None) -> str:
    if search is None:
        return "## How the layout was found\n\nChosen by hand, not by a search.\n"
    settings = search["settings"]
    place = [entry["layout"] for entry in search["ranking"]].index(metrics["layout"]) + 1
    entry = search["ranking"][place - 1]
    return (
        "## How the layout was found\n\n"
        f"Ranked {place} of {len(search['layouts'])} by a balanced mixture of {search['mixture_size']} supernets "
        f"({settings['epochs']} epochs in all, seed {search['seed']}, n = 1 search), with "
        f"{100 * entry['accuracy']:.2f} % in the search on {search['dataset']['score_images']} training images that "
        f"trained no weights. The search took {search['duration_seconds'] / 60:.0f} minutes on {search['hardware']} in "
        f"{search['precision']}. Test images were never opened. Its whole result is in `search.json`.\n"
    )


def _training(metrics: dict[str, Any]) -> str:
    segment = metrics["segments"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in segment["versions"].items())
    settings = "\n".join(f"{key}: {value}" for key, value in metrics["settings"].items())
    hardware = "; ".join(
        dict.fromkeys(f"{s['hardware']}, {s['processes']} x {s['threads']} threads, {s['precision']}"
                      for s in metrics["segments"])
    )  # fmt: skip
    command = " ".join(segment["command"])
    return (
        "## Training\n\n"
        f"`accelerate launch {command}`\n\n"
        f"{metrics['epochs']} epochs, seed {metrics['seed']}, {metrics['train_images']} training images, "
        f"{metrics['duration_seconds'] / 60:.0f} minutes on {hardware}; {versions}; commit {segment['commit']}.\n\n"
        f"<details><summary>All settings</summary>\n\n```yaml\n{settings}\n```\n\n</details>\n"
    )


def _limits(metrics: dict[str, Any]) -> str:
    return (
        "## Intended use and limits\n\n"
        f"Classifying small images like those of {metrics['dataset']['id']}; a starting point for fine-tuning, and a "
        "reference for research on where networks downsample. One training run: another seed moves the accuracy by "
        "some tenths of a point. Not tested for robustness, fairness or images unlike the training set.\n"
    )
