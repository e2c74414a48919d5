"""The stacks, each with the version and file whose rules are repeated here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adalora.export.stacks import converters, live, servers
from adalora.export.stacks.served import Effective, Served


@dataclass(frozen=True)
class Stack:
    """One way to serve an adapter.

    Attributes:
        name: As users call it.
        version: The version that was read, or `installed` for what runs for real.
        source: File with the rules, and the commit where there is no release to name.
        compute: Gives the ΔW factors that the stack applies, or raises `Refused`.
        decoders_only: Serves language models with the usual module names only.
        extras: What it does with a trained head: `loads`, `checks` (compute decides) or `drops`.
        note: Something to know that is no number.
    """

    name: str
    version: str
    source: str
    compute: Callable[[Served], Effective]
    decoders_only: bool = True
    extras: str = "checks"
    note: str = ""


STACKS: tuple[Stack, ...] = (
    Stack("PEFT", "installed", "peft.PeftModel.from_pretrained", live.peft, decoders_only=False),
    Stack("transformers", "installed", "PreTrainedModel.load_adapter", live.transformers, decoders_only=False),
    Stack("vLLM ≥ 0.32", "0.33.0", "vllm/lora/peft_helper.py, lora_weights.py", servers.vllm_new, extras="loads"),
    Stack("vLLM ≤ 0.31", "0.31.0", "vllm/lora/peft_helper.py, lora_weights.py", servers.vllm_old, extras="loads"),
    Stack("SGLang", "0.5.23", "sglang/srt/lora/lora.py, mem_pool.py", servers.sglang, extras="drops"),
    Stack(
        "TGI",
        "3 (commit 45d95bd)",
        "server/text_generation_server/adapters/lora.py",
        servers.punica,
        extras="drops",
        note="one GPU",
    ),
    Stack(
        "LoRAX",
        "0.12 (commits 03679f3, 0e057f0)",
        "server/lorax_server/adapters/lora.py, utils/sgmv.py",
        servers.punica,
        extras="drops",
        note="one GPU",
    ),
    Stack(
        "llama.cpp",
        "commits 0650ea8, 0b03ada",
        "src/llama-adapter.cpp, convert_lora_to_gguf.py",
        converters.llama_cpp,
        note="after conversion to GGUF",
    ),
    Stack(
        "Ollama",
        "commits 01cf744, 0242080",
        "convert/convert.go, convert_llama_adapter.go",
        converters.ollama,
        note="give it the GGUF",
    ),
    Stack("TensorRT-LLM", "commit 007e181", "tensorrt_llm/lora_manager.py", servers.tensorrt_llm, extras="drops"),
    Stack("LMDeploy", "0.18.0", "lmdeploy/pytorch/adapter/adapter.py, nn/linear/lora.py", servers.lmdeploy),
    Stack(
        "Olive",
        "0.13.0",
        "olive/cli/convert_adapters.py",
        converters.olive,
        decoders_only=False,
        extras="loads",
    ),
    Stack(
        "ONNX Runtime GenAI",
        "0.18.0",
        "onnxruntime_genai/models/builders/base.py",
        converters.onnxruntime_genai,
        extras="loads",
    ),
    Stack(
        "diffusers",
        "0.42.1",
        "diffusers/loaders/peft.py, utils/peft_utils.py",
        converters.diffusers,
        decoders_only=False,
        extras="drops",
        note="diffusion models",
    ),
    Stack("MLX-LM", "0.32.2", "mlx_lm/tuner/utils.py", servers.mlx_lm, extras="drops"),
)
