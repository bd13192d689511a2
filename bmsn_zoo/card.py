"""Cards of models and searches for the Hub, written from a run's own records."""

import re
import shlex
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import EvalResult, ModelCardData

from .files import read_json, write_text
from .layout import Layout
from .results import Entry, SearchResult, TrainResult
from .search_space import BACKBONES

SOME_NAME = "YOUR_NAME/THIS_REPOSITORY"  # stands for the Hub id of a folder that was not pushed yet
CITATION = """@inproceedings{javan2023balanced,
  title     = {Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture},
  author    = {Javan Roshtkhari, Mehraveh and Toews, Matthew and Pedersoli, Marco},
  booktitle = {AutoML Conference},
  year      = {2023},
  note      = {arXiv:2306.11982}
}"""
_NO_LICENSE = ("uoft-cs/cifar10", "uoft-cs/cifar100")  # the Hub lists them as unknown
_TAGS = ["bmsn_zoo", "neural-architecture-search"]
# flags that say where a run lies, not what it computes; those with a value, and those without
_LOCAL_VALUES = ("--output", "--dataset", "--dataset-id", "--from-search", "--init-from", "--push-to-hub", "--revision")
_LOCAL_SWITCHES = ("--resume", "--private", "--create-pr")
_SCRIPTS = {
    "train.py": "train.py",
    "search.py": "search.py",
    "bmsn_zoo/train.py": "-m bmsn_zoo.train",
    "bmsn_zoo/search.py": "-m bmsn_zoo.search",
}
ResultT = TypeVar("ResultT", SearchResult, TrainResult)
_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")  # a commit on the Hub


def write_card(
    folder: Path, name: str = SOME_NAME, default: TrainResult | None = None, model_name: str | None = None
) -> None:
    """Write README.md of a model folder from its config.json, metrics.json and search.json.

    Args:
        folder: the model folder.
        name: Hub id that the usage shows.
        default: result of the default layout, trained in the same way, to compare with.
        model_name: the timm name that the model is registered under, if it is.
    """
    config, metrics = read_json(folder / "config.json"), portable(TrainResult.read(folder / "metrics.json"))
    search = SearchResult.read(folder / "search.json") if (folder / "search.json").exists() else None
    shown, hub_id = _dataset(metrics)
    title = model_name or f"{metrics.model} {metrics.layout}"
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["image-classification", "timm", *_TAGS],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=shown,
                dataset_name=shown,
                dataset_split=metrics.dataset.test_split,
                dataset_revision=metrics.dataset.revision,
                metric_type="accuracy",
                metric_name="test accuracy (fraction of 1, last epoch, one run)",
                metric_value=metrics.test_accuracy,
            )
        ],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"{metrics.model} with the layout {metrics.layout}, trained on {shown}: "
        f"{_percent(metrics.test_accuracy)} of the test images are classified correctly.\n",
        _usage(config, name, model_name, (folder / "model.onnx").exists()),
        _results(metrics, default),
        _layout(config, metrics),
        _origin(metrics, search),
        _training(metrics, name),
        _limits(metrics),
        _license(metrics),
        _citation(),
    ]
    write_text(folder / "README.md", "\n".join(parts))


def search_card(search: SearchResult, name: str) -> str:
    """The card of a finished search.

    Args:
        search: portable.
        name: Hub id that the usage shows.
    """
    shown, hub_id = _dataset(search)
    data = ModelCardData(
        library_name="bmsn_zoo", license="apache-2.0", tags=_TAGS, datasets=[hub_id] if hub_id else None
    )
    best = search.best.layout
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# Where {search.model} should downsample on {shown}\n",
        f"All {len(search.layouts)} layouts of {search.model}, ranked by a balanced mixture of "
        f"{search.mixture_size} supernets. First choice: {best}.\n",
        "```bash\n"
        f"accelerate launch -m bmsn_zoo.train --from-search {name}     # trains {best} from scratch\n"
        f"accelerate launch -m bmsn_zoo.search --init-from {name} ...  # starts another search from these supernets\n"
        "```\n\n"
        "```python\n"
        "from bmsn_zoo import hub\n"
        f'result = hub.load_search("{name}")  # the ranking, both matrices, settings, versions\n'
        "```\n",
        _ranking(search),
        "## The search\n\n"
        + _command(search, name)
        + f"{_count(search.epochs, 'epoch')} in all, seed {search.seed}, one search (n = 1), "
        f"{search.dataset.weight_images} images that train weights and {search.dataset.score_images} that "
        f"score layouts, all of them training images: test images were never opened. {_where(search)}\n",
        _settings(search),
        "## Intended use and limits\n\n"
        "`supernets.safetensors` holds the weights that the layouts share. They normalise by the batch at hand and "
        "rank layouts; they are no classifiers to use. Accuracies are those under shared weights: a layout trained "
        "from scratch reaches more. Another seed moves the ranking, above all among layouts that are close.\n",
        _license(search),
        _citation(),
    ]
    return "\n".join(parts)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _citation() -> str:
    return f"## Citation\n\n```bibtex\n{CITATION}\n```\n"


def _dataset(record: SearchResult | TrainResult) -> tuple[str, str | None]:
    """The data set's name to show, and its Hub id if it has one; a local folder is shown by its last part."""
    name = record.dataset.id
    return (name, name) if record.dataset.on_hub else (Path(name).name, None)


def _usage(config: dict[str, Any], name: str, model_name: str | None, onnx: bool) -> str:
    channels, _, side = config["pretrained_cfg"]["input_size"]
    mode = "RGB" if channels == 3 else "L"
    comment = f'# "hf-hub:{name}" is the same, from the Hub\n' if model_name else ""
    text = f"""With [timm](https://github.com/huggingface/pytorch-image-models) and the package `bmsn_zoo`,
which tells timm of these models:

```python
import timm, bmsn_zoo
from PIL import Image

{comment}model = timm.create_model("{model_name or f"hf-hub:{name}"}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.png").convert("{mode}")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])
```
"""
    if not onnx:
        return text
    return f"""{text}
Without them, by [ONNX Runtime](https://onnxruntime.ai): images are resized, divided by 255 and normalised by the mean
and deviation that the file names.

```python
import json, numpy, onnxruntime
from huggingface_hub import hf_hub_download
from PIL import Image

session = onnxruntime.InferenceSession(hf_hub_download("{name}", "model.onnx"))
about = session.get_modelmeta().custom_metadata_map
image = Image.open("image.png").convert("{mode}").resize(({side}, {side}), Image.Resampling.BICUBIC)
pixels = numpy.asarray(image).reshape({side}, {side}, {channels}) / 255
inputs = ((pixels - json.loads(about["mean"])) / json.loads(about["std"])).transpose(2, 0, 1)[None]
(logits,) = session.run(["logits"], {{"images": inputs.astype("float32")}})
print(json.loads(about["label_names"])[logits.argmax()])
```
"""


def _results(metrics: TrainResult, default: TrainResult | None) -> str:
    def row(entry: TrainResult, note: str) -> str:
        return (
            f"| {entry.layout}{note} | {entry.parameters / 1e6:.2f} M | {entry.macs / 1e6:.1f} M "
            f"| {_percent(entry.test_accuracy)} |\n"
        )

    text = (
        "## Results\n\n"
        f"Accuracy on all {metrics.test_images} test images, of the last epoch, without test-time augmentation; "
        "one run each (n = 1).\n\n"
        "| layout | parameters | multiply-accumulates | test accuracy |\n| --- | --- | --- | --- |\n"
    )
    if default is None:
        return text + row(metrics, "")
    points = 100 * (metrics.test_accuracy - default.test_accuracy)
    return (
        f"{text}{row(default, ' (default)')}{row(metrics, '')}\n"
        f"Against the default layout, trained with the same settings: {points:+.2f} points at "
        f"{metrics.macs / default.macs:.2f} times its multiply-accumulates.\n"
    )


def _layout(config: dict[str, Any], metrics: TrainResult) -> str:
    side = config["pretrained_cfg"]["input_size"][-1]
    layout, backbone = Layout.parse(metrics.layout), BACKBONES[metrics.model]
    usual = backbone.resolutions(backbone.default_layout, side)
    rows = "".join(
        f"| {unit} | {channels} | {size}x{size} | {other}x{other} |\n"
        for unit, (channels, size, other) in enumerate(
            zip(backbone.channels, backbone.resolutions(layout, side), usual, strict=True)
        )
    )
    return (
        "## Layout\n\n"
        f"Where the network downsamples: {layout} units (the stem, then residual blocks) work at each resolution, "
        "the full one first.\n\n"
        f"| unit | channels | resolution | in the default {backbone.default_layout} |\n"
        f"| --- | --- | --- | --- |\n{rows}"
    )


def _origin(metrics: TrainResult, search: SearchResult | None) -> str:
    title = "## How the layout was found\n\n"
    if search is None:
        usual = metrics.layout == str(BACKBONES[metrics.model].default_layout)
        return title + (
            "It is the layout of the original network, to compare others with.\n"
            if usual
            else "It was chosen by hand, not by a search.\n"
        )
    place = search.place(metrics.layout)
    return title + (
        f"Ranked {place} of {len(search.layouts)} by a balanced mixture of {search.mixture_size} supernets "
        f"({_count(search.epochs, 'epoch')} in all, seed {search.seed}, n = 1 search), with "
        f"{_percent(search.ranking[place - 1].accuracy)} in the search on {search.dataset.score_images} "
        f"training images that trained no weights; the default {search.default.layout} had "
        f"{_percent(search.default.accuracy)}. {_where(search)} Test images were never opened. The whole result "
        "is in `search.json`.\n"
    )


def _ranking(search: SearchResult) -> str:
    def row(place: int, entry: Entry) -> str:
        note = " (default)" if entry.layout == search.default.layout else ""
        return f"| {place} | {entry.layout}{note} | {entry.macs / 1e6:.1f} M | {_percent(entry.accuracy)} |\n"

    ranked = list(enumerate(search.ranking, 1))
    shown = [(place, entry) for place, entry in ranked if place <= 10 or entry.layout == search.default.layout]
    return (
        "## Ranking\n\nThe first ten and the default layout; all are in `search.json`.\n\n"
        "| rank | layout | multiply-accumulates | accuracy in the search |\n| --- | --- | --- | --- |\n"
        + "".join(row(place, entry) for place, entry in shown)
        + "\n![accuracy against multiply-accumulates](pictures/accuracy_macs.png)\n"
        "![assignment of layouts to supernets](pictures/assignment.png)\n"
        "![learning curves](pictures/curves.png)\n"
    )


def _training(metrics: TrainResult, name: str) -> str:
    return (
        "## Training\n\n"
        + _command(metrics, name)
        + f"{_count(metrics.epochs, 'epoch')}, seed {metrics.seed}, {metrics.train_images} training images. "
        f"{_where(metrics)} Evaluated in fp32.\n\n" + _settings(metrics)
    )


def _where(record: SearchResult | TrainResult) -> str:
    """How long a run took on what, with which versions."""
    segment = record.segments[-1]
    versions = ", ".join(f"{name} {version}" for name, version in segment.versions.items())
    hardware = "; ".join(
        dict.fromkeys(f"{s.hardware}, {s.processes} x {s.threads} threads, {s.precision}"
                      for s in record.segments)
    )  # fmt: skip
    resumed = f", resumed {_count(len(record.segments) - 1, 'time')}," if len(record.segments) > 1 else ""
    return (
        f"It took {_duration(record.duration_seconds)}{resumed} on {hardware}; {versions}; "
        f"commit {segment.commit or 'unknown'}."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def portable(record: ResultT) -> ResultT:
    """A result without folders of the machine: a copy, which stays as it is when treated again.

    A local data set goes by its Hub id or its folder's last name, a search that lies beside the result by
    "search.json"; commands lose the flags that say where a run lies.
    """
    shown, hub_id = _dataset(record)
    settings: dict[str, Any] = {**record.settings, "dataset": shown, "dataset_id": hub_id}
    if settings.get("from_search") and not _PINNED.fullmatch(settings["from_search"]):
        settings["from_search"] = "search.json"
    if settings.get("init_from") and not _PINNED.fullmatch(settings["init_from"]):
        settings["init_from"] = Path(settings["init_from"]).name
    changed = {
        "dataset": record.dataset.model_copy(update={"id": shown}),
        "settings": settings,
        "segments": [s.model_copy(update={"command": _portable_command(s.command)}) for s in record.segments],
        "recipe": record.recipe and Path(record.recipe).name,
    }
    return record.model_copy(update=changed)


def _portable_command(words: list[str]) -> list[str]:
    program = Path(words[0] if words else "")
    kept = [f"bmsn_zoo/{program.name}" if program.parent.name == "bmsn_zoo" else program.name]
    rest = iter(words[1:] if kept[0] in _SCRIPTS else ())
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in (*_LOCAL_VALUES, "--recipe"):
            value = value if equals else next(rest, "")
        if flag == "--recipe":
            kept += [flag, Path(value).name]
        elif flag not in (*_LOCAL_VALUES, *_LOCAL_SWITCHES):
            kept.append(word)
    return kept


def _command(record: SearchResult | TrainResult, name: str) -> str:
    """The command of a run as others can give it, from a portable record."""
    (program, *words), settings = record.segments[0].command, record.settings
    if program not in _SCRIPTS:
        return "It was started from Python, with the settings below.\n\n"
    sources: dict[str, Any] = {key: settings.get(key) for key in ("dataset", "from_search", "init_from")}
    if sources["from_search"]:
        sources.update(dataset=None, from_search=name if sources["from_search"] == "search.json" else None)
    for key, value in sources.items():
        words += [f"--{key.replace('_', '-')}", value] if value else []
    return f"```bash\naccelerate launch {_SCRIPTS[program]} {shlex.join(words)}\n```\n\n"


def _settings(record: SearchResult | TrainResult) -> str:
    text = yaml.safe_dump(record.settings, sort_keys=False)
    return f"<details><summary>All settings</summary>\n\n```yaml\n{text}```\n\n</details>\n"


def _limits(metrics: TrainResult) -> str:
    return (
        "## Intended use and limits\n\n"
        f"Classifying small images like those of {_dataset(metrics)[0]}; a starting point for fine-tuning, and a "
        "reference for research on where networks downsample. One training run: another seed moves the accuracy by "
        "some tenths of a point. Not tested for robustness, fairness or images unlike the training set.\n"
    )


def _license(record: SearchResult | TrainResult) -> str:
    shown, hub_id = _dataset(record)
    data = f"have a licence of their own, see [{hub_id}](https://huggingface.co/datasets/{hub_id})"
    if hub_id is None:
        data = "may have a licence of their own"
    if hub_id in _NO_LICENSE:
        data = f"({shown}) were published without a licence: whether your use of them is allowed is yours to check"
    return f"## Licence\n\nCode and weights: Apache 2.0. The training images {data}.\n"
