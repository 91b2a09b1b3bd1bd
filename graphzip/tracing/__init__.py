"""From an `nn.Module` to a traced graph, with proof of the sizes and modes at which the graph is the model."""
