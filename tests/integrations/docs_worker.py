"""Runs the blocks of one section of docs/training.md, in each of several processes started by torchrun.

Usage: torchrun --nproc_per_node 2 docs_worker.py SECTION FOLDER
"""

import sys
import warnings
from pathlib import Path

import torch
from test_resume_trainer import Tokens, bert

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs_blocks import run, sections


def given(folder):
    """The names that the page says are there."""
    inputs = torch.randint(0, 100, (4, 10))
    return {
        "base": bert(),
        "fresh_base": bert,
        "dataset": Tokens(64),
        "batches": [{"input_ids": inputs, "labels": (inputs[:, 0] > 50).long()}] * 20,
        "folder": str(folder),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    title, folder = sys.argv[1:]
    names = given(folder)
    for block in sections("docs/training.md")[title]:
        run(block, names, where=f"docs/training.md: {title}")
