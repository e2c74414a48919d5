import json

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["good", "bad", "nice", "awful", "flight", "bag", "the", "was", "my", "lost"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random BERT and its tokenizer, the same whatever ran before."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=15,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def rows(count):
    """Texts whose label is their first word's mood."""
    moods = {"good": "positive", "nice": "positive", "bad": "negative", "awful": "negative"}
    for n in range(count):
        first = list(moods)[n % 4]
        yield {
            "text": f"{first} {WORDS[4 + n % 6]} {WORDS[4 + n % 5]}",
            "text_pair": f"the {WORDS[4 + n % 3]}",
            "label": moods[first],
            "labels": f"{moods[first]}, long" if n % 3 else moods[first],
            "number": float(n % 4),
        }


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(120)))
    return path
