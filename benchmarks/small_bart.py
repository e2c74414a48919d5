"""Trains a small encoder-decoder on this machine, for there is no other real one to compare methods on here.

    python -m benchmarks.small_bart FOLDER

A BART of 3.5M parameters learns to restore masked facts and texts of E2E's training rows; that facts become a text is
left to the methods of the suite `architectures`, which expects the folder `runs/small-bart`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from adalora.tasks.data.sources import load_builtin

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
STEPS, BATCH, RATE, MASKED = 2_000, 32, 1e-3, 0.35


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Word pieces of the texts, 2,000 of them, with BART's special tokens."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100))  # type: ignore[call-arg]
    inner.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    inner.decoder = decoders.WordPiece()  # type: ignore[assignment]
    inner.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=2_000, special_tokens=list(SPECIAL.values())))
    ends = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def make_model(tokenizer: PreTrainedTokenizerFast) -> BartForConditionalGeneration:
    """Three layers a side, 192 wide, random weights."""
    shape = {"encoder_layers": 3, "decoder_layers": 3, "d_model": 192, "max_position_embeddings": 128}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    widths = {"encoder_ffn_dim": 768, "decoder_ffn_dim": 768}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **shape, **heads, **widths, **ids))


def batches(texts: list[str], tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches: ids with a share of the tokens masked, and the whole text as labels."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = tokenizer(
            draw.choices(texts, k=BATCH), return_tensors="pt", padding=True, truncation=True, max_length=96
        )
        ids, attention = batch["input_ids"], batch["attention_mask"]
        hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids > 2)
        labels = ids.masked_fill(attention == 0, -100)
        yield {
            "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
            "attention_mask": attention,
            "labels": labels,
        }


def main() -> None:
    """Train and save model and tokenizer."""
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    rows = load_builtin("e2e")["train"]
    texts = [*rows["facts"], *rows["text"]]
    tokenizer = make_tokenizer(texts)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = make_model(tokenizer).to(device)  # type: ignore[arg-type]  # its stub takes no device alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    print(f"{model.num_parameters():,} parameters, {len(texts)} texts, {STEPS} steps of {BATCH}", flush=True)
    for step, batch in zip(range(1, STEPS + 1), batches(texts, tokenizer, seed=0)):
        loss = model(**{name: part.to(device) for name, part in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
