"""Runs the blocks of sections of docs/training.md, in each of several processes started by torchrun.

What a section writes lies in a folder of its name.

Usage: torchrun --nproc_per_node 2 docs_worker.py FOLDER SECTION …
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

import adalora
from helpers.docs_blocks import run, sections
from helpers.tiny_bert import Tokens, bert

DECODERS = ["TRL", "Quantised bases"]  # sections whose base generates text


def given(folder, title):
    """The names that the page says are there."""
    if title not in DECODERS:
        inputs = torch.randint(0, 100, (4, 10))
        batches = [{"input_ids": inputs, "labels": (inputs[:, 0] > 50).long()}] * 20
        return {"base": bert(), "fresh_base": bert, "dataset": Tokens(64), "batches": batches, "folder": str(folder)}
    import datasets
    from llamas import llama, sentence, tokenizer

    base, inputs = llama(width=128), torch.randint(4, 64, (4, 10))
    base.save_pretrained(Path(folder) / "base")
    columns = {name: [sentence(i + n) for i in range(32)] for n, name in enumerate(("prompt", "chosen", "rejected"))}
    return {
        "base": base,
        "fresh_base": llama,
        "checkpoint": str(Path(folder) / "base"),
        "batches": [{"input_ids": inputs, "labels": inputs}] * 20,
        "texts": datasets.Dataset.from_dict({"text": [sentence(i) for i in range(32)]}),
        "preferences": datasets.Dataset.from_dict(columns),
        "tokenizer": tokenizer(),
        "folder": str(folder),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, *titles = sys.argv[1:]
    for number, title in enumerate(titles):
        # The launcher's store keeps what groups have written under their numbers, and every section counts from here.
        distributed_c10d._world.group_count = 100 * number
        names = given(Path(folder) / title, title)
        for block in sections("docs/training.md")[title]:
            run(block, names, where=f"docs/training.md: {title}")
        if "trainer" in names:
            (names["controller"],) = adalora.controllers(names["trainer"].model).values()
        assert os.environ["WORLD_SIZE"] == "2"
        if "accelerator" in names:
            assert names["accelerator"].num_processes == 2
        print(f"{title}: {names['controller'].live} of {names['controller'].target_budget}", flush=True)
