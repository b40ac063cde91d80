"""Code generation: templates to sources, kernels and the whole-model step."""
