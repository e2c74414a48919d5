"""The matrix: every layout in every stack, and each stack's rule against its own small example."""

import math

import pytest
import torch

from adalora.export import export_adapter, read_adapter, verify_adapter
from adalora.export.base import load_base
from adalora.export.stacks import STACKS, Refused, check_forward, read_served
from adalora.export.stacks.verifying import verify_against

from .conftest import save_files, save_lora, save_ragged

NAMES = [s.name for s in STACKS]

E, W, R = "exact", "wrong", "refused"
# What the sources say, stack by stack in the order of STACKS: PEFT, transformers, vLLM new, vLLM old, SGLang, TGI,
# LoRAX, llama.cpp, Ollama, TensorRT-LLM, LMDeploy, Olive, ORT-GenAI, diffusers, MLX-LM.
MATRIX = {
    "portable": [E, E, E, E, E, E, E, E, E, E, E, E, E, E, E],
    "ragged": [E, E, E, E, R, W, W, W, W, W, R, E, E, E, R],
    "gguf-ragged": [E, E, E, W, R, W, W, E, E, E, R, W, E, W, R],
    "peft-adalora": [E, R, R, R, R, R, R, R, R, R, R, R, R, R, R],
}


@pytest.fixture
def run(tmp_path, base_folder):
    save_ragged(tmp_path / "run", base_folder)
    return tmp_path / "run"


@pytest.mark.parametrize("format", MATRIX)
def test_the_matrix_of_layouts_and_stacks(tmp_path, base_folder, run, format):
    export_adapter(run, tmp_path / "out", format=format)
    source = read_adapter(run)
    results = verify_against(source, tmp_path / "out", load_base(str(base_folder), source))
    assert {r.stack: r.status for r in results} == dict(zip(NAMES, MATRIX[format], strict=True))
    for r in results:
        if r.status == E:
            assert r.error < 1e-6
        else:
            assert r.reason
            assert r.status == R or r.error > 1e-2


def test_mlx_and_merged_complete_the_matrix(tmp_path, base_folder, run):
    """The two layouts that are no PEFT folder: MLX-LM's is exact in MLX-LM, a merged model is a plain model."""
    export_adapter(run, tmp_path / "mlx", format="mlx")
    export_adapter(run, tmp_path / "portable", mlx=False)
    results = {r.stack: r for r in verify_adapter(tmp_path / "portable", base=str(base_folder))}
    assert results["MLX-LM"].status == R
    assert "--format portable or mlx" in results["MLX-LM"].reason
    for file in (tmp_path / "mlx").iterdir():
        (tmp_path / "portable/mlx").mkdir(exist_ok=True)
        (tmp_path / "portable/mlx" / file.name).write_bytes(file.read_bytes())
    results = {r.stack: r for r in verify_adapter(tmp_path / "portable", base=str(base_folder))}
    assert results["MLX-LM"].status == E
    export_adapter(run, tmp_path / "merged", format="merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_what_a_finished_run_saves_is_exact_where_patterns_are_read(base_folder, run):
    results = {r.stack: r for r in verify_adapter(run, base=str(base_folder))}
    for stack in ("PEFT", "transformers", "vLLM ≥ 0.32", "vLLM ≤ 0.31", "Olive", "ONNX Runtime GenAI"):
        assert results[stack].status == E
    assert "unsigned integer" in results["Ollama"].reason
    assert results["SGLang"].status == R


def test_every_stack_names_its_version_and_source():
    for stack in STACKS:
        assert stack.version
        assert stack.source
    assert len(STACKS) == 15
    assert len(set(NAMES)) == 15


def served(tmp_path, base_folder, **settings):
    save_lora(tmp_path / "a", **settings)
    adapter = read_adapter(tmp_path / "a")
    return adapter, read_served(tmp_path / "a", load_base(str(base_folder), adapter))


def compute(name, view):
    return next(s for s in STACKS if s.name == name).compute(view)


def ratio(adapter, got, name):
    """The factor between a stack's ΔW and the true one."""
    B, A = got[name]
    delta = adapter.factors[name].delta().double()
    return float((B @ A * delta).sum() / (delta * delta).sum())


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def test_rslora_is_ignored_by_some(tmp_path, base_folder):
    adapter, view = served(tmp_path, base_folder, r=4, lora_alpha=6, use_rslora=True)
    for name in ("PEFT", "vLLM ≥ 0.32", "vLLM ≤ 0.31", "TensorRT-LLM", "Olive", "ONNX Runtime GenAI"):
        assert math.isclose(ratio(adapter, compute(name, view), Q), 1, rel_tol=1e-6)
    for name in ("SGLang", "llama.cpp", "LMDeploy"):
        assert math.isclose(ratio(adapter, compute(name, view), Q), 0.5, rel_tol=1e-6)  # alpha/4 for alpha/√4


def test_tgi_and_lorax_rescale_later_kinds_of_layers(tmp_path, base_folder):
    adapter, view = served(tmp_path, base_folder, r=4, lora_alpha=6)
    for name in ("TGI", "LoRAX"):
        got = compute(name, view)
        assert math.isclose(ratio(adapter, got, Q), 1, rel_tol=1e-6)
        assert math.isclose(ratio(adapter, got, UP), 0.5, rel_tol=1e-6)  # r became 8 after q_proj
    for rank in (8, 16):
        adapter, view = served(tmp_path, base_folder, r=rank, lora_alpha=6)
        assert math.isclose(ratio(adapter, compute("TGI", view), UP), 1, rel_tol=1e-6)
    _, view = served(tmp_path, base_folder, r=40)
    with pytest.raises(Refused, match="kernel for rank 48"):
        compute("LoRAX", view)


def test_tgi_leaves_out_a_kind_that_misses_a_layer(tmp_path, base_folder):
    _, view = served(tmp_path, base_folder, r=8, layers_to_transform=[0, 1])
    assert compute("TGI", view) == {}


def test_lmdeploy_reads_memory_that_nothing_wrote(tmp_path, base_folder):
    save_lora(tmp_path / "a", layers_to_transform=[0, 1])
    result = next(r for r in verify_adapter(tmp_path / "a", base=str(base_folder)) if r.stack == "LMDeploy")
    assert result.status == W
    assert result.error == math.inf
    assert "model.layers.2" in result.reason


def test_lmdeploy_broadcasts_rank_one(tmp_path, base_folder):
    adapter, view = served(
        tmp_path, base_folder, r=4, lora_alpha=4, rank_pattern={"q_proj": 1}, alpha_pattern={"q_proj": 1}
    )
    got = compute("LMDeploy", view)
    assert math.isclose(ratio(adapter, got, Q), 4, rel_tol=1e-6)
    assert math.isclose(ratio(adapter, got, UP), 1, rel_tol=1e-6)
    _, view = served(tmp_path, base_folder, r=4, rank_pattern={"q_proj": 2})
    with pytest.raises(Refused, match="does not fit r=4"):
        compute("LMDeploy", view)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj"], "q_proj without v_proj"),
        (["v_proj"], "k or v without q_proj"),
        (["up_proj"], "up_proj without gate_proj"),
        ("model.*proj", "target_modules"),
    ],
)
def test_sglang_needs_fused_partners(tmp_path, base_folder, targets, words):
    _, view = served(tmp_path, base_folder, target_modules=targets)
    with pytest.raises(Refused, match=words):
        compute("SGLang", view)


def test_sglang_fills_in_k_and_up(tmp_path, base_folder):
    adapter, view = served(tmp_path, base_folder, target_modules=["q_proj", "v_proj", "gate_proj"])
    assert math.isclose(ratio(adapter, compute("SGLang", view), Q), 1, rel_tol=1e-6)


def test_alpha_over_each_tensors_own_rank(tmp_path, base_folder):
    adapter, view = served(
        tmp_path, base_folder, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}
    )
    for name in ("llama.cpp", "TensorRT-LLM", "Ollama"):
        assert math.isclose(ratio(adapter, compute(name, view), Q), (8 / 2) / (3 / 2), rel_tol=1e-6)
        assert math.isclose(ratio(adapter, compute(name, view), UP), 1, rel_tol=1e-6)
    for name in ("vLLM ≤ 0.31", "Olive"):
        assert math.isclose(ratio(adapter, compute(name, view), Q), (8 / 4) / (3 / 2), rel_tol=1e-6)
    assert math.isclose(ratio(adapter, compute("diffusers", view), Q), 1 / (3 / 2), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("stack", "settings", "words"),
    [
        ("vLLM ≥ 0.32", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("vLLM ≤ 0.31", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("llama.cpp", {"modules_to_save": ["lm_head"]}, "Not a lora_A or lora_B"),
        ("LMDeploy", {"modules_to_save": ["lm_head"]}, "lora_A.weight"),
        ("vLLM ≤ 0.31", {"r": 600}, "rank 600"),
    ],
)
def test_what_is_refused(tmp_path, base_folder, stack, settings, words):
    _, view = served(tmp_path, base_folder, **{"target_modules": ["gate_proj", "up_proj"], **settings})
    with pytest.raises(Refused, match=words):
        compute(stack, view)


def test_a_dropped_head_is_wrong(tmp_path, base_folder):
    save_lora(tmp_path / "a", target_modules=["gate_proj"], modules_to_save=["lm_head"])
    result = {r.stack: r for r in verify_adapter(tmp_path / "a", base=str(base_folder))}
    assert result["SGLang"].status == W
    assert "lm_head" in result["SGLang"].reason
    assert result["PEFT"].status == E


def test_a_damaged_adapter_is_seen_by_peft_too(tmp_path):
    """The real PEFT refuses what its own config does not describe."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["k_proj"]}
    save_files(tmp_path / "a", config, tensors)
    result = {r.stack: r for r in verify_adapter(tmp_path / "a")}
    assert result["PEFT"].status == R
    assert "k_proj" in result["PEFT"].reason or "target modules" in result["PEFT"].reason.lower()


def test_the_base_model_runs_with_the_adapter(base_folder, run):
    check = check_forward(run, str(base_folder))
    assert check["difference"] < 5e-6
    assert check["change"] > 1e-2
