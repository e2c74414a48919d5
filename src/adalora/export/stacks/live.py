"""PEFT and transformers for real: they load the folder onto modules of the base's names and shapes.

The modules have no memory behind their weights (one zero, expanded), so any size of adapter can be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalora.export.adapter import block_diagonal
from adalora.export.base import Site
from adalora.export.files import WEIGHTS_NAME, read_tensors
from adalora.export.merged import quiet
from adalora.export.reading import PREFIX
from adalora.export.stacks.served import Effective, Refused, Served


def _hollow(module: nn.Module) -> nn.Module:
    """Replace the weights of a meta module by zeros that take no memory."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        zero = torch.zeros((), device="cpu").expand(parameter.shape)
        setattr(module, name, nn.Parameter(zero, requires_grad=False))
    return module


def _module(site: Site, kernel: tuple[int, ...] = (), groups: int = 1) -> nn.Module:
    with torch.device("meta"):
        if site.kind == "embedding":
            return _hollow(nn.Embedding(site.d_in, site.d_out))
        if site.kind == "conv":
            conv: Any = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(kernel)]
            return _hollow(conv(kernel[0], site.d_out, kernel[1:], groups=groups, bias=False))
        return _hollow(nn.Linear(site.d_in, site.d_out, bias=False))


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(last, module)


def skeleton(root: nn.Module, served: Served) -> nn.Module:
    """Give `root` the modules that the base has, and those of the adapter's extra tensors."""
    tensors = read_tensors(served.folder / WEIGHTS_NAME)
    wanted: dict[str, Site] = dict(served.base.sites)
    for name, (B, A) in served.pairs.items():
        kind = "embedding" if name in served.embeddings else "conv" if name in served.convolutions else "linear"
        wanted.setdefault(name, Site(kind, B.shape[0], A.shape[1]))  # type: ignore[arg-type]
    for name, site in wanted.items():
        if site.kind == "conv" and name not in served.convolutions:
            continue
        matrix = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        kernel = tuple(matrix.shape[1:]) if matrix is not None else ()
        _place(root, name, _module(site, kernel, served.convolutions.get(name, 1)))
    for key in served.extras:
        name, _, last = key.replace(".base_layer.", ".").rpartition(".")
        module: Any = root
        for part in name.split("."):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if getattr(module, last, None) is None:
            value = tensors[PREFIX + key] if PREFIX + key in tensors else tensors[key]
            module.register_parameter(last, nn.Parameter(torch.zeros_like(value), requires_grad=False))
    return root


def _collect(model: nn.Module, adapter: str) -> Effective:
    """(B · scale, A) of every LoRA layer that a loaded adapter has, by module name."""
    from peft.tuners.lora import LoraLayer

    found: Effective = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = name.removeprefix(PREFIX)
        A: Any = layer.lora_A[adapter] if adapter in layer.lora_A else layer.lora_embedding_A.get(adapter)
        B: Any = layer.lora_B[adapter] if adapter in layer.lora_B else layer.lora_embedding_B.get(adapter)
        if A is None or B is None:
            continue
        scale = layer.scaling[adapter]
        groups = getattr(B, "groups", 1)
        A, B = (getattr(m, "weight", m).detach().flatten(1).double() for m in (A, B))
        B = B if groups == 1 else block_diagonal(B, groups)
        E, ranknum = getattr(layer, "lora_E", {}), getattr(layer, "ranknum", {})
        if adapter in E:
            A = A * E[adapter].detach().double()
            scale = scale / (float(ranknum[adapter]) + 1e-5)
        found[name] = (B * scale, A)
    return found


def peft(served: Served) -> Effective:
    """The real PEFT: `PeftModel.from_pretrained`."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    with quiet():  # the model is none: no config, no generation
        try:
            config = PeftConfig.from_pretrained(str(served.folder))
            config.task_type = None  # the wrapper of a task wants a model's methods
            model = PeftModel.from_pretrained(skeleton(nn.Module(), served), str(served.folder), config=config)
        except Exception as error:  # whatever PEFT raises is its refusal
            raise Refused(_line(error)) from error
    _check_extras(served, get_peft_model_state_dict(model))
    return _collect(model, "default")


def transformers(served: Served) -> Effective:
    """The real transformers: `model.load_adapter`."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Hollow(PreTrainedModel):  # type: ignore[no-untyped-call]
        config_class = PretrainedConfig
        base_model_prefix = "model"

        def _init_weights(self, module: nn.Module) -> None:
            """Nothing to initialise: the adapter's values are all loaded."""

    with quiet():
        try:
            model = skeleton(Hollow(PretrainedConfig()), served)
            model.load_adapter(str(served.folder))  # type: ignore[operator]
        except Exception as error:  # whatever transformers raises is its refusal
            if served.adalora:
                raise Refused("load_adapter does not cut AdaLoRA's modules to the ranks in the file") from error
            raise Refused(_line(error)) from error
    if served.extras:
        _check_extras(served, {PREFIX + k: v for k, v in model.state_dict().items()})
    return _collect(model, "default")


def _check_extras(served: Served, state: Mapping[str, Tensor]) -> None:
    """A head that was not loaded is a refusal: the model would answer with an untrained one."""
    tensors = read_tensors(served.folder / WEIGHTS_NAME)
    for key in served.extras:
        value = tensors.get(PREFIX + key, tensors.get(key))
        loaded = state.get(PREFIX + key)
        if loaded is None:
            loaded = next((v for k, v in state.items() if _same_place(k, key)), None)
        if value is None or loaded is None or loaded.shape != value.shape or not torch.equal(loaded, value):
            raise Refused(f"{key} of the adapter is not loaded")


def _same_place(state_key: str, key: str) -> bool:
    plain = state_key.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")
    return plain == key


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
