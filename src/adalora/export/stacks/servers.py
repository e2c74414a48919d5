"""What GPU servers compute with an adapter folder. Each function repeats the rules of the source it names."""

from __future__ import annotations

import math

import torch

from adalora.errors import AdapterFileError
from adalora.export.reading import _PLAIN_INITS, match_pattern
from adalora.export.stacks.served import QKV, Effective, Refused, Served, layer_number, plain_scale, refuse


def _vllm_common(served: Served, *, max_rank: int) -> None:
    config = served.config
    refuse(served.adalora, "lora_E: 'unsupported LoRA weight'")
    refuse(served.convolutions, "no LoRA on convolutions")
    heads = [m for m in config.get("modules_to_save") or () if m not in ("classifier", "score")]
    refuse(heads, f"modules_to_save {heads}: allowed are classifier and score")
    refuse(config.get("use_dora"), "DoRA")
    refuse(config.get("bias", "none") != "none", "adapter bias")
    refuse(max_rank > 512, f"rank {max_rank}: --max-lora-rank goes to 512")


def vllm_new(served: Served) -> Effective:
    """From vLLM 0.32 on: PEFT's alpha_i/r_i by patterns, pattern values above 0 only."""
    config = served.config
    ranks = config.get("rank_pattern") or {}
    refuse(served.rank <= 0, f"r={served.rank}")
    for key, rank in ranks.items():
        refuse(type(rank) is not int or rank <= 0, f"rank_pattern[{key!r}] = {rank!r}")
    _vllm_common(served, max_rank=max([served.rank, *ranks.values()]))
    init = config.get("init_lora_weights", True)
    refuse(isinstance(init, str) and init.lower() not in _PLAIN_INITS, f"init_lora_weights={init!r}")
    for key in ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        refuse(config.get(key), key)

    def scale(name: str, _: int) -> float:
        rank, alpha = match_pattern(ranks, name), match_pattern(config.get("alpha_pattern") or {}, name)
        rank, alpha = served.rank if rank is None else rank, served.alpha if alpha is None else alpha
        return float(alpha) / (math.sqrt(rank) if served.rslora else rank)

    return served.scaled(scale)


def vllm_old(served: Served) -> Effective:
    """Up to vLLM 0.31: one global alpha/r, patterns ignored, tensors of any rank taken."""
    _vllm_common(served, max_rank=served.rank)
    return served.scaled(lambda _, __: plain_scale(served, served.rank, knows_rslora=True))


def sglang(served: Served) -> Effective:
    """SGLang 0.5: global alpha/r, rsLoRA ignored; buffers of rank r, q, k, v and gate, up fused.

    A missing k (beside v) or up (beside gate) is filled with zeros, other missing partners are errors.
    """
    refuse(served.adalora, "peft_type must be LORA")
    refuse(served.config.get("use_dora"), "DoRA")
    targets = served.config.get("target_modules")
    refuse(isinstance(targets, str) and targets not in ("all", "all-linear"), f"target_modules={targets!r}")
    layers: dict[int, set[str]] = {}
    found: Effective = {}
    for name, (B, A) in served.pairs.items():
        layer, leaf = layer_number(name), name.rsplit(".", 1)[-1]
        if layer is None and leaf not in ("embed_tokens", "lm_head"):
            continue  # silently left out
        refuse(A.shape[0] != served.rank, f"{name}: rank {A.shape[0]} in a buffer of r={served.rank}")
        found[name] = (B * (served.alpha / served.rank), A)
        if layer is not None:
            layers.setdefault(layer, set()).add(leaf)
    for layer, leaves in layers.items():
        refuse("q_proj" in leaves and "v_proj" not in leaves, f"layer {layer}: q_proj without v_proj (KeyError)")
        refuse(leaves & {"k_proj", "v_proj"} and "q_proj" not in leaves, f"layer {layer}: k or v without q_proj")
        refuse("up_proj" in leaves and "gate_proj" not in leaves, f"layer {layer}: up_proj without gate_proj")
    return found


def _padded(rank: int) -> int:
    """TGI's and LoRAX's pad_rank on one GPU: 8, or a multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def punica(served: Served) -> Effective:
    """TGI and LoRAX: one kind of layer after the other; padding the first changes r for the later ones.

    A kind that misses a layer is left out whole. Layers of different padded rank cannot be stacked.
    """
    refuse(served.adalora, "lora_A and lora_B without .weight are not found")
    rank, found = served.rank, {}
    for leaf in (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"):
        names = [name for name in served.sites(leaf) if layer_number(name) is not None]
        if not names or any(name not in served.pairs for name in names):
            continue
        scale = plain_scale(served, rank, knows_rslora=True)
        sizes = {_padded(served.pairs[name][1].shape[0]) for name in names}
        refuse(len(sizes) > 1, f"{leaf}: layers of ranks {sorted(sizes)} cannot be stacked")
        rank = sizes.pop()
        refuse(16 < rank < 128 and rank not in (32, 64), f"no kernel for rank {rank}: 16, 32, 64, 128")
        found.update({name: (served.pairs[name][0] * scale, served.pairs[name][1]) for name in names})
    return found


def lmdeploy(served: Served) -> Effective:
    """LMDeploy's PyTorch engine: global alpha/r, buffers of r rows that nothing initialises.

    A matrix of rank 1 is broadcast into all r rows; a targeted module without a matrix keeps what the memory
    held, given here as NaN.
    """
    other = [*served.extras, *served.embeddings, *served.convolutions]
    refuse(
        served.adalora or other,
        f"names must end with lora_A.weight or lora_B.weight: {(other or ['lora_E'])[0]}",
    )
    targets = served.config.get("target_modules")
    refuse(isinstance(targets, str), f"target_modules={targets!r} is read letter by letter")
    leaves = {str(t).rsplit(".", 1)[-1] for t in targets or ()}
    scale, found = served.alpha / served.rank, {}
    for name, (B, A) in served.pairs.items():
        refuse(name.rsplit(".", 1)[-1] not in leaves, f"{name} is not in target_modules (KeyError)")
        refuse(A.shape[0] not in (1, served.rank), f"{name}: rank {A.shape[0]} does not fit r={served.rank}")
        rows = served.rank
        found[name] = (B.expand(-1, rows) * scale, A.expand(rows, -1))
    for leaf in leaves:
        for name in served.sites(leaf):
            if name not in found:
                site = served.base.sites[name]
                unknown = torch.full((site.d_out, 1), math.nan, dtype=torch.float64)
                found[name] = (unknown, torch.zeros(1, site.d_in, dtype=torch.float64))
    return found


def tensorrt_llm(served: Served) -> Effective:
    """TensorRT-LLM: alpha over each tensor's own rank (its root with rsLoRA); missing modules have rank 0."""
    refuse(served.adalora, "lora_A and lora_B without .weight are not found")
    refuse(served.embeddings or served.convolutions, "LoRA on linear modules only")
    return served.scaled(lambda _, rank: plain_scale(served, rank, knows_rslora=True))


def mlx_lm(served: Served) -> Effective:
    """MLX-LM: its own two files, here or in the folder `mlx` of a portable export; one rank, one scale."""
    from adalora.export.mlx import WEIGHTS_NAME, read_mlx

    folder = next((f for f in (served.folder, served.folder / "mlx") if (f / WEIGHTS_NAME).is_file()), None)
    if folder is None:
        raise Refused("no adapters.safetensors; export with --format portable or mlx")
    try:
        adapter = read_mlx(folder)
    except AdapterFileError as error:
        raise Refused(str(error)) from error
    missing = [name for name in adapter.factors if served.base.known and name not in served.base.sites]
    refuse(missing, f"{missing[:1]} is no module of the model")
    return {name: (B.double(), A.double()) for name, f in adapter.factors.items() for B, A in [f.product()]}
