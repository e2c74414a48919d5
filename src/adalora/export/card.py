"""The model card beside an adapter: README.md with front matter."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jinja2

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter
from adalora.export.cleanup import module_norms
from adalora.version import __version__

_CAUSAL = """import torch
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{name}")"""

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def loading_lines(adapter: Adapter, format: str, name: str, base: str, rank: int) -> list[tuple[str, str, str]]:
    """How to load an export in each stack that takes its layout: (title, language, lines)."""
    auto = _AUTO.get(str(adapter.config.get("task_type")), "AutoModelForCausalLM")
    peft = ("PEFT", "python", _CAUSAL.format(auto=auto, base=base, name=name))
    vllm = (
        "vLLM" if format == "portable" else "vLLM 0.32 and newer",
        "bash",
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={name}",
    )
    decoder = auto == "AutoModelForCausalLM"
    if format == "merged":
        return [("transformers", "python", f'from transformers import {auto}\n\n{auto}.from_pretrained("{name}")')]
    if format == "mlx":
        return [("MLX-LM", "bash", f"mlx_lm.server --model {base} --adapter-path {name}")]
    if not decoder or format == "peft-adalora":
        return [peft]
    if format == "ragged":
        return [peft, vllm]
    gguf = (
        "llama.cpp",
        "bash",
        f"python convert_lora_to_gguf.py --base {base} {name} --outfile {name}.gguf\n"
        f"llama-server -m base.gguf --lora {name}.gguf",
    )
    if format == "gguf-ragged":
        return [peft, gguf]
    sglang = (
        "SGLang",
        "bash",
        f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={name} "
        f"--max-lora-rank {rank}",
    )
    return [
        peft,
        vllm,
        sglang,
        gguf,
        ("MLX-LM", "bash", f"mlx_lm.server --model {base} --adapter-path {name}/mlx"),
    ]


def read_scores(path: str | os.PathLike[str]) -> dict[str, float]:
    """Scores from a JSON object of numbers, or the last `metric` record of each split of a `history.jsonl`.

    Raises:
        AdapterFileError: The file is missing or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise AdapterFileError(f"no scores at {file}")
    try:
        lines = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            records = [json.loads(line) for line in lines.splitlines() if line.strip()]
            found = {
                f"{record['split']} {key}": value
                for record in records
                if record.get("event") == "metric"
                for key, value in record["values"].items()
            }
        else:
            found = json.loads(lines)
        return {str(k): float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise AdapterFileError(f"{file}: an object of numbers or a history.jsonl is wanted ({error})") from error


def render_card(
    adapter: Adapter,
    *,
    format: str,
    name: str,
    stored: int,
    rank: int,
    error: float,
    kept_energy: float = 1.0,
    scores: Mapping[str, float] | None = None,
) -> str:
    """The text of the card.

    Args:
        adapter: The cleaned adapter that was written.
        format: Layout name.
        name: Title; the folder's name.
        stored: LoRA parameters in the file, padding included.
        rank: Largest rank in the file, padding included.
        error: Relative error of the file's ΔW.
        kept_energy: Share of Σσ² that a truncation kept.
        scores: Metric -> value.
    """
    text = resources.files("adalora.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    sizes = module_norms(adapter)
    ranks = adapter.ranks
    changed = sum(r > 0 for r in ranks.values())
    base_model = adapter.base_model
    if base_model and (Path(base_model).is_absolute() or Path(base_model).exists()):
        base_model = Path(base_model).name  # a path of this machine means nothing to a reader
    safe = re.sub(r"[^\w.\- ]", "_", name)
    return environment.from_string(text).render(
        name=safe,
        base_model=base_model,
        format=format,
        task=str(adapter.config.get("task_type") or "text-generation"),
        changed=changed,
        modules=len(ranks),
        total_rank=sum(ranks.values()),
        mean_rank=sum(ranks.values()) / max(len(ranks), 1),
        max_rank=adapter.max_rank,
        parameters=adapter.parameters,
        stored=stored,
        error=error,
        kept_energy=kept_energy,
        results=sorted((scores or {}).items()),
        loading=loading_lines(adapter, format, safe, base_model or "BASE_MODEL", rank),
        ranks=[(module, rank, sizes[module]) for module, rank in ranks.items()],
        version=__version__,
    )
