"""Which device holds what: trees as real matrices, meshes, and states that move."""
