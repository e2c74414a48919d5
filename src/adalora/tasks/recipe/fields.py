"""A recipe: everything that one training run needs, validated before anything is loaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adalora.config import AdaLoraConfig
from adalora.errors import RecipeError
from adalora.report.thresholds import DiagnosticThresholds
from adalora.tasks.recipe.checks import (
    SplitName,
    check_causal_columns,
    check_lora_fields,
    check_split_files,
    check_stream,
    preset_fields,
    resolve_model_name,
)
from adalora.tasks.recipe.options import CausalLM, TaskOptions
from adalora.tasks.recipe.problems import describe, suggest


class Part(BaseModel):
    """Base of a recipe's parts: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(Part):
    """The base model.

    Attributes:
        name: Hub name, local folder, or `package:PACKAGE/FOLDER` for weights that a Python package carries.
        revision: Branch, tag or commit on the hub.
        gguf_file: A GGUF file in that folder, dequantised on loading.
        tokenizer: Name or folder of the tokenizer where it is not the model's.
        dtype: Of the base weights; `auto` takes what the checkpoint has, never below float32 on a CPU.
        quantization: Load the base weights in 4 (NF4, double) or 8 bits with bitsandbytes.
        attention: Implementation, e.g. `sdpa`, `flash_attention_2`.
        config: Fields of the model's own config to change, e.g. `cls_dropout`.
    """

    name: str = Field(min_length=1)
    revision: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    attention: str | None = None
    config: dict[str, Any] = {}

    def resolve(self) -> str:
        """The name for `from_pretrained`: `package:` names become folders. The package is not imported.

        Raises:
            RecipeError: The package or folder is not there.
        """
        return resolve_model_name(self.name)


class DataPart(Part):
    """The rows.

    Attributes:
        name: A built-in set (`airline`, `banking77`, …) or a hub name.
        config: Configuration of the hub's set, e.g. `mnli` of `glue`.
        files: Local files instead of a name: one path, or one (or a list) per split.
        format: Of the files, where their ending does not tell.
        header: Column names of CSV files that have no header line.
        delimiter: Of CSV files.
        splits: Which split of the source is used as `train`, `validation`, `test`; `null` leaves one out.
        validation_fraction: Taken from `train` by `seed` where the source has no validation split.
        test_fraction: The same for `test`.
        group_by: Rows with the same value of this column stay in one split.
        columns: Role of the task → column of the data, where they differ.
        limit: At most this many rows of a split, drawn by `seed`.
        streaming: Read row by row, for sets that do not fit on the disk; needs `training.max_steps`, and held-out rows
            in splits of their own.
        seed: Of the splits and draws, apart from the training's.
    """

    name: str | None = None
    config: str | None = None
    files: str | list[str] | dict[str, str | list[str]] | None = None
    format: Literal["csv", "json", "parquet", "text"] | None = None
    header: list[str] | None = None
    delimiter: str = Field(default=",", min_length=1)
    splits: dict[SplitName, str | None] = {}
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    test_fraction: float = Field(default=0.0, ge=0, lt=1)
    group_by: str | None = None
    columns: dict[str, str] = {}
    limit: dict[SplitName, int] = {}
    streaming: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> DataPart:
        if (self.name is None) == (self.files is None):
            raise ValueError("needs a name (built-in set or hub) or files, and not both")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        for split, count in self.limit.items():
            if count < 1:
                raise ValueError(f"limit.{split}={count} must be at least 1")
        if isinstance(self.files, dict):
            check_split_files(self.files, self.splits)
        if self.streaming:
            check_stream({name: getattr(self, name) for name in ("validation_fraction", "test_fraction", "group_by")})
        return self


class TrainingPart(Part):
    """The training run.

    Attributes:
        epochs: Passes over the training rows, unless `max_steps` is given.
        max_steps: Optimizer steps in place of epochs.
        batch_size: Rows per device and step.
        eval_batch_size: Rows per device in evaluation; by default four times `batch_size`.
        gradient_accumulation: Batches per optimizer step.
        learning_rate: Peak learning rate.
        head_learning_rate: Of modules that are trained whole: a new head, and those of `lora.modules_to_save`. By
            default `learning_rate`; a new head often bears ten times that, and learns the faster.
        weight_decay: Of AdamW.
        lr_schedule: Shape of the learning rate after its warm-up.
        lr_warmup: Learning-rate warm-up: a fraction of the run below 1, or a number of steps.
        max_grad_norm: Gradients are clipped to this norm.
        label_smoothing: Of the cross-entropy.
        optimizer: A name that transformers knows, e.g. `adamw_torch`, `paged_adamw_8bit`.
        max_length: Longest input in tokens; longer ones are cut.
        precision: Of the computation; `auto` is bf16 where the GPU has it, else fp32.
        gradient_checkpointing: Trade time for memory.
        length_grouping: Put rows of like length in one batch; faster, but the Trainer then walks from long rows to
            short ones, which hurts runs of few steps. Nothing for streams, images, speech and embeddings.
        evaluate_every: Steps between evaluations on the validation split; none by default.
        keep_best: Keep the best evaluation's weights instead of the last ones.
        save_every: Steps between checkpoints for `--resume` after the run was killed, of which the newest two are kept;
            none by default. `keep_best` writes one at each evaluation by itself.
        keep_pruned: Keep pruned triplets, as they were, in `pruned.safetensors` for `adalora curve` above 100 %.
        gradient_batches: Before training, turn the triplets to the leading directions of the gradient of this many
            batches (`adalora.GradientSketch`); 8 are enough. By default LoRA's random start.
        log_every: Steps between logged losses.
        workers: Processes that load data.
        seed: Of initialisation, order and dropout.
    """

    epochs: float = Field(default=3.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    eval_batch_size: int | None = Field(default=None, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    lr_warmup: float = Field(default=0.06, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    optimizer: str = "adamw_torch"
    max_length: int | None = Field(default=None, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    length_grouping: bool = False
    evaluate_every: int | None = Field(default=None, ge=1)
    keep_best: bool = False
    save_every: int | None = Field(default=None, ge=1)
    keep_pruned: bool = True
    gradient_batches: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=10, ge=1)
    workers: int = Field(default=0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> TrainingPart:
        if self.lr_warmup > 1 and not float(self.lr_warmup).is_integer():
            raise ValueError(f"lr_warmup={self.lr_warmup} is a fraction below 1 or a whole number of steps")
        if self.keep_best and self.evaluate_every is None:
            raise ValueError("keep_best needs evaluate_every")
        if self.keep_best and self.save_every is not None:
            raise ValueError(
                f"save_every={self.save_every}: keep_best writes a checkpoint at each evaluation (evaluate_every="
                f"{self.evaluate_every}) already; leave it out: --set training.save_every=null"
            )
        return self


class Published(Part):
    """A published result that the run is compared with at its end.

    Attributes:
        source: Where it stands.
        metrics: Metric → value, in the units of `metrics.json`.
        lora: The same of LoRA at this budget, where the source has it.
    """

    source: str = Field(min_length=1)
    metrics: dict[str, float] = Field(min_length=1)
    lora: dict[str, float] = {}


class Recipe(Part):
    """One training run: model, task, data, LoRA, AdaLoRA, training, output.

    Attributes:
        name: Short name; by default that of the file.
        description: One line for `adalora recipes`.
        model: See `ModelPart`; a plain text is its name.
        task: See `adalora.tasks.recipe.options`; a plain text is its name.
        data: See `DataPart`; a plain text is its name.
        lora: Fields of `peft.LoraConfig`. Without `r` the rank is what `adalora.target_rank` starts with best.
        adalora: Fields of `AdaLoraConfig`, and `preset`, `paper` or `released`: what the others are unless given, as in
            `AdaLoraConfig.paper()`; `null` trains plain LoRA.
        training: See `TrainingPart`.
        diagnostics: Fields of `DiagnosticThresholds`: when a diagnostic of the run speaks up.
        output: Folder that the run is written to.
        published: A published result to compare with.
    """

    name: str = Field(default="run", min_length=1)
    description: str = ""
    model: ModelPart
    task: TaskOptions
    data: DataPart
    lora: dict[str, Any] = {}
    adalora: AdaLoraConfig | None = None
    training: TrainingPart = TrainingPart()
    diagnostics: DiagnosticThresholds = DiagnosticThresholds()
    output: str = Field(min_length=1)
    published: Published | None = None

    @classmethod
    def parse(cls, fields: dict[str, Any], *, where: str = "recipe") -> Recipe:
        """Validate plain data.

        Args:
            fields: As read from YAML.
            where: Name of the file for messages.

        Raises:
            RecipeError: Names every wrong field, its value and what is allowed.
        """
        fields = dict(fields)
        for part in ("model", "task", "data"):
            if isinstance(fields.get(part), str):
                fields[part] = {"name": fields[part]}
        fields.setdefault("output", f"runs/{fields.get('name', 'run')}")
        try:
            return cls.model_validate(fields)
        except pydantic.ValidationError as error:
            raise RecipeError(f"{where}: {describe(error, cls)}") from error

    @field_validator("lora")
    @classmethod
    def _lora_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_lora_fields(value)

    @field_validator("adalora", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return preset_fields(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _columns_fit_task(self) -> Recipe:
        roles = self.task.ROLES
        for role in self.data.columns:
            if role not in roles:
                raise ValueError(f"data.columns.{role}: {suggest(role, roles, f'roles of {self.task.name}')}")
        if isinstance(self.task, CausalLM):
            check_causal_columns(self.task, set(self.data.columns))
        if self.data.streaming and self.training.max_steps is None:
            raise ValueError("data.streaming=True needs training.max_steps: the number of rows is not known")
        return self

    @cached_property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

    @property
    def roles(self) -> dict[str, bool]:
        """The columns that the task reads, by their roles, and whether each must be there."""
        if isinstance(self.task, CausalLM):  # of its forms, the one that is named
            return dict.fromkeys(self.data.columns, True)
        return self.task.ROLES

    def column(self, role: str) -> str:
        """The data's column for one role of the task."""
        return self.data.columns.get(role, role)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every default spelled out, that `parse` reads back."""
        fields = self.model_dump(mode="json", exclude_none=True)
        if self.adalora is not None:
            fields["adalora"] = self.adalora.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        else:
            fields["adalora"] = None
        fields["diagnostics"] = self.diagnostics.model_dump(mode="json", exclude_defaults=True)
        fields["data"]["splits"] = dict(self.data.splits)
        return fields
