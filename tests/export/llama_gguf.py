"""A small llama as GGUF, and its log-probabilities in llama.cpp (the xllamacpp wheel)."""

import gguf
import torch

from adalora.export.gguf import permute_rows

VOCABULARY = 320


def write_base(path, model):
    """Write a transformers llama as float32 GGUF, q and k permuted as llama.cpp wants them."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.float()
        if name.endswith("q_proj.weight"):
            weight = permute_rows(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = permute_rows(weight, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(writer, size):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"w{i}" for i in range(size - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * (size - 259)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def log_probabilities(base, prompt, lora=None):
    """Log-probabilities of the next token in llama.cpp, [VOCABULARY] by token id."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float16 costs 6e-3
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {
            "prompt": list(prompt), "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0.0,
            "cache_prompt": False, "seed": 1,
        }
    )  # fmt: skip
    (first,) = answer["choices"][0]["logprobs"]["content"]
    values = torch.full((VOCABULARY,), float("-inf"))
    for entry in first["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values
