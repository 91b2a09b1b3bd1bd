"""Between `prepare` and `convert`: the model that trains, and the ways to give a model more room."""
