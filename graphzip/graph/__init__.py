"""From an `nn.Module` to a flat ATen graph and back to an `nn.Module` that trains."""
