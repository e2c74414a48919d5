import math

import numpy as np
import pytest
import soundfile

from adalora.errors import DataError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.speech import SpeechTask, read_audio
from adalora.tasks.runs.models import build_model
from adalora.tasks.runs.training import make_trainer

from ..small import whisper
from ..tiny import make_recipe, run, write_rows

RATE = 16_000


@pytest.fixture
def model(tmp_path):
    whisper(tmp_path / "whisper")
    return tmp_path / "whisper"


def tone(hertz, rate=RATE, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_a_run_measures_words(model, tmp_path):
    rows = []
    for n in range(16):
        soundfile.write(tmp_path / f"{n}.wav", tone(200 if n % 2 else 3000), RATE)
        rows.append({"audio": str(tmp_path / f"{n}.wav"), "text": "low" if n % 2 else "high"})
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "speech-to-text", "generation": {"max_new_tokens": 4}},
        data={"files": write_rows(tmp_path / "rows.jsonl", rows), "test_fraction": 0.25},
        training={"max_steps": 30, "batch_size": 4, "learning_rate": 2e-2},
    )
    metrics = run(recipe).metrics
    assert metrics["nll"] < math.log(16)
    assert "wer" in metrics
    assert metrics["final_rank_total"] == metrics["target_rank_total"]


def prepared(model, tmp_path, texts, **task):
    """Task, processor, trainer and splits of recordings with these texts; nothing is trained."""
    soundfile.write(tmp_path / "a.wav", tone(200), RATE)
    rows = [{"audio": str(tmp_path / "a.wav"), "text": text} for text in texts]
    recipe = make_recipe(
        tmp_path, model,
        task={"name": "speech-to-text", "generation": {"max_new_tokens": 2}, **task},
        data={"files": write_rows(tmp_path / "rows.jsonl", rows)},
        training={"batch_size": 2, "eval_batch_size": 2},
    )  # fmt: skip
    splits = load_splits(recipe)
    made = SpeechTask(recipe, splits)
    processor = made.processor(str(model))
    trainer = make_trainer(recipe, made, model=build_model(recipe, made, processor), processor=processor, splits=splits)
    return made, processor, trainer, splits


def test_wrong_words_are_counted_over_all_rows(model, tmp_path, monkeypatch):
    """Of four words one is another and one too many: case, punctuation and spaces are no mistakes."""
    task, processor, trainer, splits = prepared(model, tmp_path, ["low HIGH low", "high"])
    monkeypatch.setattr(task, "generate", lambda *_, **__: ["LOW, high  low.", "low low"])
    assert task.evaluate(trainer, splits.train, processor)["wer"] == 2 / 4


@pytest.mark.parametrize(("language", "token"), [("chinese", "<|zh|>"), ("en", "<|en|>")])
def test_texts_are_trained_and_generated_in_the_recipes_language(language, token, model, tmp_path):
    task, processor, trainer, splits = prepared(model, tmp_path, ["low high"] * 3, language=language)
    names = ["<|startoftranscript|>", token, "<|transcribe|>", "<|notimestamps|>"]
    prefix = processor.tokenizer.convert_tokens_to_ids(names)
    assert [row["labels"][:4] for row in task.features(splits.train, processor)] == [prefix] * 3
    read = []
    decoder = trainer.model.get_base_model().model.decoder
    decoder.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].tolist()), with_kwargs=True)
    task.evaluate(trainer, splits.train, processor)
    beginnings = [ids for batch in read for ids in batch if ids[0] == prefix[0]]
    assert [ids[:4] for ids in beginnings] == [prefix] * 6  # three with their texts, three to go on from
    assert [len(ids) for ids in beginnings].count(4) == 3


def test_a_model_that_knows_no_languages_is_not_told_one(model, tmp_path):
    task, processor, trainer, splits = prepared(model, tmp_path, ["low"], language="en")
    settings = trainer.model.generation_config
    del settings.lang_to_id, settings.task_to_id
    settings.is_multilingual = False
    assert task.evaluate(trainer, splits.train, processor)["wer"] >= 0


def test_audio_of_every_form_is_the_same(tmp_path):
    file = tmp_path / "a.wav"
    soundfile.write(file, np.stack([tone(200, 8000)] * 2, axis=1), 8000, subtype="FLOAT")
    from_path = read_audio(str(file), RATE)
    from_bytes = read_audio({"path": None, "bytes": file.read_bytes()}, RATE)
    from_array = read_audio({"array": tone(200, 8000), "sampling_rate": 8000}, RATE)
    assert from_path.dtype == np.float32
    assert len(from_path) == len(tone(200))
    np.testing.assert_allclose(from_path, from_bytes)
    np.testing.assert_allclose(from_path, from_array, atol=1e-6)
    assert np.abs(from_path - tone(200))[200:-200].max() < 0.01  # resampled, not stretched


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "b.wav").write_bytes(b"no audio")
    with pytest.raises(DataError, match=r"b\.wav"):
        read_audio(str(tmp_path / "b.wav"), RATE)
