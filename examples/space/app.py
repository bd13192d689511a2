"""Drop in an image: what the default and the found layout say of it, and where each downsamples: `python app.py`."""

from functools import cache
from typing import Any

import gradio as gr
import PIL.Image
import timm
import torch
from matplotlib.figure import Figure

import bmsn_zoo

FOUND = {"CIFAR-10": "bmsn_resnet20_cifar10", "CIFAR-100": "bmsn_resnet20_cifar100"}
KINDS = {"_default": "the usual layout", "": "the layout that the search found"}
COLORS = ("#1d4ed8", "#c2410c", "#15803d")


@cache
def load(name: str) -> tuple[Any, Any]:
    """A model of the zoo, and what makes its input of an image."""
    model = timm.create_model(name, pretrained=True).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


@torch.no_grad()
def predict(name: str, image: PIL.Image.Image) -> dict[str, float]:
    """Probability of every class."""
    model, transform = load(name)
    shares = model(transform(image.convert("RGB"))[None]).softmax(1)[0]
    return dict(zip(model.pretrained_cfg["label_names"], shares.tolist(), strict=True))


def staircase(name: str) -> Figure:
    """The side of the feature maps in each unit of a model: every step down is a downsampling."""
    model, _ = load(name)
    layout, size = bmsn_zoo.Layout.parse(model.layout), model.pretrained_cfg["input_size"][-1]
    sides = bmsn_zoo.backbone_of("bmsn_resnet20").resolutions(layout, size)
    steps = sorted(set(sides), reverse=True)
    figure = Figure(figsize=(4, 2.2), layout="constrained")
    axes = figure.add_subplot(title=f"{layout}: where it downsamples", xlabel="unit", ylabel="pixels")
    axes.bar(range(len(sides)), sides, width=1, color=[COLORS[steps.index(side)] for side in sides], edgecolor="white")
    axes.set_yticks(steps)
    axes.set_xticks(range(len(sides)))
    return figure


def classify(image: PIL.Image.Image | None, trained_on: str) -> list[Any]:
    """Labels and staircase of the default, then those of the found layout."""
    names = [FOUND[trained_on] + suffix for suffix in KINDS]
    return [part for name in names for part in (predict(name, image) if image else None, staircase(name))]


with gr.Blocks(title="Where should a network downsample?") as demo:
    gr.Markdown(
        "# Where should a network downsample?\nTwo ResNet20 with the same number of weights, trained alike on 32-pixel "
        "images. Only the places differ where they halve the resolution: the steps below."
    )
    with gr.Row():
        image = gr.Image(type="pil", label="an image")
        with gr.Column():
            trained_on = gr.Radio(list(FOUND), value="CIFAR-10", label="trained on")
            button = gr.Button("Classify", variant="primary")
    outputs: list[Any] = []
    with gr.Row():
        for kind in KINDS.values():
            with gr.Column():
                outputs += [gr.Label(num_top_classes=3, label=kind), gr.Plot(show_label=False)]
    gr.on([button.click, image.upload, trained_on.change, demo.load], classify, [image, trained_on], outputs)

if __name__ == "__main__":
    demo.launch()
