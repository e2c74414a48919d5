"""A LoRA adapter in memory, whatever file it came from: per module ΔW = left · diag(values) · right.

Of a convolution with groups the k-th triplets of all groups are one, as in training: a column of left, and a row of
right that holds one group's Q after the other. Each group's part of left is multiplied with its own part of right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from adalora.core.factored_svd import factored_svd
from adalora.errors import AdapterFileError

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True)
class Factor:
    """The low-rank change of one module.

    Attributes:
        name: Full module name in the base model, such as `model.layers.0.self_attn.q_proj`.
        kind: `linear`, `embedding` or `conv`.
        left: P, [d_out, r] float32 (float64 where the file was).
        values: λ times the scale, [r], same dtype.
        right: Q, [r, d_in]; for a convolution d_in = groups · in_channels · kernel size, for an
            embedding the vocabulary.
        dtype: The dtype in the file.
        kernel: (in_channels, kernel…) of a convolution, else empty.
        groups: Of a convolution, else 1.
    """

    name: str
    kind: Kind
    left: Tensor
    values: Tensor
    right: Tensor
    dtype: torch.dtype = torch.float32
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def rank(self) -> int:
        """Number of triplets that the file holds."""
        return self.right.shape[0]

    @property
    def lora_rank(self) -> int:
        """PEFT's r: as many triplets for each group."""
        return self.rank * self.groups

    @property
    def d_out(self) -> int:
        """Rows of ΔW."""
        return self.left.shape[0]

    @property
    def d_in(self) -> int:
        """Columns of ΔW, times the groups of a convolution: what a triplet's Q holds."""
        return self.right.shape[1]

    @property
    def parameters(self) -> int:
        """Parameters of the two matrices that a plain LoRA file stores."""
        return self.rank * (self.d_out + self.d_in)

    @property
    def noun(self) -> str:
        """The kind in words."""
        return {"linear": "a linear module", "embedding": "an embedding", "conv": "a convolution"}[self.kind]

    @property
    def leaf(self) -> str:
        """Last part of the name, such as `q_proj`."""
        return self.name.rsplit(".", 1)[-1]

    def product(self) -> tuple[Tensor, Tensor]:
        """(left · diag(values), right): the B and A of a LoRA with scale 1.

        Of several groups B is block-diagonal, [d_out, groups · r], and A [groups · r, d_in / groups].
        """
        B = self.left * self.values
        if self.groups == 1:
            return B, self.right
        return block_diagonal(B, self.groups), self.by_group().flatten(0, 1)

    def by_group(self) -> Tensor:
        """Q of each group, [groups, r, d_in / groups]."""
        return self.right.reshape(self.rank, self.groups, self.d_in // self.groups).transpose(0, 1)

    def delta(self) -> Tensor:
        """ΔW, [d_out, d_in]."""
        B, A = self.product()
        return B @ A

    def svd(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Exact U, S, Vh of each group's ΔW in float64; see `factored_svd`."""
        parts = zip((self.left * self.values).chunk(self.groups), self.by_group())
        return [factored_svd(B.double(), A.double()) for B, A in parts]


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk or made by a conversion.

    Attributes:
        factors: Module name -> its change, in the order of the file.
        config: `adapter_config.json` of a plain LoRA adapter; its ranks and scales no longer count.
        extras: Tensors that are no LoRA factors, such as a trained head, under their names in the file
            (`base_model.model.…`).
        origin: What the files were: `lora`, `adalora` or `loralib`.
    """

    factors: Mapping[str, Factor]
    config: Mapping[str, Any]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    origin: str = "lora"

    @property
    def parameters(self) -> int:
        """Parameters of all LoRA matrices."""
        return sum(f.parameters for f in self.factors.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> r."""
        return {name: f.lora_rank for name, f in self.factors.items()}

    @property
    def max_rank(self) -> int:
        """Largest r of any module."""
        return max((f.lora_rank for f in self.factors.values()), default=0)

    @property
    def leaves(self) -> list[str]:
        """Sorted last name parts of all modules with a change."""
        return sorted({f.leaf for f in self.factors.values()})

    @property
    def base_model(self) -> str | None:
        """Name or folder of the base model, if the config says."""
        value = self.config.get("base_model_name_or_path")
        return value if isinstance(value, str) and value else None

    @property
    def dtype(self) -> torch.dtype:
        """The most precise dtype among the factors of the file."""
        dtypes = {f.dtype for f in self.factors.values()} or {torch.float32}
        return max(dtypes, key=lambda d: (torch.finfo(d).bits, d is torch.bfloat16))

    def replace(self, factors: Mapping[str, Factor]) -> Adapter:
        """The same adapter with other factors."""
        return dataclasses.replace(self, factors=dict(factors))


def block_diagonal(B: Tensor, groups: int) -> Tensor:
    """A grouped convolution's lora_B, [d_out, r], as what multiplies all rows of its lora_A, [d_out, groups · r]."""
    each, r = B.shape[0] // groups, B.shape[1]
    whole, index = B.new_zeros(groups, each, groups, r), torch.arange(groups)
    whole[index, :, index] = B.view(groups, each, r)
    return whole.view(groups * each, groups * r)


def norm(P: Tensor, Q: Tensor) -> float:
    """Frobenius norm of P @ Q without forming it, in float64: ‖R_P R_Qᵀ‖ of the two QRs."""
    if P.shape[1] == 0:
        return 0.0
    R_left = torch.linalg.qr(P.double(), mode="r").R
    R_right = torch.linalg.qr(Q.double().T, mode="r").R
    return float(torch.linalg.norm(R_left @ R_right.T))


def difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Frobenius norm of P1 @ Q1 − P2 @ Q2 without forming either, in float64."""
    P = torch.cat([first[0].double(), -second[0].double()], dim=1)
    Q = torch.cat([first[1].double(), second[1].double()], dim=0)
    return norm(P, Q)


def relative_error(wanted: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor]) -> float:
    """‖got − wanted‖ / ‖wanted‖; infinite where nothing was wanted and something is there."""
    size, error = norm(*wanted), difference(wanted, got)
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def make_factor(name: str, A: Tensor, B: Tensor, scale: float | Tensor, *, kind: Kind = "linear") -> Factor:
    """Check one module's two matrices and bring them to [d_out, r], [r, d_in].

    Args:
        name: Module name.
        A: [r, d_in], or [r, in_channels, *kernel] of a convolution.
        B: [d_out, r], or [d_out, r / groups, 1, …] of a convolution.
        scale: A number, or one value for each triplet, [r].
        kind: `linear` or `embedding`; `conv` is seen from the shapes.

    Raises:
        AdapterFileError: The shapes do not belong together, or a value is NaN or infinite.
    """
    shapes = f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    kernel: tuple[int, ...] = ()
    groups = 1
    if not (A.is_floating_point() and B.is_floating_point()):
        raise AdapterFileError(f"{shapes} are {A.dtype} and {B.dtype}; float matrices are wanted")
    if A.dim() > 2 and kind == "linear":
        if A.dim() != B.dim() or any(n != 1 for n in B.shape[2:]):
            raise AdapterFileError(f"{shapes} are no convolution's LoRA")
        groups = A.shape[0] // max(1, B.shape[1])
        if groups < 1 or groups * B.shape[1] != A.shape[0] or B.shape[0] % groups:
            raise AdapterFileError(f"{shapes} share neither a rank nor a number of groups; the file is damaged")
        kind, kernel = "conv", tuple(A.shape[1:])
        A, B = A.reshape(groups, B.shape[1], -1).transpose(0, 1).flatten(1), B.flatten(1)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise AdapterFileError(f"{shapes} do not share a rank; the file is damaged or of another method")
    dtype = A.dtype if torch.finfo(A.dtype).bits >= torch.finfo(B.dtype).bits else B.dtype
    work = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    left, right = B.to(work), A.to(work)
    values = torch.as_tensor(scale, dtype=work).flatten().expand(A.shape[0]).clone()
    if not all(torch.isfinite(t).all() for t in (left, right, values)):
        raise AdapterFileError(f"{name}: NaN or infinity in the adapter; it cannot be exported")
    return Factor(name, kind, left.contiguous(), values, right.contiguous(), dtype, kernel, groups)
