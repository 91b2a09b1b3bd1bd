"""ONNX files as modules of PyTorch.

`reading` takes a file apart, `build` makes a module of it from the rows of `operators`, `layers` and `sizes`, and
`check` compares that with the file in onnxruntime. Nothing in a file is run as Python: it is parsed, its operators are
looked up in tables, and what no table has is refused.
"""
