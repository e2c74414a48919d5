"""Speech to text with Whisper and its kin."""

from __future__ import annotations

import io
from functools import partial
from math import gcd
from typing import Any

import numpy as np
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, Trainer

from adalora.errors import DataError
from adalora.tasks.kinds.base import IGNORED, predict_metrics
from adalora.tasks.kinds.generation import GenerativeTask
from adalora.tasks.recipe.options import SpeechToText


class SpeechTask(GenerativeTask):
    """Recordings (files, or a data set's own audio) and what is said in them."""

    auto_class = AutoModelForSpeechSeq2Seq
    peft_type = None  # PEFT's sequence-to-sequence type passes input_ids, which speech models do not take
    groups_by_length = False
    main_metric = "loss"
    needs = ("jiwer", "soundfile")

    @property
    def options(self) -> SpeechToText:
        """The recipe's task part."""
        assert isinstance(self.recipe.task, SpeechToText)
        return self.recipe.task

    def processor(self, name: str, **loading: Any) -> Any:
        """Feature extractor and tokenizer in one."""
        loading.pop("gguf_file", None)
        loader: Any = AutoProcessor
        processor = loader.from_pretrained(name, **loading)
        if self.options.language is not None:
            processor.tokenizer.set_prefix_tokens(language=self.options.language, task="transcribe")
        return processor

    def features(self, table: Any, processor: Any) -> Any:
        """Spectrograms and token ids, made when a row is asked for."""
        table = undecoded(table)

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            texts = processor.tokenizer(rows["text"], truncation=True, max_length=self.options.max_target_length)
            return {"input_features": spectrograms(rows["audio"], processor), "labels": texts["input_ids"]}

        return self.map_rows(table, encode) if self.recipe.data.streaming else table.with_transform(encode)

    def collator(self, processor: Any) -> Any:
        """Stacks spectrograms and pads labels."""
        return partial(collate, processor=processor)

    def arguments(self) -> dict[str, Any]:
        """The raw columns are needed until a row is asked for."""
        return {"remove_unused_columns": False}

    def evaluate(self, trainer: Trainer, table: Any, processor: Any) -> dict[str, float]:
        """Likelihood, and the word error rate of generated texts by jiwer."""
        scores = predict_metrics(trainer, self.features(table, processor))[1]
        if self.options.generation is None:
            return scores
        import jiwer

        rows = undecoded(table)

        def inputs(numbers: list[int]) -> Any:
            from transformers import BatchFeature

            audio = [rows[number]["audio"] for number in numbers]
            return BatchFeature({"input_features": spectrograms(audio, processor)})

        # Whisper would guess the language of each recording. English models, and other families, are not told one.
        settings = getattr(trainer.model, "generation_config", None)
        told = self.options.language is not None and hasattr(settings, "lang_to_id")
        more = {"language": self.options.language} if told else {}
        texts = self.generate(trainer, processor, len(rows), inputs=inputs, options=self.options.generation, **more)
        library: Any = jiwer
        normal = library.Compose([library.ToLowerCase(), library.RemovePunctuation(), library.RemoveMultipleSpaces()])
        wanted = [normal(text) for text in rows["text"]]
        return {"wer": float(jiwer.wer(wanted, [normal(text) for text in texts])), **scores}


def undecoded(table: Any) -> Any:
    """The data set with its audio as bytes, which are decoded here without further libraries."""
    from datasets import Audio

    features = table.features or {}
    return table.cast_column("audio", Audio(decode=False)) if isinstance(features.get("audio"), Audio) else table


def spectrograms(recordings: list[Any], processor: Any) -> Any:
    """Model inputs of several recordings: (rows, mel bins, frames), fp32."""
    rate = processor.feature_extractor.sampling_rate
    waves = [read_audio(recording, rate) for recording in recordings]
    return processor.feature_extractor(waves, sampling_rate=rate, return_tensors="pt")["input_features"]


def read_audio(recording: Any, rate: int) -> np.ndarray:
    """Mono samples (fp32, at `rate` Hz) of a path, of `{path, bytes}`, or of `{array, sampling_rate}`.

    Raises:
        DataError: The file cannot be read.
    """
    from scipy.signal import resample_poly

    if isinstance(recording, dict) and "array" in recording:
        wave, given = np.asarray(recording["array"], dtype=np.float32), int(recording["sampling_rate"])
    else:
        import soundfile

        inner = recording if isinstance(recording, dict) else {"path": recording, "bytes": None}
        try:
            wave, given = soundfile.read(
                io.BytesIO(inner["bytes"]) if inner.get("bytes") else inner["path"], dtype="float32"
            )
        except (OSError, soundfile.LibsndfileError) as error:
            raise DataError(f"audio {inner.get('path')!r} cannot be read: {error}") from error
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    if given == rate:
        return wave
    common = gcd(given, rate)
    return np.asarray(resample_poly(wave, rate // common, given // common), dtype=np.float32)


def collate(rows: list[dict[str, Any]], *, processor: Any) -> dict[str, Any]:
    """One batch: spectrograms stacked, labels padded with what the loss leaves out."""
    import torch

    labels = processor.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
    ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, IGNORED)
    start = (getattr(processor.tokenizer, "prefix_tokens", None) or [None])[0]
    if start is not None and bool((ids[:, 0] == start).all()):
        ids = ids[:, 1:]  # the model puts it there itself
    spectra = torch.stack([torch.as_tensor(row["input_features"]) for row in rows])
    return {"input_features": spectra, "labels": ids}
