"""A stand-in for the hub: a few made rows of each data set that recipes name, with its columns and splits."""

import io

import numpy as np
import soundfile
from datasets import Audio, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures

from adalora.errors import DataError
from adalora.tasks.data.sources import SQUAD_TEST, SQUAD_TRAIN, SQUAD_VALIDATION

from .tiny import WORDS

RATE = 16_000


def sentence(n, length=5):
    return " ".join(WORDS[(n * 7 + k * 3) % len(WORDS)] for k in range(length + n % 4))


def glue(columns, labels, *, numbers=False):
    """A task of GLUE: texts, a label and a running number."""
    label = Value("float32") if numbers else ClassLabel(names=labels)
    features = Features({**dict.fromkeys(columns, Value("string")), "label": label, "idx": Value("int32")})

    def row(n):
        value = (n % 11) / 2 if numbers else n % len(labels)
        return {**{name: sentence(n + k) for k, name in enumerate(columns)}, "label": value, "idx": n}

    return row, features


def squad(n, *, unanswerable=False):
    context = f"{sentence(n, 8)} w1 {sentence(n + 1, 8)}"
    found = {"text": ["w1"], "answer_start": [context.index("w1")]}
    titles = [*SQUAD_TRAIN[:6], SQUAD_VALIDATION[0], SQUAD_TEST[0]]
    return {
        "id": str(n),
        "title": titles[n % len(titles)],
        "context": context,
        "question": f"{sentence(n, 3)} w1",
        "answers": {"text": [], "answer_start": []} if unanswerable and n % 3 == 0 else found,
    }


def chat(n):
    turns = [(role, sentence(n + k)) for k, role in enumerate(("user", "assistant", "user", "assistant"))]
    messages = [{"content": text, "role": role} for role, text in turns]
    return {"prompt": messages[0]["content"], "prompt_id": str(n), "messages": messages}


def picture(n):
    return Pictures.fromarray(np.full((20, 24, 3), 40 + 20 * (n % 4), dtype=np.uint8))


def recording(n):
    wave = 0.5 * np.sin(2 * np.pi * (200 if n % 2 else 3000) * np.arange(RATE // 2) / RATE)
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV")
    return {"path": f"{n}.wav", "bytes": file.getvalue()}


FOOD = Features({"image": Image(), "label": ClassLabel(names=["apple pie", "baklava", "sushi", "waffles"])})
INTENTS = Features({"text": Value("string"), "label": ClassLabel(names=["card", "cash", "fees"])})
SUMMARIES = {"source": lambda n: [sentence(n), sentence(n + 1)], "target": lambda n: [sentence(n, 3)]}
FACTS = {"meaning_representation": lambda n: sentence(n), "human_reference": lambda n: sentence(n + 1)}
USUAL = ("train", "validation", "test")

# (name, configuration) → how a row is made, its types where rows do not tell, splits.
SETS = {
    ("nyu-mll/glue", "cola"): (*glue(["sentence"], ["unacceptable", "acceptable"]), USUAL),
    ("nyu-mll/glue", "sst2"): (*glue(["sentence"], ["negative", "positive"]), USUAL),
    ("nyu-mll/glue", "mrpc"): (*glue(["sentence1", "sentence2"], ["not_equivalent", "equivalent"]), USUAL),
    ("nyu-mll/glue", "qqp"): (*glue(["question1", "question2"], ["not_duplicate", "duplicate"]), USUAL),
    ("nyu-mll/glue", "qnli"): (*glue(["question", "sentence"], ["entailment", "not_entailment"]), USUAL),
    ("nyu-mll/glue", "rte"): (*glue(["sentence1", "sentence2"], ["entailment", "not_entailment"]), USUAL),
    ("nyu-mll/glue", "stsb"): (*glue(["sentence1", "sentence2"], [], numbers=True), USUAL),
    ("nyu-mll/glue", "mnli"): (
        *glue(["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
        ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
    ("rajpurkar/squad", None): (squad, None, USUAL[:2]),
    ("rajpurkar/squad_v2", None): (lambda n: squad(n, unanswerable=True), None, USUAL[:2]),
    ("EdinburghNLP/xsum", None): (
        lambda n: {"document": sentence(n, 12), "summary": sentence(n, 4), "id": str(n)}, None, USUAL,
    ),
    ("abisee/cnn_dailymail", "3.0.0"): (
        lambda n: {"article": sentence(n, 12), "highlights": f"{sentence(n, 3)}\n{sentence(n, 3)}", "id": str(n)},
        None,
        USUAL,
    ),
    ("PolyAI/banking77", None): (lambda n: {"text": sentence(n), "label": n % 3}, INTENTS, ("train", "test")),
    ("sentence-transformers/stsb", None): (
        lambda n: {"sentence1": sentence(n), "sentence2": sentence(n + 1), "score": (n % 11) / 10}, None, USUAL,
    ),
    ("e2e_nlg", None): (lambda n: {name: make(n) for name, make in FACTS.items()}, None, USUAL),
    ("allenai/scitldr", "Abstract"): (lambda n: {name: make(n) for name, make in SUMMARIES.items()}, None, USUAL),
    ("openai/gsm8k", "main"): (
        lambda n: {"question": sentence(n), "answer": f"{sentence(n)} #### {n}"}, None, ("train", "test"),
    ),
    ("HuggingFaceH4/ultrachat_200k", None): (chat, None, ("train_sft", "test_sft", "train_gen", "test_gen")),
    ("ethz/food101", None): (lambda n: {"image": picture(n), "label": n % 4}, FOOD, USUAL[:2]),
    ("openslr/librispeech_asr", "clean"): (
        lambda n: {"file": f"{n}.wav", "audio": recording(n), "text": "low" if n % 2 else "HIGH"},
        None,
        ("train.100", "train.360", "validation", "test"),
    ),
}  # fmt: skip


def load_hub(name, config=None, *, streaming=False):
    """What `adalora.tasks.data.hub.load_hub` gives: 32 rows of the first split, 8 of each other."""
    if (name, config) not in SETS:
        raise DataError(f"the stand-in has no {name!r} ({config})")
    make, features, splits = SETS[name, config]
    rows = {split: [make(n) for n in range(8 if place else 32)] for place, split in enumerate(splits)}
    tables = {split: Dataset.from_list(part, features=features) for split, part in rows.items()}
    if "audio" in tables[splits[0]].column_names:
        tables = {split: table.cast_column("audio", Audio(sampling_rate=RATE)) for split, table in tables.items()}
    if streaming:
        return {split: table.to_iterable_dataset() for split, table in tables.items()}
    return tables
