"""What a recipe's `task:` part may say: one class per task, told apart by `name`.

`ROLES` of each class lists the columns the task reads: the role's name, and whether it must be there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Base of all task options: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ROLES: ClassVar[dict[str, bool]] = {}


class Generation(Options):
    """How text is generated for the metrics.

    Attributes:
        max_new_tokens: Most tokens generated for one row.
        num_beams: Beams of the beam search; 1 is greedy.
        length_penalty: Above 0 favours longer beams.
        no_repeat_ngram: Size of n-grams that may not come twice; 0 allows all. By default as the checkpoint's own
            generation settings say, and all where they say nothing.
    """

    max_new_tokens: int = Field(default=64, ge=1)
    num_beams: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    no_repeat_ngram: int | None = Field(default=None, ge=0)


class Classification(Options):
    """One of several labels for a text, or for a pair of texts where `text_pair` is named.

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
    """

    ROLES = {"text": True, "text_pair": False, "label": True}

    name: Literal["classification"]
    labels: list[str] | None = None


class SentencePair(Options):
    """One of several labels for two texts (inference, paraphrase, reranking).

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
    """

    ROLES = {"text": True, "text_pair": True, "label": True}

    name: Literal["sentence-pair"]
    labels: list[str] | None = None


class MultiLabel(Options):
    """Any number of labels for a text; the `labels` column holds a list, or text joined by `separator`.

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
        separator: Between labels where the column is text.
        threshold: A label is given where its probability is above this.
    """

    ROLES = {"text": True, "text_pair": False, "labels": True}

    name: Literal["multi-label"]
    labels: list[str] | None = None
    separator: str = ","
    threshold: float = Field(default=0.5, gt=0, lt=1)


class Regression(Options):
    """A number for a text or a pair of texts.

    Attributes:
        start_at_mean: A new head's bias starts at the mean of the training rows' numbers. From 0 a run spends its first
            steps on that mean alone. Heads without a bias (Llama's) start as they are.
    """

    ROLES = {"text": True, "text_pair": False, "label": True}

    name: Literal["regression"]
    start_at_mean: bool = True


class Embedding(Options):
    """A vector for each text, near to that of the text that belongs to it: a question and its passage.

    Attributes:
        pooling: The vector is the mean over a text's tokens, or its first token's (`"cls"`).
        temperature: Divides the cosines in the loss; lower presses harder on the passages that come near.
        prefix: Put before every `text`, where the model wants it ("query: ").
        pair_prefix: The same for `text_pair` ("passage: ").
    """

    ROLES = {"text": True, "text_pair": True}

    name: Literal["embedding"]
    pooling: Literal["mean", "cls"] = "mean"
    temperature: float = Field(default=0.05, gt=0)
    prefix: str = ""
    pair_prefix: str = ""


class QuestionAnswering(Options):
    """The span of a context that answers a question (SQuAD); with `no_answer`, or that there is none.

    Attributes:
        no_answer: Some questions have no answer (SQuAD v2).
        stride: Tokens that two windows over one long context share.
        max_answer_tokens: Longest answer looked for.
        candidates: Best start and end positions that are combined.
        no_answer_threshold: "No answer" is given where its score exceeds the best span's by more than this;
            `tune` picks it on the validation split.
    """

    ROLES = {"question": True, "context": True, "answers": True}

    name: Literal["question-answering"]
    no_answer: bool = False
    stride: int = Field(default=128, ge=0)
    max_answer_tokens: int = Field(default=30, ge=1)
    candidates: int = Field(default=20, ge=1)
    no_answer_threshold: float | Literal["tune"] = 0.0


class TokenClassification(Options):
    """A label for each word (names, parts of speech); both columns hold lists of equal length.

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
    """

    ROLES = {"tokens": True, "tags": True}

    name: Literal["token-classification"]
    labels: list[str] | None = None


class Seq2Seq(Options):
    """Text to text with an encoder-decoder: summaries, translations. Scored by ROUGE.

    Attributes:
        prefix: Put before every source, as T5 wants.
        max_target_length: Tokens of the target kept in training.
        generation: How texts are generated for the metrics; `null` measures the loss only.
    """

    ROLES = {"source": True, "target": True}

    name: Literal["seq2seq"]
    prefix: str = ""
    max_target_length: int = Field(default=128, ge=1)
    generation: Generation | None = Generation()


class CausalLM(Options):
    """Next-token prediction on `text`, on `prompt` and `completion`, or on `messages` (a chat).

    Attributes:
        loss_on: `"completion"` leaves out the prompt, or all but the assistant's turns; `"all"` counts
            every token. On plain text there is no difference.
        template: Text with `{column}` fields from which the prompt is made, in place of a `prompt` column.
        separator: Between prompt and completion.
        chat: Pass prompt and completion through the tokenizer's chat template.
        generation: Also generate completions of the held-out rows and score them by ROUGE.
    """

    ROLES = {"text": False, "prompt": False, "completion": False, "messages": False}

    name: Literal["causal-lm"]
    loss_on: Literal["completion", "all"] = "completion"
    template: str | None = None
    separator: str = ""
    chat: bool = False
    generation: Generation | None = None


class ImageClassification(Options):
    """One of several labels for an image: a path, or an image of the data set.

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
    """

    ROLES = {"image": True, "label": True}

    name: Literal["image-classification"]
    labels: list[str] | None = None


class SpeechToText(Options):
    """Speech to text with Whisper and its kin. Scored by the word error rate.

    Attributes:
        language: Language of the speech, for multilingual models.
        max_target_length: Tokens of the text kept in training.
        generation: How texts are generated for the metrics; `null` measures the loss only.
    """

    ROLES = {"audio": True, "text": True}

    name: Literal["speech-to-text"]
    language: str | None = None
    max_target_length: int = Field(default=128, ge=1)
    generation: Generation | None = Generation(max_new_tokens=128)


TaskOptions: TypeAlias = Annotated[
    Classification
    | SentencePair
    | MultiLabel
    | Regression
    | Embedding
    | QuestionAnswering
    | TokenClassification
    | Seq2Seq
    | CausalLM
    | ImageClassification
    | SpeechToText,
    Field(discriminator="name"),
]

TASKS: tuple[type[Options], ...] = (
    Classification,
    SentencePair,
    MultiLabel,
    Regression,
    Embedding,
    QuestionAnswering,
    TokenClassification,
    Seq2Seq,
    CausalLM,
    ImageClassification,
    SpeechToText,
)


def task_names() -> list[str]:
    """Names that `task:` may have."""
    return [cls.model_fields["name"].annotation.__args__[0] for cls in TASKS]  # type: ignore[union-attr]
