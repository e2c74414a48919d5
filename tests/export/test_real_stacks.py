"""The stacks that install on a CPU, for real: gguf, llama.cpp (xllamacpp), MLX-LM, diffusers."""

import numpy as np
import peft
import pytest
import torch

from adalora.errors import AdapterFileError
from adalora.export import export_adapter, read_adapter
from adalora.export.gguf import permute_rows, read_gguf, write_gguf

from .conftest import llama, llama_config, logits, randomise, save_lora, save_ragged, tokens


def test_gguf_values_survive_the_round_trip(tmp_path, base_folder):
    pytest.importorskip("gguf")
    save_ragged(tmp_path / "run", base_folder)
    export_adapter(tmp_path / "run", tmp_path / "out", format="gguf-ragged")
    arch, alpha, pairs = read_gguf(tmp_path / "out/adapter.gguf")
    source = read_adapter(tmp_path / "run")
    assert arch == "llama"
    assert len(pairs) == len(source.factors)
    heads = {"attn_q": 4, "attn_k": 2}
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, f in source.factors.items():
        leaf = names[f.leaf]
        A, B = pairs[f"blk.{name.split('.')[2]}.{leaf}.weight"]
        delta = f.delta()
        delta = permute_rows(delta, heads[leaf]) if leaf in heads else delta
        assert torch.allclose(alpha / A.shape[0] * B @ A, delta, atol=1e-5)


def test_gguf_of_other_architectures(tmp_path):
    pytest.importorskip("gguf")
    save_lora(tmp_path / "a", target_modules=["q_proj"])
    adapter = read_adapter(tmp_path / "a")
    config = llama_config().to_dict()
    write_gguf(tmp_path / "x.gguf", adapter, {**config, "architectures": ["Qwen2ForCausalLM"]}, dtype=torch.float16)
    arch, alpha, pairs = read_gguf(tmp_path / "x.gguf")
    A, B = pairs["blk.0.attn_q.weight"]
    wanted = adapter.factors["model.layers.0.self_attn.q_proj"].delta()
    assert arch == "qwen2"
    assert torch.allclose(alpha / A.shape[0] * B @ A, wanted, atol=2e-2)  # not permuted, float16
    with pytest.raises(AdapterFileError, match=r"convert_lora_to_gguf\.py"):
        write_gguf(tmp_path / "y.gguf", adapter, {**config, "architectures": ["FalconForCausalLM"]})


@pytest.fixture
def gguf_base(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from . import llama_gguf

    shape = {"vocab_size": llama_gguf.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.3}
    model = llama(**shape)
    model.save_pretrained(tmp_path / "base")
    llama_gguf.write_base(tmp_path / "base.gguf", model)
    return shape


PROMPT = (1, 265, 270, 280, 300, 261)


def next_token(model):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].float(), dim=-1)


@pytest.mark.parametrize("rank_pattern", [{}, {"q_proj": 2, "up_proj": 1}])
def test_llama_cpp_computes_what_peft_computes(tmp_path, gguf_base, rank_pattern):
    from .llama_gguf import log_probabilities

    live = save_lora(tmp_path / "a", llama(**gguf_base), lora_alpha=7, rank_pattern=rank_pattern).eval()
    export_adapter(tmp_path / "a", tmp_path / "out", format="gguf-ragged", base=str(tmp_path / "base"))
    plain = log_probabilities(tmp_path / "base.gguf", PROMPT)
    assert (plain - next_token(llama(**gguf_base))).abs().max() < 1e-4
    got = log_probabilities(tmp_path / "base.gguf", PROMPT, tmp_path / "out/adapter.gguf")
    assert (got - next_token(live)).abs().max() < 1e-4
    assert (got - plain).abs().max() > 0.1


def test_mlx_lm_computes_what_peft_computes(tmp_path, base_folder):
    mx = pytest.importorskip("mlx.core")
    models = pytest.importorskip("mlx_lm.models.llama")
    from mlx_lm.tuner.utils import load_adapters

    live = save_ragged(tmp_path / "run", base_folder)
    arguments = models.ModelArgs.from_dict({**llama_config().to_dict(), "rope_theta": 10000.0})
    x = mx.array(tokens().numpy())
    for out, format in (("p", "portable"), ("m", "mlx")):
        export_adapter(tmp_path / "run", tmp_path / out, format=format)
        model = models.Model(arguments)
        model.load_weights([(k, mx.array(v.numpy())) for k, v in llama().state_dict().items()])
        assert np.abs(np.array(model(x)) - logits(llama()).numpy()).max() < 1e-5
        load_adapters(model, str(tmp_path / out / ("mlx" if format == "portable" else "")))
        model.eval()
        assert np.abs(np.array(model(x)) - logits(live).numpy()).max() < 1e-5


def test_mlx_refuses_what_it_cannot_hold(tmp_path):
    save_lora(tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(AdapterFileError, match="lora_a and lora_b only"):
        export_adapter(tmp_path / "a", tmp_path / "out", format="mlx")
    report = export_adapter(tmp_path / "a", tmp_path / "portable")
    assert any("MLX-LM" in note for note in report.notes)


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4,
    ).eval()  # fmt: skip


def picture(model):
    generator = torch.Generator().manual_seed(0)
    noise, words = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        return model(noise, 3, words).sample


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
@pytest.mark.parametrize(("format", "exact"), [("portable", True), ("ragged", True), ("gguf-ragged", False)])
def test_diffusers_with_linear_and_convolution_layers(tmp_path, format, exact):
    targets = ["to_q", "to_v", "conv1", "proj_in"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, rank_pattern={"to_v": 2})
    live = randomise(peft.get_peft_model(unet(), config))
    live.save_pretrained(tmp_path / "a")
    export_adapter(tmp_path / "a", tmp_path / "out", format=format)
    model = unet()
    model.load_lora_adapter(str(tmp_path / "out"), prefix="base_model.model", weight_name="adapter_model.safetensors")
    miss = (picture(model) - picture(live.base_model.model)).abs().max()
    assert (miss < 1e-5) if exact else (miss > 1e-2)  # as the matrix says
