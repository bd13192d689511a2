"""The README's table of speed, from the committed results: python benchmarks/summary.py"""

import json
import sys
from pathlib import Path
from typing import Any

from bmsn_zoo.config import SearchConfig, load_recipe

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "bf16 computed natively": "zen5-avx512-bf16-2-cores.json",
    "float32, held to AVX2": "zen5-limited-to-avx2-fp32-2-cores.json",
}
HALF = 25_000  # of CIFAR-10's training images: they train weights, and as many score layouts
PUBLISHED = load_recipe("cifar10-resnet20-published", SearchConfig)
MEASURED = 640  # score images that the benchmark evaluated


def load(file: str) -> dict[str, Any]:
    """What was measured, by the names of the parts."""
    return {name: part["result"] for name, part in json.loads((RESULTS / file).read_text(encoding="utf-8")).items()}


def whole_search(parts: dict[str, Any], epochs: int) -> float:
    """How many times faster a search on CIFAR-10 is: all its steps, and its evaluation of all score images."""
    steps = epochs * (HALF // PUBLISHED["batch_size"])
    plain, ours = (
        steps * parts["search_step"][way] + HALF / MEASURED * parts["evaluation"][way]
        for way in ("plain_seconds", "our_seconds")
    )
    return plain / ours


def table() -> str:
    """The table, as Markdown."""
    epochs = PUBLISHED["epochs"]
    found = [load(file) for file in COLUMNS.values()]
    rows = {
        "a search step": [parts["search_step"]["ratio"] for parts in found],
        "evaluating all layouts": [parts["evaluation"]["ratio"] for parts in found],
        "a whole search of 100 epochs, from both": [whole_search(parts, 100) for parts in found],
        f"the published search ({epochs} epochs), from both": [whole_search(parts, epochs) for parts in found],
    }
    head = ["| times faster | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    return "\n".join(
        [*head, *(f"| {name} | {' | '.join(f'{v:.3g}' for v in values)} |" for name, values in rows.items())]
    )


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
