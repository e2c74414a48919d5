import math

import numpy as np
import pytest
import soundfile

from adalora.errors import DataError
from adalora.tasks.kinds.speech import read_audio

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
    assert metrics["wer"] >= 0
    assert metrics["final_rank_total"] == metrics["target_rank_total"]


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
