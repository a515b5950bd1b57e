"""The projection of patches as one matrix product, where a model writes it as a 3-D convolution.

Towers that take patches of any image end to end hold their projection as a convolution whose kernel
is as large as a patch, with every patch an input of its own. Torch and cuDNN have only slow ways of
computing that on some GPUs in 16 bits (transformers issue 45750). The weight, its name and its
shape stay.
"""

from __future__ import annotations

from torch import Tensor, nn


class PatchProduct(nn.Conv3d):
    """A convolution over inputs as large as its kernel: a product with the weight, flattened.

    Args:
        original: A convolution for which `is_patch_projection`; its parameters are taken over.
    """

    def __init__(self, original: nn.Conv3d) -> None:
        time, rows, columns = original.kernel_size
        super().__init__(
            original.in_channels,
            original.out_channels,
            (time, rows, columns),
            stride=(time, rows, columns),
            bias=original.bias is not None,
            device="meta",
        )
        self.weight, self.bias = original.weight, original.bias
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        """Maps patches [P, C, time, rows, columns] to [P, D, 1, 1, 1]; others are convolved."""
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        product_PD = nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return product_PD[:, :, None, None, None]


def is_patch_projection(module: nn.Module) -> bool:
    """Whether a module is a 3-D convolution whose patches neither overlap nor leave gaps."""
    return (
        type(module) is nn.Conv3d
        and module.stride == module.kernel_size
        and module.padding == (0, 0, 0)
        and module.dilation == (1, 1, 1)
        and module.groups == 1
    )


def multiply_patches(model: nn.Module) -> None:
    """Puts products in place of a model's projections of patches; its parameters stay the same."""
    found = [(name, m) for name, m in model.named_modules() if is_patch_projection(m)]
    for name, module in found:
        assert isinstance(module, nn.Conv3d)
        parent_name, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), own_name, PatchProduct(module))
