"""Fine-tunes a model of the zoo on other images, by timm and accelerate alone: `python examples/finetune.py DATA`.

DATA is a folder with a subfolder of images for each class, or a Hub id. Start with `--scratch` to see what the weights
are worth; `accelerate launch` it for several GPUs.
"""

import argparse
from collections.abc import Sequence

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import ClassLabel, Image, load_dataset
from torch.utils.data import DataLoader

import bmsn_zoo  # noqa: F401  the import registers the models


def main(argv: Sequence[str] | None = None) -> float:
    """Fine-tune a model; returns its accuracy on the test images, a fraction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with a subfolder of images for each class, or a Hub id")
    parser.add_argument("--model", default="bmsn_resnet20_cifar100", help="of the zoo (default: %(default)s)")
    parser.add_argument("--scratch", action="store_true", help="start from random weights")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    set_seed(given.seed)
    accelerator = Accelerator()

    data = load_dataset(given.data)
    image, label = (next(n for n, f in data["train"].features.items() if isinstance(f, k)) for k in (Image, ClassLabel))
    held_out = next((name for name in ("test", "validation") if name in data), None)
    if held_out is None:  # a fifth of every class
        data, held_out = data["train"].train_test_split(0.2, stratify_by_column=label, seed=0), "test"

    classes = data["train"].features[label].num_classes
    model = timm.create_model(given.model, pretrained=not given.scratch, num_classes=classes)  # with a head of its own
    config = timm.data.resolve_model_data_config(model)
    augment = timm.data.create_transform(**config, is_training=True, scale=(0.5, 1))
    plain = timm.data.create_transform(**config)

    def loader(split: str, transform: torch.nn.Module, shuffle: bool) -> DataLoader:
        def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
            images = torch.stack([transform(row[image].convert("RGB")) for row in rows])
            return images, torch.tensor([row[label] for row in rows])

        return DataLoader(data[split], given.batch_size, shuffle=shuffle, collate_fn=collate)

    optimizer = torch.optim.SGD(model.parameters(), given.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model, optimizer, train, test = accelerator.prepare(
        model, optimizer, loader("train", augment, shuffle=True), loader(held_out, plain, shuffle=False)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=given.epochs * len(train))
    for epoch in range(given.epochs):
        model.train()
        for images, labels in train:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        accelerator.print(f"epoch {epoch + 1}/{given.epochs}: loss {loss.item():.3f}")

    model.eval()
    right = []
    for images, labels in test:
        with torch.no_grad():
            right.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
    accuracy = torch.cat(right).float().mean().item()
    accelerator.print(f"accuracy on {len(torch.cat(right))} test images: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
