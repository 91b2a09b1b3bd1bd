"""Exported files at work in onnxruntime: what running them takes, and smaller ones that are made of them."""
