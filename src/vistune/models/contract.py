"""What the engines know of a model: roles, and two methods for training. No implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vistune.errors import ModelError
from vistune.types import ROLES, RoleName, VisionGrid


@dataclass(frozen=True)
class ModuleMap:
    """Which modules play which role: path prefixes of parameter names, longest match first.

    Args:
        vision: The vision tower.
        connector: What turns its features into embeddings.
        language: The language model without its output head.
        head: The output head; empty when it is tied to the input embeddings.
    """

    vision: tuple[str, ...]
    connector: tuple[str, ...]
    language: tuple[str, ...]
    head: tuple[str, ...] = ()

    def prefixes(self, role: RoleName) -> tuple[str, ...]:
        """Returns the module paths of a role."""
        return {
            "vision": self.vision,
            "connector": self.connector,
            "language": self.language,
            "head": self.head,
        }[role]

    def role_of(self, parameter_name: str) -> RoleName:
        """Returns the one role of a parameter.

        Raises:
            ModelError: The name lies under none of the modules.
        """
        best: tuple[int, RoleName] | None = None
        for role in ROLES:
            for prefix in self.prefixes(role):
                inside = parameter_name == prefix or parameter_name.startswith(prefix + ".")
                if inside and (best is None or len(prefix) > best[0]):
                    best = (len(prefix), role)
        if best is None:
            raise ModelError("a parameter lies under no role's modules", where=parameter_name)
        return best[1]


class VisionLanguageModel(Protocol):
    """A model that training can use; it is a `torch.nn.Module` besides."""

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules."""
        ...

    @property
    def grid(self) -> VisionGrid:
        """Image tokens as a function of pixels."""
        ...

    @property
    def image_token_id(self) -> int:
        """The id that stands where image embeddings go."""
        ...

    @property
    def never_trained(self) -> frozenset[str]:
        """Parameters that no gradient reaches; they stay frozen whatever a recipe says."""
        ...

    def hidden_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
    ) -> Tensor:
        """Runs one packed row up to and including the final norm.

        No sample attends to another. A row without images still touches every trained vision and
        connector weight, with weight zero.

        Args:
            input_ids_BT: int64 [1, T].
            position_ids_BT: int64 [1, T], restarting with every sample.
            cu_seqlens: int32 [S + 1].
            max_seqlen: Tokens of the longest sample.
            pixel_values_NCYX: Images in reading order, or None.

        Returns:
            [1, T, D].

        A model whose images come by an image layout takes one more argument, `image_shapes`: what
        the layout says of every image (`types.Batch.image_shapes`), left out when there is none.
        """
        ...

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the output head, with any scale or cap the model has: [M, D] -> [M, V]."""
        ...


class TunableModel(VisionLanguageModel, Protocol):
    """The same with the methods of `torch.nn.Module` that tuning needs."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter once."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every parameter once, with its name."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Yields every module."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields every module with its path."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """Returns the module at a path; the model itself at the empty one."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Lets every parameter train, or none."""
        ...
