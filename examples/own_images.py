"""A folder of photos, from a search to predictions: `python examples/own_images.py PHOTOS`.

The folder holds a subfolder of photos for each class; they may be of any size and format. The settings are short, for
a first look: some minutes for 300 photos on two CPU cores. More epochs and larger images give better networks.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import bmsn_zoo


def main(argv: Sequence[str] | None = None) -> None:
    """Search, train what was found, and label a photo of every class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with a subfolder of photos for each class")
    parser.add_argument("--epochs", type=int, default=20, help="of the search, and of each training (default: 20)")
    parser.add_argument("--image-size", type=int, default=48, help="pixels that the network sees (default: 48)")
    parser.add_argument("--max-macs", default="1.2x", help="of a layout, against the default's (default: 1.2x)")
    parser.add_argument("--output", type=Path, default=Path("runs/own_images"), help="folder for both runs")
    given = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("bmsn_zoo").setLevel(logging.INFO)  # says what it learns from, and every epoch

    size = {"image_size": given.image_size, "epochs": given.epochs}
    limits = {"max_macs": given.max_macs, "confirm": 2, "confirm_epochs": given.epochs}
    found = bmsn_zoo.search(given.photos, given.output / "search", **size, **limits)
    print(found.ranking.head(), "\n")
    print(found.confirmed.verdict if found.confirmed else f"not confirmed; to train: {found.best.layout}")

    # a fifth of the photos is never learned from, and measures what is learned from the others
    fitted = {"batch_size": found.record.settings["batch_size"], "lr": 0.05}  # to the number of photos
    trained = bmsn_zoo.train(from_search=found, output=given.output / "training", epochs=given.epochs, **fitted)
    layout, tested = trained.record.layout, trained.record.test_images
    print(f"layout {layout}: accuracy {trained.accuracy:.1%} on {tested} test photos")

    classes = [folder for folder in sorted(given.photos.iterdir()) if folder.is_dir()]
    for photo, labels in trained.predict(*(next(file for file in sorted(c.rglob("*.*"))) for c in classes)).items():
        print(f"{photo.relative_to(given.photos)}: {labels[0][0]} ({labels[0][1]:.0%})")


if __name__ == "__main__":
    try:
        main()
    except bmsn_zoo.InputError as error:
        sys.exit(f"error: {error}")
