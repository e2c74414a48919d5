"""Small random BERTs: a classifier with its sentences, and an encoder with its tokenizer as the hub keeps them."""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

WORDS = ["good", "bad", "nice", "awful", "flight", "bag", "the", "was", "my", "lost"]
MOODS = {"good": "positive", "nice": "positive", "bad": "negative", "awful": "negative"}


class Tokens(Dataset):
    """Random sentences, labelled by their first token."""

    def __init__(self, size):
        self.inputs = torch.randint(0, 100, (size, 10), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return {"input_ids": self.inputs[i], "labels": int(self.inputs[i, 0] > 50)}


def bert(seed=3, layers=2):
    """A tiny random BERT."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48
        )
    )


def save_encoder(folder):
    """A checkpoint with the tokenizer of `WORDS`, the same whatever ran before."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def mood(number):
    """Text and label of one sentence: its first word decides."""
    first = list(MOODS)[number % 4]
    return f"{first} {WORDS[4 + number % 6]} {WORDS[4 + number % 5]}", MOODS[first]
