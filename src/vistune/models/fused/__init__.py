"""A decoder layer as one autograd function, frozen, with adapters, or trained whole.

What it buys over the layer-by-layer graph: merged projections, residual adds inside the matrix
products, elementwise chains as single kernels, only the activations the backward pass reads, fp32
gradients of trained weights without copies of them, and, on request, FP8 matrix products of frozen
ones. It computes the same function as the transformers layer it stands for, with the same
parameters; a layer it does not understand is refused by name, never guessed.
"""
